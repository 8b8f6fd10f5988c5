"""What a call means, decided at trace time: static Options, array Operands, and every check.

TypeError: the wrong kind of Python object or dtype. ValueError: a shape, a range or a combination.
NotImplementedError: a legal request that this version does not serve.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn._checks import (
    array,
    choice,
    count,
    integers,
    kind,
    lengths,
    per_head,
    per_token,
    query_key_value,
    score_operand,
    soft_cap,
    split_scale,
    static_number,
    window,
)

IMPLEMENTATIONS = (None, "cuda", "cuda:sm80", "cuda:sm90", "xla")
ALIGNMENTS = ("top_left", "bottom_right")
DROPOUT_STEPS = 2**16  # dropout_rate is rounded to a multiple of 1 / DROPOUT_STEPS


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of a call. Hashable: it is a parameter of the primitives and a cache key."""

    scale: float | None = 1.0  # None: Operands.scale is used
    window_left: int | None = None  # None: unbounded
    window_right: int | None = None  # causality is folded in: 0
    bottom_right: bool = False
    soft_cap: float | None = None
    num_sink_tokens: int = 0  # of keys that a window on the left does not hide
    dropout_steps: int = 0  # the dropout rate in units of 1 / DROPOUT_STEPS
    deterministic: bool = False
    implementation: str | None = None
    bias_gradient: bool = False  # backward: dbias is wanted
    finite_lse: bool = False  # rows that see no key get lse = -max float32 instead of -inf

    @property
    def wants_cuda(self) -> bool:
        """Whether the caller named the kernels, so that falling back would break a promise."""
        return self.implementation is not None and self.implementation.startswith("cuda")


class Operands(NamedTuple):
    """The arrays of a call in canonical form; None marks an absent one."""

    query: Any  # [B, T, N, H]
    key: Any  # [B, S, K, H]
    value: Any  # [B, S, K, Hv]
    bias: Any = None  # [B|1, N|1, T|1, S|1], float32 or query's dtype
    mask: Any = None  # the same extents, bool, True: visible
    scale: Any = None  # float32 [1] or [B]
    query_seq_lengths: Any = None  # int32 [B]
    key_value_seq_lengths: Any = None  # int32 [B]
    alibi_slopes: Any = None  # float32 [B|1, N]
    sinks: Any = None  # float32 [B|1, N]
    dropout_seeds: Any = None  # uint32 [B, N, 2]
    query_segment_ids: Any = None  # int32 [B, T]
    key_value_segment_ids: Any = None  # int32 [B, S]
    spans: Any = None  # int32 [B, R, 2]: positions [begin, end) that see each other
    cu_seqlens_q: Any = None  # int32 [B, sequences + 1], of packed sequences
    cu_seqlens_k: Any = None  # the same


def normalise(
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
) -> tuple[Options, Operands, bool]:
    """Checks a call of `attention`: its Options, its Operands and whether it had no batch."""
    flags = dict(
        is_causal=is_causal,
        return_residual=return_residual,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    for name, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name} must be a bool, got {kind(flag)}.")
    implementation = choice("implementation", implementation, IMPLEMENTATIONS)
    causal_alignment = choice("causal_alignment", causal_alignment, ALIGNMENTS)
    left, right = window(local_window_size)
    if is_causal:
        right = 0 if right is None else min(right, 0)

    query, key, value, unbatched = query_key_value(query, key, value)
    batch, q_len, heads, head_dim = query.shape
    k_len = key.shape[1]
    scores = (batch, heads, q_len, k_len)
    static_scale, scale = split_scale(scale, head_dim)
    dropout_steps, seeds = dropout(dropout_rate, dropout_key, batch, heads)
    query_ids, key_ids = segment_ids(
        query_segment_ids, key_value_segment_ids, (batch, q_len, k_len), unbatched
    )
    spans = bidirectional(prefix_lengths, bidirectional_spans, batch, unbatched, is_causal)
    num_sink_tokens = count("num_sink_tokens", num_sink_tokens)
    if num_sink_tokens and query_ids is not None:
        raise ValueError(
            "num_sink_tokens counts the first keys of the whole sequence and does not combine with "
            "query_segment_ids and key_value_segment_ids; give each document a batch entry of its "
            "own."
        )
    operands = Operands(
        query,
        key,
        value,
        score_operand("bias", bias, scores, query.dtype),
        score_operand("mask", mask, scores, query.dtype),
        scale,
        lengths("query_seq_lengths", query_seq_lengths, batch, unbatched),
        lengths("key_value_seq_lengths", key_value_seq_lengths, batch, unbatched),
        per_head("alibi_slopes", alibi_slopes, batch, heads, unbatched),
        per_head("sinks", sinks, batch, heads, unbatched),
        seeds,
        query_ids,
        key_ids,
        spans,
    )
    options = Options(
        scale=static_scale,
        window_left=left,
        window_right=right,
        bottom_right=causal_alignment == "bottom_right",
        soft_cap=soft_cap(logits_soft_cap),
        # Beside no window on the left it changes nothing, and shall cost nothing.
        num_sink_tokens=0 if left is None else num_sink_tokens,
        dropout_steps=dropout_steps,
        deterministic=bool(deterministic),
        implementation=implementation,
        # jax_debug_infs looks at everything that leaves a jitted computation, residuals included:
        # it may only meet an infinity that the caller asked for.
        finite_lse=debug_infs() and not (return_lse or return_residual),
    )
    return options, operands, unbatched


