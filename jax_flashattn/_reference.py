"""The executable definition of attention: oracle of the kernels, path of every other platform.

    s[i, j] = cap(scale * q[i].k[j]) + bias[i, j] - slope |i - j|    where i sees j, else -inf
    lse[i]  = log(exp sink + sum_j exp s[i, j])              p = exp(s - lse)
    o[i]    = sum_j keep[i, j] p[i, j] v[j]    with cap(x) = c tanh(x / c)

    dp = keep * dO v^T    delta = rowsum(dO * O) - dLSE    ds = p * (dp - delta)
    dq = scale * cap' * ds k    dk = scale * (cap' * ds)^T q    dv = (keep * p)^T dO
    dbias = ds, summed to bias's extents

keep is 0 for what dropout drops and 1 / (1 - rate) otherwise; without soft cap, bias, ALiBi, sink
and dropout each of their terms is left out.

Computed in float32 whatever the input dtype and whatever jax_enable_x64 says, one chunk of query
rows at a time: the scores of a long sequence never exist at once.

Axes: b batch, i query row, j key, k key/value head, g query head of its group, h and e head dims.
Query heads are split as n = (k g), so keys and values are never repeated.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_flashattn import _dropout
from jax_flashattn._options import Operands, Options
from jax_flashattn._visibility import key_distance, key_positions, per_batch, real_rows, visible

# Scores in one chunk: 2^25 float32 are 128 MiB, and about five such arrays live in the backward.
CHUNK_SCORES = 2**25
LOWEST = float(jnp.finfo(jnp.float32).min)

einsum = functools.partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


class Rows(NamedTuple):
    """What belongs to a chunk of query rows; None where absent or shared by all rows."""

    position: Any  # int32 [i]
    query: Any  # [b, i, k, g, h]
    bias: Any  # [b|1, k|1, g|1, i, j|1]
    mask: Any  # the same
    out: Any = None  # [b, i, k, g, e]; from here on for the backward
    lse: Any = None  # [b, k, g, i]
    d_out: Any = None  # [b, i, k, g, e]
    d_lse: Any = None  # [b, k, g, i]


ROW_AXES = Rows(position=0, query=1, bias=3, mask=3, out=1, lse=3, d_out=1, d_lse=3)


def forward(operands: Operands, options: Options) -> list:
    """out [B, T, N, Hv] in query's dtype and lse float32 [B, N, T]."""
    query = operands.query

    def chunk_forward(rows: Rows):
        s, _ = scores(operands, options, rows)
        # Not from the maximum, which may drop a NaN on the CPU: a NaN is no empty row, and spreads.
        empty = jnp.all(s == -jnp.inf, axis=-1, keepdims=True)
        top = jnp.where(empty, 0, jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf))
        p = jnp.exp(s - top)
        total = jnp.where(empty, 1, jnp.sum(p, axis=-1, keepdims=True))
        lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
        if operands.sinks is None:
            p = p / total
        else:
            sink = jnp.where(real_rows(operands, rows.position), sinks(operands), -jnp.inf)
            with_sink = jnp.logaddexp(lse, sink)
            p = jnp.where(empty | (sink == jnp.inf), 0, p / total * jnp.exp(lse - with_sink))
            lse = with_sink
        p = p * keep(operands, options, rows)
        out = einsum("bkgij,bjke->bikge", p, keys(operands, options, rows, operands.value))
        lse = jnp.maximum(lse, LOWEST) if options.finite_lse else lse
        return out.astype(query.dtype), lse[..., 0]

    chunks = split_rows(operands)
    if chunks.position.shape[0] == 1:
        outs = add_axis(chunk_forward(take_only(chunks)))
    else:
        outs = jax.lax.map(chunk_forward, chunks)
    out, lse = join(outs[0], 1, query.shape[1]), join(outs[1], 3, query.shape[1])
    return [out.reshape(*query.shape[:3], out.shape[-1]), ungroup_heads(lse)]


