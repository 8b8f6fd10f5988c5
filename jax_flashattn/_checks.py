"""Checks of single arguments: each takes one as the caller gave it and returns its canonical form.

TypeError: the wrong kind of Python object or dtype. ValueError: a shape or a range.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

MAX_INT32 = 2**31 - 1


def kind(x) -> str:
    """How an error message shows a value."""
    if is_array(x):
        return f"an array {x.dtype}{list(x.shape)}"
    return f"{x!r} ({type(x).__name__})"


def is_array(x) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def array(name: str, x) -> Any:
    """Accepts jax.Array, tracers, np.ndarray and wrappers that offer __jax_array__."""
    if not is_array(x) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if not is_array(x):
        raise TypeError(f"{name} must be an array (jax.Array or numpy.ndarray), got {kind(x)}.")
    return x


def choice(name: str, value, allowed):
    if not (value is None or isinstance(value, str)) or value not in allowed:
        listing = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {listing}; got {value!r}.")
    return value


def query_key_value(query, key, value):
    """The three main operands with a batch axis, and whether that axis had to be added."""
    named = {"query": query, "key": key, "value": value}
    named = {name: array(name, x) for name, x in named.items()}
    dtypes = {name: x.dtype for name, x in named.items()}
    if len(set(dtypes.values())) != 1:
        listing = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"query, key and value must have one dtype; got {listing}.")
    if str(dtypes["query"]) not in ("float16", "bfloat16", "float32"):
        raise TypeError(
            f"query, key and value must be float16, bfloat16 or float32; got {dtypes['query']}."
        )
    rank = named["query"].ndim
    for x in named.values():
        if x.ndim not in (3, 4) or x.ndim != rank:
            shapes = ", ".join(f"{n} {list(y.shape)}" for n, y in named.items())
            raise ValueError(
                "query, key and value must all be [batch, length, heads, head_dim] or all "
                f"[length, heads, head_dim]; got {shapes}."
            )
    q, k, v = (jnp.asarray(x) if rank == 4 else jnp.asarray(x)[None] for x in named.values())
    shapes = f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}"
    if q.shape[0] != k.shape[0] or k.shape[0] != v.shape[0]:
        raise ValueError(f"query, key and value must have one batch size; got {shapes}.")
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"key and value must have the same length; got {shapes}.")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"key and value must have the same number of heads; got {shapes}.")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"query and key must have the same head dim; got {shapes}.")
    if 0 in (q.shape[2], k.shape[2], q.shape[3], v.shape[3]):
        raise ValueError(f"heads and head dims must be at least 1; got {shapes}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the query heads must be a multiple of the key/value heads (grouped-query attention); "
            f"got {q.shape[2]} and {k.shape[2]}."
        )
    return q, k, v, rank == 3


def score_operand(name: str, x, scores: tuple, dtype):
    """A bias or mask as [B|1, N|1, T|1, S|1]."""
    if x is None:
        return None
    x = array(name, x)
    if name == "mask" and x.dtype != np.bool_:
        raise TypeError(f"mask dtype must be bool (True: visible), got {x.dtype}; use bias=...")
    if name == "bias" and x.dtype == np.bool_:
        raise TypeError("bias dtype must be a number, got bool; use mask=...")
    real = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
    if name == "bias" and not real:
        raise TypeError(f"bias dtype must be a real number, got {x.dtype}.")
    fits = x.ndim <= 4 and all(
        extent in (1, full) for extent, full in zip(x.shape[::-1], scores[::-1])
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to [batch, heads, query length, key length] = {list(scores)} "
            f"(rank at most 4, each extent 1 or the full one); got {list(x.shape)}."
        )
    if name == "bias" and x.dtype not in (dtype, jnp.float32):
        x = jnp.asarray(x, jnp.float32)
    return jax.lax.expand_dims(jnp.asarray(x), range(4 - x.ndim))


def lengths(name: str, x, batch: int, unbatched: bool):
    """Sequence lengths as int32 [B]."""
    if x is None:
        return None
    if unbatched and isinstance(x, (int, np.integer)) and not isinstance(x, bool):
        x = np.asarray(x)
    x = integers(name, x)
    shapes = ((), (1,)) if unbatched else ((batch,),)
    if x.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have the shape {expected}, got {list(x.shape)}.")
    return x.reshape((batch,))


def integers(name: str, x):
    """An array of int32; a wider type is narrowed only where its values can be seen to fit."""
    x = array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be int32, got {x.dtype}.")
    if np.iinfo(x.dtype).max > MAX_INT32:
        if isinstance(x, Tracer):
            raise TypeError(f"{name} must be int32, got {x.dtype}; cast it with .astype(int32).")
        x = np.asarray(x)
        if x.size and (x.max() > MAX_INT32 or x.min() < -MAX_INT32 - 1):
            raise ValueError(f"{name} holds {x.min()} to {x.max()}, which does not fit int32.")
    return jnp.asarray(x, jnp.int32)


def per_head(name: str, x, batch: int, heads: int, unbatched: bool):
    """One number a query head as float32 [1, N], or [B, N] where it was given for each entry."""
    if x is None:
        return None
    x = array(name, x)
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{name} must be float32, got {x.dtype}.")
    shapes = ((heads,),) if unbatched else ((heads,), (batch, heads))
    if x.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have the shape {expected}, got {list(x.shape)}.")
    return jnp.asarray(x, jnp.float32).reshape((-1, heads))


def per_token(name: str, x, batch: int, length: int, unbatched: bool):
    """One int32 a token, [B, length]."""
    if x is None:
        return None
    x = integers(name, x)
    expected = (length,) if unbatched else (batch, length)
    if x.shape != expected:
        raise ValueError(f"{name} must have the shape {list(expected)}, got {list(x.shape)}.")
    return x.reshape((batch, length))


def soft_cap(cap) -> float | None:
    if cap is None:
        return None
    value = static_number("logits_soft_cap", cap)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"logits_soft_cap must be finite and above 0, or None; got {cap!r}.")
    return value


def count(name: str, x) -> int:
    if isinstance(x, (bool, np.bool_)) or is_array(x) or not hasattr(x, "__index__"):
        raise TypeError(f"{name} must be an int, got {kind(x)}.")
    x = operator.index(x)
    if x < 0:
        raise ValueError(f"{name} must not be negative, got {x}.")
    return min(x, MAX_INT32)


def static_number(name: str, x) -> float:
    if isinstance(x, (bool, np.bool_, jax.Array)) or np.ndim(x) != 0:
        raise TypeError(f"{name} must be a Python number, got {kind(x)}.")
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a Python number, got {kind(x)}.") from None


def split_scale(scale, head_dim: int):
    """(static value, None) or (None, operand [1])."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim), None
    if not is_array(scale) and hasattr(scale, "__jax_array__"):
        scale = scale.__jax_array__()
    if isinstance(scale, jax.Array):
        if scale.shape != () or not jnp.issubdtype(scale.dtype, jnp.floating):
            raise TypeError(
                f"scale as an array must be a floating-point scalar, got {kind(scale)}."
            )
        return None, scale.astype(jnp.float32).reshape((1,))
    if isinstance(scale, (bool, np.bool_)) or np.ndim(scale) != 0:
        raise TypeError(f"scale must be a scalar, got {kind(scale)}.")
    try:
        value = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a scalar, got {kind(scale)}.") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"scale must be finite and above 0, got {value!r}; any other value needs a jax scalar."
        )
    return value, None


def window(size) -> tuple[int | None, int | None]:
    """local_window_size as (left, right), None where unbounded."""
    if size is None:
        return None, None
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"local_window_size must have 2 entries (left, right), got {size!r}.")
        left, right = size
    else:
        left = right = size
    return window_side(left, size), window_side(right, size)


def window_side(side, size) -> int | None:
    if side is None:
        return None
    try:
        if isinstance(side, (bool, np.bool_)) or is_array(side):
            raise TypeError
        side = operator.index(side)
    except TypeError:
        raise TypeError(
            f"local_window_size must be an int, a pair of ints (None: unbounded) or None; "
            f"got {size!r}."
        ) from None
    if side < 0:
        raise ValueError(
            f"local_window_size must not be negative, got {size!r}; unbounded is None."
        )
    return side if side < MAX_INT32 else None
