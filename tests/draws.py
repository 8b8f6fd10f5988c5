"""Random calls of attention and of varlen_attention, each said by one number, its seed."""

import dataclasses
import itertools

import numpy as np
from cases import LENGTHS, PACKED, Case

SCORES_BY_DIM = 2**22  # at most this many batch x heads x T x S x head_dim: a fraction of a second
TILE_EDGES = (63, 64, 65, 127, 128, 129)
IDS = ("query_segment_ids", "key_value_segment_ids")


@dataclasses.dataclass(frozen=True)
class Call:
    """What one seed stands for."""

    case: Case
    dtype: str  # of the kernels; every third call of the reference is in float32
    deterministic: bool


class Dice:
    """What is drawn again and again."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def chance(self, probability):
        return self.rng.random() < probability

    def pick(self, *values):
        return values[self.rng.integers(len(values))]

    def below(self, *limits):
        """An int in [0, limit), or in [first, limit)."""
        return int(self.rng.integers(*limits))

    def length(self):
        return int(self.pick(1, self.below(2, 40), self.pick(*TILE_EDGES), self.below(1, 220)))

    def head_dim(self):
        return 8 * self.below(1, self.pick(8, 16, 32) + 1)


def draw(seed):
    """The Call of a seed, the same for every way of running it."""
    dice = Dice(seed)
    is_packed = dice.chance(0.3)
    batch, kv_heads = 1 if is_packed else dice.pick(1, 2, 3), dice.pick(1, 2, 3)
    group = dice.pick(1, 1, 2, 3, 4)
    parts = 3 if is_packed else 1
    q_len, k_len = (sum(dice.length() for _ in range(parts)) for _ in ("query", "key"))
    k_len = q_len if dice.chance(0.3) else k_len
    head_dim = dice.head_dim()
    value_dim = dice.head_dim() if dice.chance(0.25) else None
    while batch * kv_heads * group * q_len * k_len * max(head_dim, value_dim or 0) > SCORES_BY_DIM:
        if group > 1:
            group -= 1
        elif kv_heads > 1:
            kv_heads -= 1
        elif batch > 1:
            batch -= 1
        else:
            q_len, k_len = q_len // 2, k_len // 2

    heads = kv_heads * group
    options = _positions(dice, q_len, k_len)
    arrays = {}
    if is_packed:
        count = dice.pick(dice.below(2, 4), 2, 1, dice.below(3, 9), dice.below(9, 40))
        options |= packing(dice, q_len, k_len, count)
    else:
        options |= _visibility(dice, options, batch, q_len, k_len)
        arrays = _bias_and_mask(dice, (batch, heads, q_len, k_len))
    if dice.chance(0.15):
        arrays["traced_scale"] = float(dice.rng.normal()) * 0.3
    elif dice.chance(0.2):
        options["scale"] = float(dice.rng.uniform(0.01, 0.5))
    for name in ("alibi", "sinks"):
        if dice.chance(0.25):
            arrays[name] = (heads,) if is_packed else dice.pick((heads,), (batch, heads))
    if dice.chance(0.25):
        options["logits_soft_cap"] = float(dice.rng.uniform(0.3, 5))
    if dice.chance(0.25):
        options["dropout_rate"] = float(dice.pick(0.1, 0.9, dice.rng.uniform(0, 1)))
    case = Case(
        f"fuzz-{seed}", q_len, k_len, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, value_dim=value_dim, **arrays, options=options,
    )  # fmt: skip
    return Call(case, dice.pick("bfloat16", "float16"), dice.chance(0.5))


def _positions(dice, q_len, k_len):
    """Causality, alignment and a window: what packed sequences have as well."""
    limit = max(q_len, k_len)

    def side():
        return dice.pick(None, 0, dice.below(12), dice.below(limit + 1))

    made = {}
    if dice.chance(0.4):
        made["is_causal"] = True
    if dice.chance(0.4):
        made["causal_alignment"] = "bottom_right"
    if dice.chance(0.4):
        made["local_window_size"] = dice.pick(dice.below(limit), (side(), side()))
    return made


def packing(dice, q_len, k_len, count):
    """Bounds of `count` sequences of unequal lengths, some of them empty; there may be gaps."""

    def bounds(tokens):
        made = np.sort(dice.rng.integers(0, tokens + 1, count + 1))
        if dice.chance(0.5):
            made[0], made[-1] = 0, tokens
        empty = np.flatnonzero(dice.rng.random(count) < dice.pick(0, 0.4))
        for n in empty:  # ends where it begins, but the first begins where it ends
            made[n + 1 if n else 0] = made[n if n else 1]
        return tuple(np.maximum.accumulate(made).tolist())

    made = {PACKED[0]: bounds(q_len), PACKED[1]: bounds(k_len)}
    if q_len == k_len and dice.chance(0.5):
        made[PACKED[1]] = made[PACKED[0]]
    return made


def _bias_and_mask(dice, full):
    def broadcast_shape():
        shape = tuple(extent if dice.chance(0.6) else 1 for extent in full)
        return shape[dice.below(5) :] if dice.chance(0.3) else shape

    made = {"bias_dtype": dice.pick("float32", None)}
    if dice.chance(0.35):
        made["bias"] = broadcast_shape()
    if dice.chance(0.25):
        made["mask"] = broadcast_shape()
    return made


def _visibility(dice, options, batch, q_len, k_len):
    """Lengths, prefixes, spans, and ids of segments or sink tokens, with what each needs."""
    rng, made = dice.rng, {}

    def positions(*shape):  # a few of them outside
        return rng.integers(-2, k_len + 3, shape)

    for name, extent in zip(LENGTHS, (q_len, k_len), strict=True):
        if dice.chance(0.35):  # 0, the full extent, and outside of the range where it is clamped
            ends = (0, extent, extent + 3, -1)
            inside = rng.integers(0, extent + 1, batch).tolist()
            made[name] = tuple(dice.pick(*ends) if dice.chance(0.3) else n for n in inside)
    if dice.chance(0.25):
        made |= {"is_causal": True, "prefix_lengths": tuple(positions(batch).tolist())}
    if dice.chance(0.25):
        spans = positions(batch, dice.below(1, 4), 2)
        spans = np.sort(spans, axis=-1) if dice.chance(0.9) else spans
        spans = tuple(tuple(map(tuple, entry)) for entry in spans.tolist())
        made |= {"is_causal": True, "bidirectional_spans": spans}
    kind = rng.random()
    if kind < 0.25:
        left = dice.below(20)
        window = options.get("local_window_size", (left, None))
        window = window if isinstance(window, tuple) else (window, window)
        made["local_window_size"] = (left if window[0] is None else window[0], window[1])
        made["num_sink_tokens"] = dice.below(1, dice.pick(6, k_len + 9))
    elif kind < 0.5:
        count = dice.below(1, 6)
        ids = [rng.integers(0, count, (batch, length)) for length in (q_len, k_len)]
        if dice.chance(0.6):  # in runs
            ids = [np.sort(x, axis=1) for x in ids]
            if dice.chance(0.5) and q_len == k_len:
                ids[1] = ids[0]
        made |= {name: tuple(map(tuple, x.tolist())) for name, x in zip(IDS, ids, strict=True)}
    return made


def features(call):
    """What a call uses, as a set of names."""
    case, options = call.case, call.case.options
    window = options.get("local_window_size")
    left, right = window if isinstance(window, tuple) else (window, window)
    ids = [options.get(name) for name in IDS]
    mixed = any((np.diff(x) < 0).any() for x in ids if x is not None)
    bounds = [options.get(name, (0, extent)) for name, extent in
              zip(PACKED, (case.q_len, case.k_len), strict=True)]  # fmt: skip
    is_packed = PACKED[0] in options
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(*map(itertools.pairwise, bounds))]
    found = {
        call.dtype: True,
        "deterministic": call.deterministic,
        "causal": "is_causal" in options,
        "bottom_right": "causal_alignment" in options,
        "window on the left": left is not None,
        "window on the right": right is not None,
        "query lengths": LENGTHS[0] in options,
        "key lengths": LENGTHS[1] in options,
        "bias": case.bias is not None,
        "mask": case.mask is not None,
        "traced scale": case.traced_scale is not None,
        "static scale": "scale" in options,
        "cap": "logits_soft_cap" in options,
        "alibi": case.alibi is not None,
        "sinks": case.sinks is not None,
        "dropout": "dropout_rate" in options,
        "prefix": "prefix_lengths" in options,
        "spans": "bidirectional_spans" in options,
        "sink tokens": "num_sink_tokens" in options,
        "segments in runs": ids[0] is not None and not mixed,
        "segments, mixed": mixed,
        "packed": is_packed,
        "packed, no queries": is_packed and any(q == 0 < k for q, k in lengths),
        "packed, no keys": is_packed and any(k == 0 < q for q, k in lengths),
        "packed, unequal lengths": any(0 < q != k > 0 for q, k in lengths) and is_packed,
        "packed, rows outside": bounds[0][-1] - bounds[0][0] < case.q_len,
        "packed, keys outside": bounds[1][-1] - bounds[1][0] < case.k_len,
        "packed, long": is_packed and case.q_len > 64 * len(lengths),
        "grouped heads": case.heads > case.kv_heads,
        "value_dim": case.value_dim not in (None, case.head_dim),
        "more queries": case.q_len > case.k_len,
        "more keys": case.q_len < case.k_len,
        "several tiles of queries": case.q_len > 128,
        "several tiles of keys": case.k_len > 64,
    }
    return {name for name, is_used in found.items() if is_used}


def arguments(call):
    """Names of the arguments of attention or varlen_attention that a call uses, but for operands.

    Those that every call of run() in compare.py has are not among them.
    """
    case = call.case
    arrays = {
        "bias": case.bias,
        "mask": case.mask,
        "scale": case.traced_scale,
        "alibi_slopes": case.alibi,
        "sinks": case.sinks,
        "deterministic": call.deterministic or None,
        "dropout_key": case.options.get("dropout_rate"),
    }
    return {*case.options, *(name for name, x in arrays.items() if x is not None)}
