"""The functions that users call."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashattn import _ffi, _options, _primitives, _vjp


def attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    implementation=None,
    return_residual=False,
    causal_alignment="top_left",
    logits_soft_cap=None,
    alibi_slopes=None,
    sinks=None,
    num_sink_tokens=0,
    query_segment_ids=None,
    key_value_segment_ids=None,
    dropout_rate=0.0,
    dropout_key=None,
    deterministic=False,
    return_lse=False,
) -> Any:
    """Scaled dot-product attention, exact, without the score matrix in memory.

    Computes softmax(scale * query key^T + bias) value over the keys that a row sees, with float32
    accumulation; the gradient recomputes the scores from the log-sum-exp (FlashAttention-2,
    arXiv 2307.08691). The arguments up to return_residual are those of
    jax.nn.dot_product_attention, in its order. With B batch, T query length, S key length, N query
    heads, K key/value heads, H head dim:

    Args:
      query: [B, T, N, H] or [T, N, H]; float16 or bfloat16 for the kernels, or float32, which takes
        the reference path. query, key and value have one dtype.
      key: [B, S, K, H] or [S, K, H], where K divides N: query head n reads key head n // (N // K).
      value: [B, S, K, Hv] or [S, K, Hv].
      bias: added to the scaled scores; at most rank 4, broadcastable to [B, N, T, S]. float16,
        bfloat16 or float32; other real dtypes become float32. Differentiable, in its own shape.
      mask: bool, broadcastable like bias; True: the key is visible.
      scale: None is 1/sqrt(H). A Python or NumPy scalar is static, finite and above 0. A jax scalar
        is an operand: any value, differentiable (its gradient is sum(query * dquery) / scale, NaN
        at scale 0).
      is_causal: row i sees keys up to i (see causal_alignment).
      query_seq_lengths: int32 [B] (a scalar or [1] without batch), clamped to [0, T]. Rows past it
        see no key.
      key_value_seq_lengths: int32 [B], clamped to [0, S]. Keys past it are not visible, and what
        the arrays hold there does not matter, NaN included.
      local_window_size: w or (left, right), None for an unbounded side: row i sees keys
        i - left to i + right, both included.
      implementation: None, the best available; "cuda", the kernels; "cuda:sm80" or "cuda:sm90",
        that kernel family, in the gradient too; "xla", the reference, which runs on every platform.
        `explain` tells what None does.
      return_residual: also return the log-sum-exp as jax.nn does: [B, T, N] or [T, N] in key's
        dtype, not differentiable. return_lse has full precision.
      causal_alignment: "top_left", row i is at position i; "bottom_right", row i is at position
        i + S - T (with the sequence lengths where given), for decoding and chunks. Windows follow.
      logits_soft_cap, alibi_slopes, sinks, num_sink_tokens, query_segment_ids,
        key_value_segment_ids, dropout_rate, dropout_key: not supported yet.
      deterministic: the gradient is bitwise the same from run to run. What else may differ is the
        query's: key tiles add to it in any order. Here it is summed in a fixed order, from scores
        computed once more: seven matrix products a tile instead of five, and less scratch. Above
        head dim 128, "cuda:sm90" always works so. The other results, and everything on the
        reference path, are the same in any case.
      return_lse: also return the natural log-sum-exp of the masked scores, float32 [B, N, T] or
        [N, T], differentiable.

    All of mask, lengths, window and causality apply at once. A row that sees no key has output 0,
    log-sum-exp -inf and gradient 0 (jax.nn returns the mean of value).

    Returns:
      The output [B, T, N, Hv] or [T, N, Hv] in query's dtype; or the tuple (output[, residual][,
      lse]) of what was asked for.

    Raises:
      TypeError: an argument of the wrong kind or dtype (a mask that is not bool, float64 inputs).
      ValueError: shapes, ranges, or an unknown choice.
      NotImplementedError: an option that is not supported yet; a named implementation that cannot
        serve the call, when tracing or, for a platform without CUDA, when lowering; an array that
        is sharded along its sequence or head dim (when compiling: a JaxRuntimeError says so).

    Batch and heads may be sharded, under jit, shard_map and explicit mesh axes, without collectives
    in the forward. jax.vmap folds its axis into the batch. Forward-mode and second-order
    differentiation are not supported. Under jax.checkpoint, the policy
    save_only_these_names("flash_attention_out", "flash_attention_lse") spares the recomputation.
    With jax_debug_infs, set it before tracing; asking for the log-sum-exp of a row that sees no key
    is then an error, because it is infinite.
    """
    options, operands, unbatched = _options.normalise(**locals())  # exactly the arguments above
    _primitives.check_named_implementation(operands, options)
    out, lse = _vjp.flash_attention(_vary_alike(operands), options)
    results = [out]
    if return_residual:
        results.append(jnp.swapaxes(jax.lax.stop_gradient(lse), 1, 2).astype(operands.key.dtype))
    if return_lse:
        results.append(lse)
    if unbatched:
        results = [x[0] for x in results]
    return tuple(results) if len(results) > 1 else results[0]


def _vary_alike(operands: _options.Operands) -> _options.Operands:
    """Under shard_map, makes all operands vary over the same axes, as jnp's own functions do.

    The transpose of this is the sum over devices that the gradient of a shared operand needs.
    """

    def varying(x) -> frozenset:
        return jax.typeof(x).manual_axis_type.varying

    union = frozenset().union(*map(varying, jax.tree.leaves(operands)))

    def vary(x):
        missing = tuple(sorted(union - varying(x), key=str))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, operands)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call of `attention` runs. The fields after `reason` are None on the reference path."""

    platform: str
    implementation: str  # "cuda:<family>" or "xla (reference)"
    reason: str  # why this implementation, and why not a better one
    head_dim: int | None = None  # the compiled one; the call's is filled up to it on the chip
    tile: tuple[int, int] | None = None  # query rows and keys of a forward block
    schedule: str | None = None  # the order of work, and what is in flight
    shared_memory_bytes: int | None = None  # of a forward block
    scratch_bytes_forward: int | None = None
    backward_implementation: str | None = None
    backward_tile: tuple[int, int] | None = None  # query rows and keys, of the kernel for dK and dV
    backward_schedule: str | None = None  # which kernels compute what, and the order of their work
    backward_shared_memory_bytes: int | None = None  # of a block of the kernel that needs most
    scratch_bytes_backward: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.implementation} on {self.platform}: {self.reason}"]
        for name, field in dataclasses.asdict(self).items():
            if name not in ("platform", "implementation", "reason") and field is not None:
                shown = f"{field[0]} x {field[1]}" if isinstance(field, tuple) else f"{field}"
                lines.append(f"  {name.replace('_', ' ')}: {shown}")
        return "\n".join(lines)


