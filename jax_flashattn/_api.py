"""The functions that users call."""

from __future__ import annotations

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
    prefix_lengths=None,
    bidirectional_spans=None,
) -> Any:
    """Scaled dot-product attention, exact, without the score matrix in memory.

    Computes softmax(scores) value over the keys that a row sees, with float32 accumulation, where
    scores = cap(scale * query key^T) + bias - slope * |i - j| and cap(x) = c * tanh(x / c); the
    gradient recomputes the scores from the log-sum-exp (FlashAttention-2, arXiv 2307.08691). The
    arguments up to return_residual are those of jax.nn.dot_product_attention, in its order. With B
    batch, T query length, S key length, N query heads, K key/value heads, H head dim:

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
      logits_soft_cap: c, a Python number above 0: scaled products are bounded by it before anything
        else is done to them (Gemma 2, arXiv 2408.00118). The kernels compute tanh with a relative
        error of 2^-11. None: no cap.
      alibi_slopes: float32 [N] or [B, N]: slope times the distance between the positions of row and
        key is subtracted from the score (ALiBi, arXiv 2108.12409), on either side of the row. Not
        differentiable.
      sinks: [N] or [B, N]: for each head the score of a key that every row sees and whose value is
        0 (gpt-oss). It takes part in the log-sum-exp; `lse_without_sinks` takes it out. Any value,
        infinities included; differentiable.
      num_sink_tokens: an int: the window's left side does not hide the first so many keys
        (StreamingLLM, arXiv 2309.17453).
      query_segment_ids, key_value_segment_ids: int32 [B, T] and [B, S] ([T] and [S] without batch):
        a row sees only keys of its own id. For documents packed into one sequence: where ids come
        in runs, what lies between different ones costs nothing. Positions go on counting over
        documents, which makes no difference to causality, windows and ALiBi where queries and keys
        are packed alike; `varlen_attention` is for the other case. Padding gets an id that the
        other side does not have; what the arrays hold there does not matter, NaN included.
      dropout_rate: a Python number in [0, 1), rounded to a multiple of 2^-16: this part of the
        probabilities is dropped, the others are divided by 1 - rate. What is dropped depends on
        dropout_key, batch entry, head, row and key alone: it is the same in the gradient, on every
        implementation and however the call is sharded or mapped.
      dropout_key: one jax.random key; needed where dropout_rate is not 0.
      deterministic: the gradient is bitwise the same from run to run. What else may differ is the
        query's: key tiles add to it in any order. With "cuda:sm90" they then do it one after the
        other, which takes 1 to 19 % longer; above head dim 128 they always do. "cuda:sm80" computes
        scores once more for it: seven matrix products a tile instead of five, and less scratch. The
        other results, and everything on the reference path, are the same in any case.
      return_lse: also return the natural log-sum-exp of the masked scores, float32 [B, N, T] or
        [N, T], differentiable.
      prefix_lengths: int32 [B] (a scalar or [1] without batch), with is_causal: all of the first so
        many positions see each other (prefix language models, arXiv 1910.10683).
      bidirectional_spans: int32 [B, R, 2] ([R, 2] without batch), with is_causal: positions in
        [begin, end) see each other whatever causality and window say, images between text, say.
        A span that ends where it begins is none.

    All of mask, lengths, window and causality apply at once. A row that sees no key has output 0,
    log-sum-exp -inf and gradient 0 (jax.nn returns the mean of value).

    Returns:
      The output [B, T, N, Hv] or [T, N, Hv] in query's dtype; or the tuple (output[, residual][,
      lse]) of what was asked for.

    Raises:
      TypeError: an argument of the wrong kind or dtype (a mask that is not bool, float64 inputs).
      ValueError: shapes, ranges, an unknown choice, options that do not combine.
      NotImplementedError: a named implementation that cannot serve the call, when tracing or, for a
        platform without CUDA, when lowering; an array that is sharded along its sequence or head
        dim (when compiling: a JaxRuntimeError says so); the gradient of alibi_slopes.

    Batch and heads may be sharded, under jit, shard_map and explicit mesh axes, without collectives
    in the forward. jax.vmap folds its axis into the batch. Forward-mode and second-order
    differentiation are not supported. Under jax.checkpoint, the policy
    save_only_these_names("flash_attention_out", "flash_attention_lse") spares the recomputation.
    With jax_debug_infs, set it before tracing; asking for the log-sum-exp of a row that sees no key
    is then an error, because it is infinite.
    """
    options, operands, unbatched = _options.normalise(**locals())  # exactly the arguments above
    return _attend(operands, options, unbatched, return_residual, return_lse)


