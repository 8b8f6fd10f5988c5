"""The primitives: what a call is between tracing and XLA.

    flash_attention_fwd_p.bind(*leaves of Operands, structure=, options=) -> [out, lse]
    flash_attention_bwd_p.bind(*leaves of Residuals, structure=, options=) -> [dq, dk, dv] + [dbias]

`structure` is the treedef of the leaves, which says which operands are absent. dbias is float32 and
present where options.bias_gradient.

Each of them has a batching rule (_batching.py) and lowers, through its partitioning rule
(_partitioning.py), to a second primitive that stands for the work of one device. Only that one
knows platforms: cuda becomes an XLA FFI custom call, everything else the reference.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The only private import. A primitive that lowers to custom_partitioning needs the device
# assignment while it is lowered, and this set is the one place to say so.
from jax._src import dispatch
from jax.core import ShapedArray, Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_flashattn import _batching, _ffi, _partitioning, _reference
from jax_flashattn._options import Operands, Options


class Residuals(NamedTuple):
    """The operands of the backward; d_lse is None where lse is not differentiated."""

    operands: Operands
    out: Any  # [B, T, N, Hv], query's dtype
    lse: Any  # float32 [B, N, T]
    d_out: Any  # like out
    d_lse: Any  # like lse


def forward_shapes(operands: Operands, options: Options) -> list:
    """Abstract results. update() keeps what else the type of query says: sharding, varying axes."""
    q, value_dim = operands.query, operands.value.shape[3]
    batch, q_len, heads, _ = q.shape
    out_sharding, lse_sharding = _partitioning.result_types(operands)
    return [
        q.update(shape=(batch, q_len, heads, value_dim), weak_type=False, **out_sharding),
        q.update(
            shape=(batch, heads, q_len), dtype=jnp.dtype("float32"), weak_type=False, **lse_sharding
        ),
    ]


def backward_shapes(residuals: Residuals, options: Options) -> list:
    operands = residuals.operands
    _partitioning.result_types(operands)
    grads = [x.update(weak_type=False) for x in operands[:3]]
    if options.bias_gradient:
        grads.append(operands.bias.update(dtype=jnp.dtype("float32"), weak_type=False))
    return grads


def forward_reference(operands: Operands, options: Options) -> list:
    return _reference.forward(operands, options)


def backward_reference(residuals: Residuals, options: Options) -> list:
    return _reference.backward(*residuals, options)


def forward_cuda(operands: Operands, options: Options) -> list:
    if falls_back(operands, options, backward=False):
        return forward_reference(operands, options)
    batch, q_len, heads, _ = operands.query.shape
    out_shape = (batch, q_len, heads, operands.value.shape[3])
    out = jax.ShapeDtypeStruct(out_shape, operands.query.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, q_len), jnp.float32)
    floats = _ffi.plan(operands, options, backward=False).scratch_floats
    scratch = jax.ShapeDtypeStruct((floats,), jnp.float32)
    call = jax.ffi.ffi_call(_ffi.FORWARD_TARGET, (out, lse, scratch))
    out, lse, _ = call(*filled(operands), **_ffi.attributes(options, backward=False))
    return [out, jnp.maximum(lse, _reference.LOWEST) if options.finite_lse else lse]


def backward_cuda(residuals: Residuals, options: Options) -> list:
    operands, out, lse, d_out, d_lse = residuals
    if falls_back(operands, options, backward=True):
        return backward_reference(residuals, options)
    if options.finite_lse:
        lse = jnp.where(lse == _reference.LOWEST, -jnp.inf, lse)
    scratch = _ffi.plan(operands, options, backward=True).scratch_floats
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3]]
    dbias_shape = operands.bias.shape if options.bias_gradient else (0,)
    results += [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (dbias_shape, (scratch,))]
    d_lse = jnp.zeros((0,), jnp.float32) if d_lse is None else d_lse
    call = jax.ffi.ffi_call(_ffi.BACKWARD_TARGET, results)
    arrays = (*filled(operands), out, lse, d_out, d_lse)
    grads = call(*arrays, **_ffi.attributes(options, backward=True))
    return list(grads[: 4 if options.bias_gradient else 3])


def filled(operands: Operands) -> list:
    """The operands with an empty array for each absent one: a handler has a fixed arity."""
    dtypes = (None, None, None, "f4", "?", "f4", "i4", "i4", "f4", "f4", "u4", *["i4"] * 5)
    return [jnp.zeros((0,), d) if x is None else x for x, d in zip(operands, dtypes)]


@functools.cache
def warn_without_kernels() -> None:
    warnings.warn(
        "This jax_flashattn was built without CUDA kernels: attention runs its reference path on "
        "the GPU, which is correct and slow. Install a build with kernels, or pass "
        "implementation='xla' to choose this path.",
        stacklevel=2,
    )


def unserved(operands: Operands, options: Options, *, backward: bool) -> str | None:
    """Why the kernels do not take this call; None where they do.

    Raises NotImplementedError instead where the caller named them.
    """
    if options.implementation == "xla":
        return "implementation='xla' was asked for"
    try:
        _ffi.plan(operands, options, backward=backward)
    except NotImplementedError as reason:
        if options.wants_cuda and 0 not in (*operands.query.shape, *operands.value.shape):
            raise NotImplementedError(
                f"implementation={options.implementation!r} cannot serve this call: {reason}. "
                f"implementation=None falls back to the reference, 'xla' chooses it."
            ) from None
        return str(reason)
    return None


def check_named_implementation(operands: Operands, options: Options) -> None:
    """Raises at trace time what is known by then about a named implementation."""
    if options.wants_cuda and (operands.query.dtype == jnp.float32 or _ffi.extension is not None):
        unserved(operands, options, backward=False)


def wrong_platform(options: Options, platform: str) -> str:
    return (
        f"implementation={options.implementation!r} needs the platform cuda, and this computation "
        f"is lowered for {platform}. implementation=None or 'xla' runs the reference there."
    )


def falls_back(operands: Operands, options: Options, *, backward: bool) -> bool:
    reason = unserved(operands, options, backward=backward)
    if reason is not None and _ffi.extension is None and options.implementation is None:
        warn_without_kernels()
    return reason is not None


def lower_local(attend):
    """Lowering of the primitive for one device; attend(tree, options) traces what it computes."""

    def rule(ctx, *leaves, structure, options: Options, shard):
        def flat(*leaves):
            tree = structure.unflatten(leaves)
            return _partitioning.run_shard(attend, tree, options, shard)

        # Here arrays are those of one device, and the mesh of the surrounding program, to which
        # their types may still refer, must not make jax constrain their sharding again.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            plain = [
                [ShapedArray(x.shape, x.dtype) for x in avals]
                for avals in (ctx.avals_in, ctx.avals_out)
            ]
            ctx = ctx.replace(avals_in=plain[0], avals_out=plain[1])
            return mlir.lower_fun(flat, multiple_results=True)(ctx, *leaves)

    return rule


def define(name: str, shapes, reference, kernel) -> Primitive:
    """The primitive that users' programs hold, above the one that a single device lowers."""
    whole, local = Primitive(name), Primitive(f"{name}_local")
    for primitive in (whole, local):
        primitive.multiple_results = True

    @whole.def_abstract_eval
    def whole_abstract_eval(*avals, structure, options: Options):
        return shapes(structure.unflatten(avals), options)

    @local.def_abstract_eval
    def local_abstract_eval(*avals, structure, options: Options, shard):
        return shapes(structure.unflatten(avals), options)

    @functools.partial(jax.jit, static_argnames=("structure", "options"))
    def run(*leaves, structure, options):
        if not any(isinstance(x, Tracer) for x in leaves):
            # jax_debug_nans calls this without jit to find the operation that made a NaN.
            return reference(structure.unflatten(leaves), options)
        return whole.bind(*leaves, structure=structure, options=options)

    @whole.def_impl
    def impl(*leaves, structure, options):
        with jax.disable_jit(False):  # under disable_jit, run would come back here for ever
            return run(*leaves, structure=structure, options=options)

    def lower_whole(ctx, *leaves, structure, options):
        platforms = ctx.platforms or ctx.module_context.platforms
        if options.wants_cuda and set(platforms) != {"cuda"}:
            raise NotImplementedError(wrong_platform(options, ", ".join(platforms)))
        region = _partitioning.partly_manual(ctx.module_context.axis_context)
        function = _partitioning.partitioned(local, structure, options, region)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)

    dispatch.prim_requires_devices_during_lowering.add(whole)
    batching.primitive_batchers[whole] = functools.partial(_batching.rule, whole)
    mlir.register_lowering(whole, lower_whole)
    mlir.register_lowering(local, lower_local(reference))
    mlir.register_lowering(local, lower_local(kernel), platform="cuda")
    return whole


flash_attention_fwd_p = define(
    "flash_attention_fwd", forward_shapes, forward_reference, forward_cuda
)
flash_attention_bwd_p = define(
    "flash_attention_bwd", backward_shapes, backward_reference, backward_cuda
)


def forward(operands: Operands, options: Options) -> tuple:
    """(out, lse), not differentiable: see _vjp.py."""
    leaves, structure = jax.tree.flatten(operands)
    return tuple(flash_attention_fwd_p.bind(*leaves, structure=structure, options=options))


def backward(residuals: Residuals, options: Options) -> list:
    """[dq, dk, dv] and, where options.bias_gradient, dbias in float32."""
    leaves, structure = jax.tree.flatten(residuals)
    return flash_attention_bwd_p.bind(*leaves, structure=structure, options=options)


def no_second_order(primals, tangents, **_):
    raise NotImplementedError(
        "jax_flashattn does not differentiate its gradient (second order, or forward mode over "
        "reverse mode). Use jax.nn.dot_product_attention where you need that."
    )


ad.primitive_jvps[flash_attention_fwd_p] = no_second_order
ad.primitive_jvps[flash_attention_bwd_p] = no_second_order
