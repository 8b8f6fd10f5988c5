"""Attention forward and backward in numpy: what the package is judged against, sharing no code.

s = scale q k' + bias where visible, -inf elsewhere      p = exp(s - lse),  lse = log sum exp s
o = p v                                                  0 and lse -inf for a row that sees nothing
dv = p' do     dp = do v'     ds = p (dp - sum_j p dp + dlse)
dq = scale ds k     dk = scale ds' q     dbias = ds     dscale = sum ds (q k')
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
            row = j < keys
            if left is not None:
                row = row & (j >= i + offset - left)
            if right is not None:
                row = row & (j <= i + offset + right)
            if is_causal:
                row = row & (j <= i + offset)
            visible[b, i] = row
    return visible


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
    d_out=None,
    d_lse=None,
    precision="float64",
    **visibility,
):
    """Forward, and with d_out also backward. Returns a dict of arrays in the computing type.

    out [B, T, N, Hv], lse [B, N, T]; query, key, value, bias, scale: the gradients, under the names
    of what they differentiate.
    """
    with np.errstate(over="ignore"):  # float16 intermediates of `low` may reach inf
        return _attend(query, key, value, bias, mask, scale, d_out, d_lse, precision, visibility)


def _attend(query, key, value, bias, mask, scale, d_out, d_lse, precision, visibility):
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
    if bias is not None:
        s = store(s + np.asarray(bias).astype(dtype))
    s = np.where(visible, s, dtype.type(NEGATIVE_INFINITY))

    m = s.max(axis=-1, keepdims=True, initial=NEGATIVE_INFINITY)
    seen = m != NEGATIVE_INFINITY  # true for NaN, which spreads
    e = np.exp(s - np.where(seen, m, 0))
    total = np.where(seen, e.sum(axis=-1, keepdims=True), 1)
    p = store(e / total)
    lse = np.where(seen, m + np.log(total), NEGATIVE_INFINITY)[..., 0]
    out = store(p @ v)
    result = {"out": out.swapaxes(1, 2), "lse": lse}
    if d_out is None:
        return result

    d_o = _heads_first(d_out, dtype)
    d_p = store(d_o @ v.swapaxes(-1, -2))
    delta = (d_o * out).sum(axis=-1, keepdims=True)
    if d_lse is not None:
        delta = delta - np.asarray(d_lse).astype(dtype)[..., None]
    d_s = store(p * (d_p - delta))
    d_q = store(scale * (d_s @ k))
    d_k, d_v = scale * (d_s.swapaxes(-1, -2) @ q), p.swapaxes(-1, -2) @ d_o
    grouped = (batch, kv_heads, group, k_len, -1)
    d_k, d_v = (store(x.reshape(grouped).sum(axis=2)) for x in (d_k, d_v))
    result |= {"query": d_q.swapaxes(1, 2), "key": d_k.swapaxes(1, 2), "value": d_v.swapaxes(1, 2)}
    result["scale"] = (d_s * product).sum()
    if bias is not None:
        result["bias"] = _reduce_to(d_s, np.shape(bias))
    return result