def varlen_attention(
    query,
    key,
    value,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    scale=None,
    is_causal=False,
    local_window_size=None,
    implementation=None,
    causal_alignment="top_left",
    logits_soft_cap=None,
    alibi_slopes=None,
    sinks=None,
    dropout_rate=0.0,
    dropout_key=None,
    deterministic=False,
    return_lse=False,
) -> Any:
    """`attention` of sequences of different lengths, packed one behind the other.

    Row i belongs to sequence n where cu_seqlens_q[n] <= i < cu_seqlens_q[n + 1], and sees keys of
    that sequence only, from cu_seqlens_k[n] up to cu_seqlens_k[n + 1]. Positions, to which
    causality, windows and ALiBi refer, are counted within each sequence. The lengths live on the
    device, and nothing is compiled again when they change.

    Args:
      query: [T, N, H], T tokens of all sequences together; see `attention`, also for all below.
      key, value: [S, K, H] and [S, K, Hv].
      cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1] each, not decreasing. A sequence may be
        empty, on either side. What the arrays hold outside of all sequences does not matter, NaN
        included. Values that decrease or lie outside the arrays are safe: rows then see some keys
        or none.
      alibi_slopes, sinks: float32 [N].

    Returns:
      The output [T, N, Hv], or (output, log-sum-exp float32 [N, T]) with return_lse. Rows before
      cu_seqlens_q[0] or from cu_seqlens_q[-1] on, and those of a sequence without keys, are 0.

    Raises: what `attention` raises.
    """
    given = locals()
    bounds = [given.pop("cu_seqlens_q"), given.pop("cu_seqlens_k")]
    options, operands, unbatched = _options.normalise(**given)
    if not unbatched:
        raise ValueError("varlen_attention takes packed arrays [tokens, heads, head_dim].")
    cu_q, cu_k = _options.cumulative(*bounds)
    operands = operands._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    return _attend(operands, options, unbatched, False, return_lse)


def lse_without_sinks(lse, sinks):
    """Takes `sinks` [N] or [B, N] out of a log-sum-exp [B, N, T] or [N, T]: that of the keys.

    log(exp(lse) - exp(sink)): what merging partial results needs, where the sink must count once. A
    row that sees no key gives -inf.
    """
    sinks = jnp.asarray(sinks, jnp.float32)[..., None]
    # Each where() twice, so that the gradient meets no infinity that was not chosen.
    empty = lse == -jnp.inf
    share = jnp.exp(jnp.where(empty, -jnp.inf, sinks - jnp.where(empty, 0, lse)))
    nothing_left = share >= 1
    rest = jnp.log1p(-jnp.where(nothing_left, 0, share))
    return lse + jnp.where(nothing_left, -jnp.inf, rest)


def _attend(operands, options, unbatched: bool, return_residual: bool, return_lse: bool) -> Any:
    _primitives.check_named_implementation(operands, options)
    out, lse = _vjp.flash_attention(_vary_alike(operands), options)
    results = [out]
    if return_residual:
        residual = jnp.swapaxes(jax.lax.stop_gradient(lse), 1, 2)
        results.append(residual.astype(operands.key.dtype))
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


def export_disabled_checks() -> list:
    """What jax.export needs to let the kernels through.

    `jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=export_disabled_checks())`.
    jax refuses custom calls that it does not know, because it cannot promise their stability; the
    names of ours carry a version, which changes with their meaning.
    """
    allow = jax.export.DisabledSafetyCheck.custom_call
    return [allow(_ffi.FORWARD_TARGET), allow(_ffi.BACKWARD_TARGET)]
