"""The compiled extension `_ext`: loads it, registers its XLA FFI targets, asks what it would run.

A package built without CUDA has no `_ext` and runs the reference everywhere. Importing needs no
GPU, no driver and no CUDA toolkit.
"""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_flashattn._checks import MAX_INT32
from jax_flashattn._options import Operands, Options

FORWARD_TARGET = "jax_flashattn_fwd_v2"
BACKWARD_TARGET = "jax_flashattn_bwd_v2"

# Opt-in shared memory per block, CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability"; the device decides at run time, this only serves `explain`.
SHARED_MEMORY_KIB = {"8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "12.0": 99, "12.1": 99}
SHARED_MEMORY_BYTES = 227 * 1024  # 9.0 and 10.x


class Device(NamedTuple):
    """The GPU a plan is made for, as far as the choice of kernels depends on it."""

    compute_capability: int = 90  # 9.0
    shared_memory_bytes: int = SHARED_MEMORY_BYTES


class Plan(NamedTuple):
    """What the extension would launch for one call."""

    family: str
    head_dim: int  # the compiled one, at least the call's
    q_tile: int
    k_tile: int
    warps: int
    shared_memory_bytes: int
    scratch_floats: int
    splits: int
    schedule: str
    why: str


def load(name: str = "jax_flashattn._ext"):
    """The extension module with its targets registered, or None where it was not built."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        extension = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"jax_flashattn is built with CUDA kernels, but its extension {name} does not load: "
            f"{error}. Reinstall jax_flashattn for this Python and platform."
        ) from error
    check_ffi_version(tuple(extension.xla_ffi_api_version), runtime_ffi_version())
    for target, handler in extension.handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform="CUDA")
    return extension


def runtime_ffi_version() -> tuple[int, int]:
    """XLA FFI API version (major, minor) of the installed jaxlib, from its headers."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text() if header.exists() else ""
    defined = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR)\s+(\d+)", text))
    if len(defined) != 2:
        raise ImportError(f"jax_flashattn cannot read the XLA FFI API version from {header}.")
    return int(defined["MAJOR"]), int(defined["MINOR"])


def check_ffi_version(built: tuple, runtime: tuple) -> None:
    """XLA takes down the whole backend when a handler is newer than itself: refuse before that."""
    if built[0] != runtime[0] or built > runtime:
        raise ImportError(
            f"jax_flashattn was built for XLA FFI API {built[0]}.{built[1]}, but the installed "
            f"jaxlib has {runtime[0]}.{runtime[1]}. Upgrade jaxlib, or reinstall jax_flashattn "
            f"built against an older one."
        )


extension: Any = load()

# Operands of which a plan asks no more than whether they are there.
PRESENCE = ("alibi_slopes", "sinks", "dropout_seeds", "query_segment_ids", "spans")


def plan(
    operands: Operands,
    options: Options,
    *,
    backward: bool,
    device: Device | None = None,
) -> Plan:
    """What the kernels would run for these operands (arrays or avals).

    Where no device is known, one that has every family; the handlers look at the real one.

    Raises NotImplementedError, saying why, where they cannot serve the call.
    """
    query, key, value, bias = operands[:4]
    if query.dtype == np.float32:
        raise NotImplementedError("the kernels take float16 and bfloat16, and query is float32")
    if extension is None:
        raise NotImplementedError("this jax_flashattn was built without CUDA kernels")
    bounds = operands.cu_seqlens_q
    sizes = (*query.shape, *key.shape, *value.shape, *(() if bounds is None else bounds.shape))
    if not all(isinstance(extent, int) for extent in sizes):
        raise NotImplementedError("the kernels need concrete shapes, not jax.export's symbols")
    if 0 in sizes:
        raise NotImplementedError("an array is empty, there is nothing to launch")
    if max(sizes) > MAX_INT32:
        raise NotImplementedError("an extent is 2^31 or larger")
    batch, q_len, heads, head_dim = query.shape
    _, k_len, kv_heads, value_dim = value.shape
    try:
        made = extension.plan(
            backward=backward,
            batch=batch,
            q_len=q_len,
            k_len=k_len,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            bf16=str(query.dtype) == "bfloat16",
            mask=() if operands.mask is None else operands.mask.shape[2:],
            device_scale=operands.scale is not None,
            bias=() if bias is None else (bias.dtype == query.dtype, *bias.shape[2:]),
            has_lengths=operands[6:8] != (None, None),
            soft_cap=options.soft_cap is not None,
            num_sink_tokens=options.num_sink_tokens,
            sequences=-1 if bounds is None else bounds.shape[1] - 1,
            **{name: getattr(operands, name) is not None for name in PRESENCE},
            window_left=bound(options.window_left),
            window_right=bound(options.window_right),
            bias_gradient=options.bias_gradient,
            deterministic=options.deterministic,
            family=family(options),
            **(device or Device())._asdict(),
        )
    except ValueError as error:
        raise NotImplementedError(str(error).rstrip(".")) from error
    return Plan(**{name: made[name] for name in Plan._fields})


def family(options: Options) -> str:
    """The kernel family asked for: "cuda:sm80" -> "sm80", otherwise the extension chooses."""
    return (options.implementation or "").partition(":")[2] or "auto"


def attributes(options: Options, *, backward: bool) -> dict:
    """The static part of a custom call; XLA FFI reads the width of each from its NumPy type."""
    made = dict(
        scale=np.float32(1.0 if options.scale is None else options.scale),
        window_left=np.int32(bound(options.window_left)),
        window_right=np.int32(bound(options.window_right)),
        bottom_right=np.bool_(options.bottom_right),
        soft_cap=np.float32(options.soft_cap or 0.0),
        num_sink_tokens=np.int32(options.num_sink_tokens),
        dropout_steps=np.int32(options.dropout_steps),
        family=family(options),
    )
    return made | dict(deterministic=np.bool_(options.deterministic)) if backward else made


def bound(side: int | None) -> int:
    """One side of a window as the kernels take it."""
    return MAX_INT32 if side is None else side


def default_device() -> Device:
    """JAX's default device; where that is not a CUDA one, one that has every family."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return Device()
    kib = SHARED_MEMORY_KIB.get(str(capability))
    major, _, minor = str(capability).partition(".")
    return Device(
        10 * int(major) + int(minor or 0), SHARED_MEMORY_BYTES if kib is None else kib * 1024
    )