def backward(operands: Operands, out, lse, d_out, d_lse, options: Options) -> list:
    """[dq, dk, dv] in the operands' dtypes, and dbias float32 where options.bias_gradient."""
    bias = group_heads(operands.bias, operands) if options.bias_gradient else None

    def chunk_backward(sums, rows: Rows):
        s, slope = scores(operands, options, rows)
        k, v = (keys(operands, options, rows, x) for x in (operands.key, operands.value))
        q, do = (queries(operands, options, rows, x) for x in (rows.query, rows.d_out))
        delta = jnp.moveaxis(jnp.sum(do * rows.out.astype(jnp.float32), axis=-1), 1, -1)
        if rows.d_lse is not None:
            delta = delta - rows.d_lse.astype(jnp.float32)
        hidden = s == -jnp.inf
        p = jnp.where(hidden, 0, jnp.exp(s - rows.lse[..., None]))
        kept = keep(operands, options, rows)
        dp = kept * einsum("bikge,bjke->bkgij", do, v)
        ds = jnp.where(hidden, 0, p * (dp - delta[..., None]))
        ds_scaled = scale(operands, options) * slope * ds
        dq = einsum("bkgij,bjkh->bikgh", ds_scaled, k).astype(rows.query.dtype)
        parts = [
            einsum("bkgij,bikgh->bjkh", ds_scaled, q),
            einsum("bkgij,bikge->bjke", kept * p, do),
        ]
        dbias_rows = None
        if bias is not None:
            dbias = sum_to(ds, bias.shape)
            if bias.shape[3] == 1:
                parts.append(dbias)
            else:
                dbias_rows = dbias
        return [a + b for a, b in zip(sums, parts)], (dq, dbias_rows)

    shapes = [operands.key.shape, operands.value.shape]
    if bias is not None and bias.shape[3] == 1:
        shapes.append(bias.shape)
    sums = [jnp.zeros(shape, jnp.float32) for shape in shapes]
    chunks = split_rows(operands, out, lse, d_out, d_lse)
    if chunks.position.shape[0] == 1:
        sums, by_row = chunk_backward(sums, take_only(chunks))
        by_row = add_axis(by_row)
    else:
        sums, by_row = jax.lax.scan(chunk_backward, sums, chunks)

    q_len = operands.query.shape[1]
    dq = join(by_row[0], 1, q_len).reshape(operands.query.shape)
    grads = [dq, sums[0].astype(operands.key.dtype), sums[1].astype(operands.value.dtype)]
    if bias is not None:
        dbias = sums[2] if by_row[1] is None else join(by_row[1], 3, q_len)
        grads.append(dbias.reshape(operands.bias.shape))
    return grads


def scores(operands: Operands, options: Options, rows: Rows) -> tuple:
    """Masked scores of a chunk, float32 [b, k, g, i, j]: the order of all done to a score.

    Also the derivative of the soft cap.
    """
    bias = group_heads(operands.bias, operands) if rows.bias is None else rows.bias
    mask = group_heads(operands.mask, operands) if rows.mask is None else rows.mask
    q, k = queries(operands, options, rows, rows.query), keys(operands, options, rows, operands.key)
    s, slope = scale(operands, options) * einsum("bikgh,bjkh->bkgij", q, k), 1
    if options.soft_cap is not None:
        t = jnp.tanh(s / options.soft_cap)
        s, slope = options.soft_cap * t, 1 - t * t
    s = s if bias is None else s + bias.astype(jnp.float32)
    if operands.alibi_slopes is not None:
        distance = jnp.abs(key_distance(operands, options, rows.position)).astype(jnp.float32)
        s = s - group_heads(operands.alibi_slopes, operands)[..., None, None] * distance
    s = s if mask is None else jnp.where(mask, s, -jnp.inf)
    return jnp.where(visible(operands, options, rows.position), s, -jnp.inf), slope


def sinks(operands: Operands):
    """[b|1, k, g, 1, 1]."""
    return group_heads(operands.sinks, operands)[..., None, None]


def keep(operands: Operands, options: Options, rows: Rows):
    """What dropout multiplies probabilities by: float32 [b, k, g, i, j], or 1."""
    if operands.dropout_seeds is None:
        return 1
    seeds = group_heads(operands.dropout_seeds, operands)[..., None, None, :]
    return _dropout.keep(seeds, rows.position[:, None], key_positions(operands), options)


def scale(operands: Operands, options: Options) -> Any:
    return options.scale if operands.scale is None else per_batch(operands.scale)