def debug_infs() -> bool:
    return bool(jax.config.jax_debug_infs)  # pyright: ignore[reportAttributeAccessIssue]


def dropout(rate, key, batch: int, heads: int) -> tuple[int, Any]:
    """The rate in steps, and for each entry and head of the batch the seeds of its mask."""
    rate = static_number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate!r}.")
    steps = min(round(rate * DROPOUT_STEPS), DROPOUT_STEPS - 1)
    if steps == 0:
        return 0, None
    if key is None:
        raise ValueError(f"dropout_rate={rate} needs dropout_key, a jax.random key.")
    key = array("dropout_key", key)
    is_key = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.shape != (() if is_key else (2,)) or not (is_key or key.dtype == np.uint32):
        raise TypeError(f"dropout_key must be one jax.random key, got {kind(key)}.")
    return steps, jax.random.bits(key, (batch, heads, 2), jnp.uint32)


def segment_ids(query_ids, key_ids, shape: tuple, unbatched: bool) -> tuple:
    batch, q_len, k_len = shape
    if (query_ids is None) != (key_ids is None):
        raise ValueError("query_segment_ids and key_value_segment_ids must be given together.")
    return (
        per_token("query_segment_ids", query_ids, batch, q_len, unbatched),
        per_token("key_value_segment_ids", key_ids, batch, k_len, unbatched),
    )


def cumulative(*bounds) -> list:
    """cu_seqlens_q and cu_seqlens_k as int32 [1, sequences + 1]."""
    names = ("cu_seqlens_q", "cu_seqlens_k")
    bounds = [integers(name, x) for name, x in zip(names, bounds)]
    if any(x.ndim != 1 or x.shape != bounds[0].shape or x.shape[0] == 0 for x in bounds):
        shapes = " and ".join(str(list(x.shape)) for x in bounds)
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must both be [sequences + 1]; got {shapes}."
        )
    return [x[None] for x in bounds]


def bidirectional(prefixes, spans, batch: int, unbatched: bool, is_causal) -> Any:
    """Spans int32 [B, R, 2]; a prefix is the span from position 0."""
    if not is_causal:
        for name, x in dict(prefix_lengths=prefixes, bidirectional_spans=spans).items():
            if x is not None:
                raise ValueError(f"{name} lifts causality in places and needs is_causal=True.")
    prefixes = lengths("prefix_lengths", prefixes, batch, unbatched)
    if spans is not None:
        spans = integers("bidirectional_spans", spans)
        spans = spans[None] if unbatched else spans
        if spans.ndim != 3 or spans.shape[0] != batch or spans.shape[2] != 2:
            raise ValueError(
                f"bidirectional_spans must have the shape [batch, spans, 2] (begin, end) with "
                f"batch {batch}, got {list(spans.shape)}."
            )
    if prefixes is None:
        return spans
    prefix = jnp.stack([jnp.zeros_like(prefixes), prefixes], axis=-1)[:, None]
    return prefix if spans is None else jnp.concatenate([prefix, spans], axis=1)
