"""Attention forward and backward in numpy: what the package is judged against, sharing no code.

s = c tanh(scale q k' / c) + bias - slope |distance| where visible, -inf elsewhere
p = exp(s - lse),  lse = log(exp sink + sum exp s)       o = (keep p) v
o is 0 and lse -inf for a row that sees nothing, not even a sink
dv = (keep p)' do     dp = keep (do v')     ds = p (dp - sum_j p dp + dlse)     dt = ds tanh'
dq = scale dt k     dk = scale dt' q     dbias = ds     dscale = sum dt (q k')
dsink = -sum p_sink (sum_j p dp - dlse)
"""

import ml_dtypes
import numpy as np

NEGATIVE_INFINITY = -np.inf


def _arithmetic(precision):
    """The type to compute in, and how each intermediate is stored, for a precision by name.

    "float64" is the reference. An input dtype gives `low`: the same unfused steps with every
    intermediate rounded to that dtype (half types accumulate in float32, as a GPU does).
    """
    if precision in ("float64", "float32"):
        return np.dtype(precision), lambda x: x
    stored = np.dtype(getattr(ml_dtypes, precision, precision))
    return np.dtype(np.float32), lambda x: x.astype(stored).astype(np.float32)


def visible_keys(
    batch,
    q_len,
    k_len,
    *,
    is_causal=False,
    causal_alignment="top_left",
    local_window_size=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    num_sink_tokens=0,
    query_segment_ids=None,
    key_value_segment_ids=None,
    prefix_lengths=None,
    bidirectional_spans=None,
):
    """bool [B, T, S]: which keys each query row may see, before `mask`."""
    if local_window_size is None:
        left = right = None
    elif isinstance(local_window_size, int):
        left = right = local_window_size
    else:
        left, right = local_window_size
    j = np.arange(k_len)
    visible = np.zeros((batch, q_len, k_len), bool)
    for b in range(batch):
        rows, keys = q_len, k_len
        if query_seq_lengths is not None:
            rows = min(max(int(query_seq_lengths[b]), 0), q_len)
        if key_value_seq_lengths is not None:
            keys = min(max(int(key_value_seq_lengths[b]), 0), k_len)
        offset = keys - rows if causal_alignment == "bottom_right" else 0
        for i in range(rows):
            position = i + offset
            row = np.ones(k_len, bool)
            if left is not None:
                row = row & ((j >= position - left) | (j < num_sink_tokens))
            if right is not None:
                row = row & (j <= position + right)
            if is_causal:
                row = row & (j <= position)
            spans = [] if prefix_lengths is None else [(0, prefix_lengths[b])]
            spans += [] if bidirectional_spans is None else list(bidirectional_spans[b])
            for begin, end in spans:
                if begin <= position < end:
                    row = row | ((j >= begin) & (j < end))
            if query_segment_ids is not None:
                row = row & (key_value_segment_ids[b] == query_segment_ids[b][i])
            visible[b, i] = row & (j < keys)
    return visible


def distances(batch, q_len, k_len, *, causal_alignment="top_left", **visibility):
    """How far each key is past each row's own position: [B, T, S]."""
    offset = np.zeros(batch, int)
    if causal_alignment == "bottom_right":
        rows, keys = visibility.get("query_seq_lengths"), visibility.get("key_value_seq_lengths")
        rows = q_len if rows is None else np.clip(rows, 0, q_len)
        keys = k_len if keys is None else np.clip(keys, 0, k_len)
        offset = offset + keys - rows
    return np.arange(k_len) - np.arange(q_len)[:, None] - offset[:, None, None]