def explain(*args, platform: str | None = None, **kwargs) -> Explanation:
    """What `attention` with these arguments would run on a platform, and why, without running it.

    Args:
      *args, **kwargs: those of `attention`; arrays may be jax.ShapeDtypeStruct.
      platform: "cuda", "cpu" and so on; None is the default backend.

    Raises what `attention` would raise, NotImplementedError for a platform included.
    """
    bound = inspect.signature(attention).bind(*args, **kwargs).arguments
    is_array = {name: isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) for name, x in bound.items()}
    arrays = {name: x for name, x in bound.items() if is_array[name]}
    static = {name: x for name, x in bound.items() if not is_array[name]}
    normal = []

    def trace(arrays):
        options, operands, _ = _options.normalise(**arrays, **static)
        normal.append(options)
        return operands

    operands = jax.eval_shape(trace, arrays)
    if platform is None:
        platform = jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform  # jax's older name for it
    return _explain(operands, normal[0], platform)


def _explain(operands, options: _options.Options, platform: str) -> Explanation:
    reference = "xla (reference)"
    if platform != "cuda":
        if options.wants_cuda:
            raise NotImplementedError(_primitives.wrong_platform(options, platform))
        return Explanation(platform, reference, "the kernels need an NVIDIA GPU")
    reason = _primitives.unserved(operands, options, backward=False)
    if reason is not None:
        return Explanation(platform, reference, reason)
    gradient = dataclasses.replace(options, bias_gradient=operands.bias is not None)
    reason = _primitives.unserved(operands, gradient, backward=True)
    device = _ffi.default_device()
    forward = _ffi.plan(operands, options, backward=False, device=device)
    made = Explanation(
        platform,
        f"cuda:{forward.family}",
        forward.why,
        forward.head_dim,
        (forward.q_tile, forward.k_tile),
        forward.schedule,
        forward.shared_memory_bytes,
        4 * forward.scratch_floats,
    )
    if reason is not None:
        return dataclasses.replace(
            made, reason=f"{made.reason}; gradient by the reference: {reason}"
        )
    backward = _ffi.plan(operands, gradient, backward=True, device=device)
    return dataclasses.replace(
        made,
        backward_implementation=f"cuda:{backward.family}",
        backward_tile=(backward.q_tile, backward.k_tile),
        backward_schedule=backward.schedule,
        backward_shared_memory_bytes=backward.shared_memory_bytes,
        scratch_bytes_backward=4 * backward.scratch_floats,
    )


def export_disabled_checks() -> list:
    """What jax.export needs to let the kernels through.

    `jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=export_disabled_checks())`.
    jax refuses custom calls that it does not know, because it cannot promise their stability; the
    names of ours carry a version, which changes with their meaning.
    """
    allow = jax.export.DisabledSafetyCheck.custom_call
    return [allow(_ffi.FORWARD_TARGET), allow(_ffi.BACKWARD_TARGET)]
