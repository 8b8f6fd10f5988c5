"""Calls of attention without a rounding error: emulator, GPU and float64 must agree bit for bit.

Scores are integers in units of log 2, and the terms of each row sum to a power of two:

    scale = ln 2     so that the kernels' factor scale * log2(e) rounds to 1 in float32
    q, k             small integers: the score s = q.k is exact, and so are 2^(s - m) and their sums
    sum = 2^n        so that p = 2^(s - n) is a power of two, which 16 bits hold
    v                small integers: o is exact in float32, and rounded once
    bias             0 or ln 2, and q.k >= 0: times log2(e) it is 1 - 1e-8, and must not cancel
    d_out            one +-1 in a row, in a column where o is a multiple of 1/32
    d_lse            -1, 0 or 1: dp - delta has eight bits, so that ds = p (dp - delta) is exact in
                     16 bits, even where p, from an lse stored in natural units, is off by its last

The kernels' roundings are those of the results alone: of out and dv once, of dq and dk after their
product with scale. solve() works all of it out in float64 and checks every claim made here, with
sums in any order.
"""

import dataclasses

import numpy as np
from ways import Call, visible

SCALE = float(np.log(2))
COARSE = 32  # d_out looks at outputs that are multiples of 1/32
POOL = 20_000  # candidates for a row of q


def exact(case, dtype):
    """A Call with the sizes and options of a Case, and inputs as above."""
    rng = np.random.default_rng(len(case.name))
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    call = Call(**fields | {"options": case.options | {"scale": SCALE}})
    arrays, lowest = call.arrays(dtype), -1 if case.bias is None else 0

    def integers(like, low, high):
        return rng.integers(low, high + 1, like.shape).astype(like.dtype)

    call = call.on(
        key=integers(arrays["key"], lowest, 1),
        value=integers(arrays["value"], -2, 2),
        bias=None if case.bias is None else np.float32(SCALE) * integers(arrays["bias"], 0, 1),
    )
    call = call.on(query=_query(call, dtype, rng, lowest).astype(arrays["query"].dtype))
    d_out, d_lse = call.cotangents(dtype)
    out = _forward(call, dtype)[-1].swapaxes(1, 2)
    return call.on(d_out=_d_out(out, rng).astype(d_out.dtype), d_lse=integers(d_lse, -1, 1))


def _query(call, dtype, rng, lowest):
    """For each row a few ones with which its terms sum to a power of two: [B, T, N, H]."""
    sees, arrays = visible(call), call.arrays(dtype)
    key, bias = _heads_first(arrays["key"]), _bias(arrays, sees.shape)
    group, head_dim = sees.shape[1] // key.shape[1], key.shape[-1]
    pool = np.zeros((POOL, head_dim))
    for column in rng.integers(0, head_dim, (6, POOL)):
        pool[np.arange(POOL), column] = rng.integers(lowest, 2, POOL)
    query = np.zeros((*sees.shape[:3], head_dim))
    for b, h in np.ndindex(*sees.shape[:2]):
        terms = np.exp2(pool @ key[b, h // group].T)  # [POOL, S]
        totals = terms @ np.where(sees[b, h], np.exp2(bias[b, h]), 0).T  # [POOL, T]
        for i in np.flatnonzero(sees[b, h].any(axis=-1)):
            query[b, h, i] = pool[rng.choice(np.flatnonzero(_is_power(totals[:, i])))]
    return query.swapaxes(1, 2)


def _d_out(out, rng):
    coarse = out * COARSE == np.rint(out * COARSE)
    column = np.where(coarse, rng.random(out.shape), -1).argmax(axis=-1, keepdims=True)
    chosen = (np.arange(out.shape[-1]) == column) & coarse
    return np.where(chosen, rng.choice([-1, 1], (*out.shape[:3], 1)), 0)


def solve(call, dtype):
    """What the kernels must return, bit for bit, but for lse and the gradient of bias: float64."""
    q, k, v, p, lse, out = _forward(call, dtype)
    arrays, (d_out, d_lse) = call.arrays(dtype), call.cotangents(dtype)
    stored, d_o = arrays["query"].dtype, _heads_first(d_out)
    delta = (d_o * _held(np.where(d_o == 0, 0, out), stored)).sum(axis=-1) - d_lse
    d_s = _held(p * (_product(d_o, v.swapaxes(-1, -2)) - delta[..., None]), stored)
    heads = (len(q), call.kv_heads or call.heads, -1)

    def over_rows(left, right):
        """left' right, one sum over the rows of all heads of a group."""
        left, right = (x.reshape(*heads, x.shape[-1]) for x in (left, right))
        return _product(left.swapaxes(-1, -2), right)

    results = {"out": out.swapaxes(1, 2).astype(stored), "lse": lse}
    sums = {"query": _product(d_s, k), "key": over_rows(d_s, q), "value": over_rows(p, d_o)}
    for name, x in sums.items():
        x = np.float32(_held(x, np.float32)) * np.float32(1 if name == "value" else SCALE)
        results[name] = x.swapaxes(1, 2).astype(stored)
    if call.bias is not None:
        shape = arrays["bias"].shape
        axes = tuple(n for n, extent in enumerate((1,) * (4 - len(shape)) + shape) if extent == 1)
        results["bias"] = d_s.sum(axis=axes, keepdims=True).reshape(shape)
    return results


def _forward(call, dtype):
    """q, k and v of each head, probabilities, lse and output: [B, N, ...], none rounded."""
    sees, arrays = visible(call), call.arrays(dtype)
    q, k, v = (_heads_first(arrays[name]) for name in ("query", "key", "value"))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = np.where(sees, _product(q, k.swapaxes(-1, -2)) + _bias(arrays, sees.shape), -np.inf)
    total = np.exp2(s).sum(axis=-1, keepdims=True)
    if not (_is_power(total) | (total == 0)).all():
        raise ValueError("the terms of a row do not sum to a power of two")
    p = _held(np.exp2(s) / np.where(total == 0, 1, total), arrays["query"].dtype)
    with np.errstate(divide="ignore"):
        return q, k, v, p, np.log(total[..., 0]), _product(p, v)


def _bias(arrays, shape):
    """In units of log 2."""
    return np.broadcast_to(np.rint(arrays.get("bias", 0) / np.float32(SCALE)), shape)


def _heads_first(x):
    return np.asarray(x).astype(np.float64).swapaxes(1, 2)


def _is_power(x):
    return np.frexp(x)[0] == 0.5


def _product(a, b):
    """a @ b, if float32 holds every partial sum in whatever order."""
    if ((np.abs(a) @ np.abs(b)).max() / (_unit(a) * _unit(b))) >= 2**24:
        raise ValueError("a sum may round in float32")
    return a @ b


def _unit(x):
    """The largest power of two, up to 1, of which all elements are multiples."""
    integers = (x * 2.0**40).astype(np.int64)
    bits = int(np.bitwise_or.reduce(integers, axis=None)) | 2**40
    if (integers != x * 2.0**40).any():
        raise ValueError("an element is no multiple of 2^-40")
    return (bits & -bits) / 2.0**40


def _held(x, dtype):
    """x, if the dtype holds it exactly."""
    if (x.astype(dtype).astype(np.float64) != x).any():
        raise ValueError(f"{dtype} does not hold a value")
    return x
