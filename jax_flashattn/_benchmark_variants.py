"""The attention functions that the benchmark times, and the arrays it gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashattn import _ffi
from jax_flashattn._api import attention
from jax_flashattn._benchmark_report import Shape

Attention = Callable[..., Any]  # (query, key, value, causal) -> out


def families() -> list[str]:
    """The implementations to time; None's choice beside them only where there is one."""
    if jax.default_backend() != "gpu" or _ffi.extension is None:
        return ["auto"]
    compiled = [f"cuda:{family}" for family in _ffi.extension.build_info()["families"]]
    return ["auto", *compiled] if len(compiled) > 1 else compiled


def ours(implementation: str) -> Attention:
    """`attention` of this package; "auto" is implementation=None."""
    chosen = None if implementation == "auto" else implementation
    return lambda q, k, v, causal: attention(q, k, v, is_causal=causal, implementation=chosen)


def features() -> dict[str, Attention]:
    """`attention` with one option each that costs something, and with none: "plain".

    A bias, and a mask with a row for each query, are left out: they would be as large as the
    scores.
    """

    def slopes(q):  # ALiBi's own, arXiv 2108.12409, for a power of two of heads
        return jnp.exp2(-8 * jnp.arange(1, q.shape[2] + 1, dtype=jnp.float32) / q.shape[2])

    def documents(q):  # of 1024 tokens, or four
        ids = jnp.arange(q.shape[1]) // min(1024, max(1, q.shape[1] // 4))
        return jnp.broadcast_to(ids, q.shape[:2])

    def padding(q):  # the last quarter of the keys
        return (jnp.arange(q.shape[1]) < q.shape[1] - q.shape[1] // 4)[None, None, None]

    options: dict[str, Callable[[Any], dict[str, Any]]] = {
        "plain": lambda q: {},
        "soft cap": lambda q: {"logits_soft_cap": 50.0},
        "ALiBi": lambda q: {"alibi_slopes": slopes(q)},
        "dropout": lambda q: {"dropout_rate": 0.1, "dropout_key": jax.random.key(1)},
        "sinks": lambda q: {"sinks": jnp.zeros(q.shape[2], jnp.float32)},
        "padding mask": lambda q: {"mask": padding(q)},
        "traced scale": lambda q: {"scale": jnp.float32(q.shape[3] ** -0.5)},
        "deterministic": lambda q: {"deterministic": True},
        "documents": lambda q: {
            "query_segment_ids": documents(q), "key_value_segment_ids": documents(q),
        },
    }  # fmt: skip
    return {
        name: lambda q, k, v, causal, of=of: attention(q, k, v, is_causal=causal, **of(q))
        for name, of in options.items()
    }


def jax_nn(implementation) -> Attention:
    """jax.nn.dot_product_attention by "xla" or "cudnn"."""
    return lambda q, k, v, causal: jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation=implementation
    )


def pallas() -> Attention:
    """jax's Pallas kernel, or ImportError where this jax has none."""
    mha = importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha

    def call(q, k, v, causal):
        if q.shape[2] != k.shape[2]:
            raise NotImplementedError("the Pallas kernel has no grouped queries")
        return mha(q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5, causal=causal)

    return call


def variants(implementations: list[str], against: list[str]) -> tuple[dict, dict]:
    """Ours and theirs, by the name that tables show."""
    others: dict[str, Attention] = {}
    for name in against:
        try:
            others["Pallas" if name == "pallas" else f"jax.nn {name}"] = (
                pallas() if name == "pallas" else jax_nn(name)
            )
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return {f"ours {x}": ours(x) for x in implementations}, others


def chained(attention: Attention, calls: int) -> Attention:
    """That many calls, each with the outputs of the one before as its queries.

    Calls that do not depend on each other XLA would make one of.
    """

    def chain(q, k, v, causal):
        for _ in range(calls):
            q = attention(q, k, v, causal)
        return q

    return chain


def inputs(row: Shape, dtype: str) -> list[jax.Array]:
    """query, key, value, and the output's cotangent: N(0, 1), never zeros, which run faster."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (row.heads, row.kv_heads, row.kv_heads, row.heads)
    draw = jax.jit(lambda key, n: jax.random.normal(
        key, (row.batch, row.length, n, row.head_dim), jnp.float32
    ).astype(dtype), static_argnums=1)  # fmt: skip
    return [draw(key, n) for key, n in zip(keys, heads)]