def may_hide_tokens(operands: Operands, options: Options) -> bool:
    """Whether there may be rows that see nothing and keys nobody sees; those may hold NaN."""
    given = ("query_seq_lengths", "key_value_seq_lengths", "query_segment_ids", "cu_seqlens_q")
    window = (options.window_left, options.window_right) != (None, None)
    return window or any(getattr(operands, name) is not None for name in given)


def keys(operands: Operands, options: Options, rows: Rows, x):
    """key or value in float32, with 0 for what no row of the chunk sees: 0 * NaN is not 0."""
    x = x.astype(jnp.float32)
    if not may_hide_tokens(operands, options):
        return x
    seen = jnp.any(visible(operands, options, rows.position), axis=-2)  # [b|1, 1, 1, j] or [j]
    seen = jnp.moveaxis(seen, -1, 1) if seen.ndim > 1 else seen[:, None, None]
    return jnp.where(seen, x, 0)


def queries(operands: Operands, options: Options, rows: Rows, x):
    """Rows of query or d_out in float32, 0 for those that see no key, for the same reason."""
    x = x.astype(jnp.float32)
    if not may_hide_tokens(operands, options):
        return x
    seeing = jnp.any(visible(operands, options, rows.position), axis=-1)  # [b|1, 1, 1, i] or [i]
    seeing = jnp.moveaxis(seeing, -1, 1) if seeing.ndim > 1 else seeing[:, None, None]
    return jnp.where(seeing[..., None], x, 0)


def group_heads(x, operands: Operands):
    """Splits the heads of a [b, n|1, ...] array: [b, k|1, g|1, ...]."""
    if x is None:
        return None
    heads, kv_heads = operands.query.shape[2], operands.key.shape[2]
    groups = (1, 1) if x.shape[1] == 1 else (kv_heads, heads // kv_heads)
    return x.reshape(x.shape[0], *groups, *x.shape[2:])


def ungroup_heads(x):
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def sum_to(x, shape: tuple):
    """Sums x over the axes where shape has extent 1."""
    return jnp.sum(x, axis=[a for a, extent in enumerate(shape) if extent == 1], keepdims=True)


def split_rows(operands: Operands, out=None, lse=None, d_out=None, d_lse=None) -> Rows:
    """Everything that has a row axis, in chunks along a new leading axis."""
    batch, q_len, heads, _ = operands.query.shape
    k_len, kv_heads = operands.key.shape[1:3]
    size = q_len
    if all(isinstance(extent, int) for extent in (batch, q_len, k_len)):  # not jax.export's symbols
        size = max(1, min(q_len, CHUNK_SCORES // max(1, batch * heads * k_len)))

    def by_row(x):
        return None if x is None or x.shape[2] == 1 else group_heads(x, operands)

    def grouped(x):  # [b, i, n, h] -> [b, i, k, g, h]
        return (
            None if x is None else x.reshape(*x.shape[:2], kv_heads, heads // kv_heads, x.shape[3])
        )

    whole = Rows(
        position=jnp.arange(q_len, dtype=jnp.int32),
        query=grouped(operands.query),
        bias=by_row(operands.bias),
        mask=by_row(operands.mask),
        out=grouped(out),
        lse=group_heads(lse, operands),
        d_out=grouped(d_out),
        d_lse=group_heads(d_lse, operands),
    )
    chunks = [None if x is None else split(x, a, size) for x, a in zip(whole, ROW_AXES)]
    return Rows(*chunks)


def split(x, axis: int, size: int):
    """[.., length, ..] -> [chunks, .., size, ..]; positions are continued past the end."""
    length = x.shape[axis]
    if not isinstance(size, int) or length == size:
        return x[None]
    count = max(1, -(-length // size))
    if x.ndim == 1:
        return jnp.arange(count * size, dtype=x.dtype).reshape(count, size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, count * size - length)
    x = jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def join(x, axis: int, length: int):
    """The inverse of split, without the rows that it added."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return x if x.shape[axis] == length else jax.lax.slice_in_dim(x, 0, length, axis=axis)


def take_only(chunks):
    return jax.tree.map(lambda x: x[0], chunks)


def add_axis(chunk):
    return jax.tree.map(lambda x: x[None], chunk)