def kept(seeds, q_len, k_len, rate, first_row=0, first_key=0):
    """What dropout multiplies probabilities by, [B, N, T, S]: Philox2x32-7 in 64-bit integers."""
    steps = round(rate * 2**16)
    i, j = first_row + np.arange(q_len)[:, None], first_key + np.arange(k_len)
    seeds = np.asarray(seeds).astype(np.uint64)[:, :, None, None]
    key = seeds[..., 0]
    first = np.broadcast_to(i // 16 * 8 + i % 8, (q_len, k_len)).astype(np.uint64)
    second = (j // 32 * 8 + j % 8).astype(np.uint64) ^ seeds[..., 1]
    mask = np.uint64(2**32 - 1)
    for _ in range(7):
        product = np.uint64(0xD256D193) * first
        first, second = (product >> np.uint64(32)) ^ key ^ second, product & mask
        key = (key + np.uint64(0x9E3779B9)) & mask
    shared = (first * np.uint64(0x9E3779B9) + second & mask) >> np.uint64(24)
    place = (np.where(i % 16 < 8, 0, 8) + np.where(j % 16 < 8, 0, 16)).astype(np.uint64)
    own = np.where(j % 32 < 16, first, second) >> place & np.uint64(0xFF)
    bits = 256 * own + shared
    return np.where(bits >= steps, 1 / (1 - steps / 2**16), 0)


def _heads_first(x, dtype):
    """[B, T, N, H] -> [B, N, T, H] in the type to compute in."""
    return np.asarray(x).astype(dtype).transpose(0, 2, 1, 3)


def _reduce_to(gradient, shape):
    """Sum a [B, N, T, S] gradient over the axes along which `shape` was broadcast."""
    padded = (1,) * (4 - len(shape)) + tuple(shape)
    axes = tuple(a for a in range(4) if padded[a] == 1 and gradient.shape[a] != 1)
    return gradient.sum(axis=axes, keepdims=True).reshape(shape)


def attend(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    logits_soft_cap=None,
    alibi_slopes=None,
    sinks=None,
    dropout_rate=0.0,
    dropout_seeds=None,
    d_out=None,
    d_lse=None,
    precision="float64",
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    **visibility,
):
    """Forward, and with d_out also backward. Returns a dict of arrays in the computing type.

    With cu_seqlens_q and cu_seqlens_k, [1, sequences + 1], a call for each sequence.

    out [B, T, N, Hv], lse [B, N, T]; query, key, value, bias, scale, sinks: the gradients, under
    the names of what they differentiate.
    """

    def one(query, key, value, d_out, d_lse, origin=(0, 0)):
        return _attend(
            query, key, value, bias, mask, scale, logits_soft_cap, alibi_slopes, sinks,
            (dropout_rate, dropout_seeds, *origin), d_out, d_lse, precision, visibility,
        )  # fmt: skip

    with np.errstate(over="ignore"):  # float16 intermediates of `low` may reach inf
        if cu_seqlens_q is None:
            return one(query, key, value, d_out, d_lse)
        return _by_sequence(one, query, key, value, d_out, d_lse, cu_seqlens_q[0], cu_seqlens_k[0])


def _by_sequence(one, query, key, value, d_out, d_lse, cu_q, cu_k):
    """What one() gives for each sequence, put together; nothing for what belongs to none."""
    nothing = one(query[:, :0], key[:, :0], value[:, :0], *(
        None if x is None else x.take([], axis) for x, axis in ((d_out, 1), (d_lse, 2))
    ))  # fmt: skip
    tokens = {"out": query, "query": query, "key": key, "value": value}
    axes = dict.fromkeys(tokens, 1) | {"lse": 2}
    result = {}
    for name, x in nothing.items():
        shape = list(x.shape)
        if name in axes:
            shape[axes[name]] = tokens.get(name, query).shape[1]
        result[name] = np.full(shape, NEGATIVE_INFINITY if name == "lse" else 0, x.dtype)
    for n in range(len(cu_q) - 1):
        i, j = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        part = one(
            query[:, i], key[:, j], value[:, j], None if d_out is None else d_out[:, i],
            None if d_lse is None else d_lse[:, :, i], (cu_q[n], cu_k[n]),
        )  # fmt: skip
        for name, x in part.items():
            if name == "lse":
                result[name][:, :, i] = x
            elif name in tokens:
                result[name][:, i if tokens[name] is query else j] = x
            else:
                result[name] = result[name] + x
    return result


def _attend(
    query, key, value, bias, mask, scale, cap, slopes, sinks, dropout, d_out, d_lse, precision,
    visibility,
):  # fmt: skip
    dtype, store = _arithmetic(precision)
    q, k, v = (_heads_first(x, dtype) for x in (query, key, value))
    batch, heads, q_len, head_dim = q.shape
    kv_heads, k_len = k.shape[1:3]
    group = heads // kv_heads
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scale = dtype.type(1 / np.sqrt(head_dim) if scale is None else scale)

    visible = visible_keys(batch, q_len, k_len, **visibility)[:, None]
    if mask is not None:
        visible = visible & np.asarray(mask)
    product = store(q @ k.swapaxes(-1, -2))
    s = store(scale * product)
    steepness = dtype.type(1)
    if cap is not None:
        t = store(np.tanh(s / dtype.type(cap)))
        s, steepness = store(dtype.type(cap) * t), store(1 - t * t)
    if bias is not None:
        s = store(s + np.asarray(bias).astype(dtype))
    if slopes is not None:
        distance = np.abs(distances(batch, q_len, k_len, **visibility))[:, None].astype(dtype)
        s = s - np.asarray(slopes).astype(dtype).reshape(-1, heads, 1, 1) * distance
    s = np.where(visible, s, dtype.type(NEGATIVE_INFINITY))

    m = s.max(axis=-1, keepdims=True, initial=NEGATIVE_INFINITY)
    seen = m != NEGATIVE_INFINITY  # true for NaN, which spreads
    e = np.exp(s - np.where(seen, m, 0))
    total = np.where(seen, e.sum(axis=-1, keepdims=True), 1)
    p = store(e / total)
    lse = np.where(seen, m + np.log(total), NEGATIVE_INFINITY)[..., 0]
    if sinks is not None:
        rows = visibility.get("query_seq_lengths")
        rows = np.full(batch, q_len) if rows is None else np.asarray(rows)
        real = np.arange(q_len) < rows[:, None, None]
        sink = np.asarray(sinks).astype(dtype).reshape(-1, heads, 1)
        of_keys, lse = lse, np.where(real, np.logaddexp(lse, sink), NEGATIVE_INFINITY)
        share = np.exp(of_keys - np.where(np.isfinite(lse), lse, np.inf))
        p = store(p * share[..., None])
    keep = dtype.type(1)
    if dropout[0] > 0:
        rate, seeds, *origin = dropout
        keep = kept(seeds, q_len, k_len, rate, *origin).astype(dtype)
    out = store(store(keep * p) @ v)
    result = {"out": out.swapaxes(1, 2), "lse": lse}
    if d_out is None:
        return result

    d_o = _heads_first(d_out, dtype)
    d_p = store(keep * (d_o @ v.swapaxes(-1, -2)))
    delta = (d_o * out).sum(axis=-1, keepdims=True)
    if d_lse is not None:
        delta = delta - np.asarray(d_lse).astype(dtype)[..., None]
    d_s = store(p * (d_p - delta))
    d_t = store(steepness * d_s)
    d_q = store(scale * (d_t @ k))
    d_k, d_v = scale * (d_t.swapaxes(-1, -2) @ q), store(keep * p).swapaxes(-1, -2) @ d_o
    grouped = (batch, kv_heads, group, k_len)
    d_k, d_v = (store(x.reshape(*grouped, x.shape[-1]).sum(axis=2)) for x in (d_k, d_v))
    result |= {"query": d_q.swapaxes(1, 2), "key": d_k.swapaxes(1, 2), "value": d_v.swapaxes(1, 2)}
    result["scale"] = (d_t * product).sum()
    if sinks is not None:
        at_infinity = np.isinf(lse)
        share = np.where(at_infinity, lse > 0, np.exp(sink - np.where(at_infinity, 0, lse)))
        terms, axis = share * delta[..., 0], (0, 2) if np.ndim(sinks) == 1 else 2
        result["sinks"] = -terms.sum(axis=axis)
        # The sum of what each term is made of: delta may cancel.
        sizes = np.abs(delta[..., 0]) + np.sqrt(np.square(d_o * out).sum(axis=-1))
        sizes = sizes if d_lse is None else sizes + np.abs(np.asarray(d_lse))
        result["sinks of absolute terms"] = (share * sizes).sum(axis=axis)
    if bias is not None:
        result["bias"] = _reduce_to(d_s, np.shape(bias))
    return result
