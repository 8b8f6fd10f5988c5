"""Which row sees which key: the reference's causality, windows, lengths, segments, spans, packing.

Axes as in `_reference`: b batch, i query row, j key.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jax_flashattn._options import Operands, Options


def visible(operands: Operands, options: Options, position):
    """Which row sees which key, but for mask: bool [b|1, 1, 1, i, j]."""
    i, j = position[:, None], key_positions(operands)
    distance = key_distance(operands, options, position)
    near = True
    if options.window_left is not None:
        near = (distance >= -options.window_left) | (j < options.num_sink_tokens)
    if options.window_right is not None:
        near = near & (distance <= options.window_right)
    if operands.spans is not None:
        begin, end = jnp.moveaxis(operands.spans, -1, 0)[..., None, None, None, None]
        row = j - distance  # the row's position among the keys, [i, j] or [b, 1 (span), 1, 1, i, j]
        row = row if row.ndim == 2 else row[:, None]
        together = (begin <= row) & (row < end) & (begin <= j) & (j < end)
        near = near | jnp.any(together, axis=1)
    sees = (i < query_lengths(operands)) & (j < key_lengths(operands)) & near
    if operands.query_segment_ids is not None:
        ids = jnp.take(operands.query_segment_ids, position, axis=1, mode="clip")
        sees = sees & per_pair(ids[:, :, None] == operands.key_value_segment_ids[:, None])
    if operands.cu_seqlens_q is not None:
        q_sequence = sequence_of(operands.cu_seqlens_q, position)
        k_sequence = sequence_of(operands.cu_seqlens_k, key_positions(operands))
        sees = sees & per_pair(
            (q_sequence[:, :, None] == k_sequence[:, None]) & (q_sequence >= 0)[:, :, None]
        )
    return sees


def key_distance(operands: Operands, options: Options, position):
    """How far a key is past the row's own position: int32 [b|1, 1, 1, i, j] or [i, j]."""
    i, j = position[:, None], key_positions(operands)
    if operands.cu_seqlens_q is None:
        offset = key_lengths(operands) - query_lengths(operands) if options.bottom_right else 0
        return j - i - offset
    cu_q, cu_k = operands.cu_seqlens_q, operands.cu_seqlens_k
    n = jnp.maximum(sequence_of(cu_q, position), 0) + options.bottom_right
    first = jnp.take_along_axis(cu_k, n, axis=1) - jnp.take_along_axis(cu_q, n, axis=1)
    return j - i - per_pair(first[:, :, None])


def sequence_of(cu_seqlens, position):
    """Which packed sequence a token belongs to, int32 [b, i]; -1: to none."""
    n = jax.vmap(functools.partial(jnp.searchsorted, side="right"), (0, None))(cu_seqlens, position)
    return jnp.where(n == cu_seqlens.shape[1], 0, n).astype(jnp.int32) - 1


def real_rows(operands: Operands, position):
    """Which rows are no padding, bool, to be broadcast to [b, k, g, i, 1]."""
    real = position[:, None] < query_lengths(operands)
    if operands.cu_seqlens_q is None:
        return real
    return real & per_pair((sequence_of(operands.cu_seqlens_q, position) >= 0)[:, :, None])


def per_pair(x):
    """[b, i|1, j|1] -> [b, 1, 1, i|1, j|1]."""
    return x[:, None, None]


def query_lengths(operands: Operands):
    """int, or int32 [b, 1, 1, 1, 1] clamped to [0, T]."""
    lengths, extent = operands.query_seq_lengths, operands.query.shape[1]
    return extent if lengths is None else per_batch(jnp.clip(lengths, 0, extent))


def key_lengths(operands: Operands):
    """int, or int32 [b, 1, 1, 1, 1] clamped to [0, S]."""
    lengths, extent = operands.key_value_seq_lengths, operands.key.shape[1]
    return extent if lengths is None else per_batch(jnp.clip(lengths, 0, extent))


def key_positions(operands: Operands):
    return jnp.arange(operands.key.shape[1], dtype=jnp.int32)


def per_batch(x):
    return x.reshape(x.shape[0], 1, 1, 1, 1)
