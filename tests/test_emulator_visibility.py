"""Who sees whom beyond windows, on the emulator: ragged batches, garbage, isolation, mutants."""

import dataclasses

import numpy as np
import pytest
from cases import CASES, INTEGERS, PACKED, Case, packed
from emulator import kernels
from emulator.emulator import why_unavailable
from oracle import visible_keys
from test_emulator import check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

# Family, head dim, and whether dQ is summed in order: each kernel that looks at who sees whom.
ROUTES = {
    "sm80": ("sm80", 32, False),
    "sm80-deterministic": ("sm80", 32, True),
    "sm90": ("sm90", 64, False),
    "sm90-deterministic": ("sm90", 64, True),
    "sm90-wide": ("sm90", 192, True),
}
every_route = pytest.mark.parametrize("route", ROUTES)


def on_route(case, route):
    """The case with the route's head dim, and the route's arguments of kernels.run()."""
    family, dim, deterministic = ROUTES[route]
    case = dataclasses.replace(case, head_dim=dim, value_dim=dim)
    return case, {"family": family, "deterministic": deterministic, "multiprocessors": 2}


def ragged(seed):
    """A batch of random sequences, of which some are empty on one side or both."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 9))
    pairs = rng.integers(0, (70, 90), (count, 2)) * (rng.random((count, 2)) < 0.8)
    if rng.random() < 0.5:
        pairs[:, 1] = pairs[:, 0]
    first = rng.integers(0, 20, 2) * (rng.random() < 0.5)
    options = [{}, {"is_causal": True}, {"local_window_size": (13, 5)}][rng.integers(3)]
    options = options | {"causal_alignment": ("top_left", "bottom_right")[rng.integers(2)]}
    total = pairs.sum(axis=0) + first + rng.integers(0, 20, 2)
    q_len, k_len = (int(max(1, n)) for n in total)
    sequences = packed(*pairs.tolist(), first=first.tolist(), **options)
    heads = {"heads": 2, "kv_heads": int(rng.integers(1, 3))}
    return Case(f"ragged-{seed}", q_len, k_len, batch=1, **heads, options=sequences)


@every_route
@pytest.mark.parametrize("seed", range(6))
def test_ragged(seed, route):
    case, options = on_route(ragged(seed), route)
    check(case, "bfloat16", seed=seed, **options)


# Lengths in queries and in keys that have hung or overrun elsewhere: around tiles, few keys for
# many rows, and whole tiles of rows without a key, one, two or three in a row.
LENGTHS = {
    "around-tiles": ([0, 1, 127, 128, 129, 0, 60], [0, 1, 127, 128, 129, 0, 60]),
    "few-keys": ([76, 34, 146], [1, 1, 1]),
    "no-side": ([0, 10, 0, 20, 0, 30], [5, 0, 0, 7, 9, 0]),
    "empty-tiles-first": ([130, 130, 130, 130], [0, 0, 0, 130]),
    "empty-tile-between": ([130, 260, 130], [130, 0, 130]),
    "more-keys": ([129], [463]),
    # Tiles of a sequence, of which the last has fewer: the order of work counts on neither.
    "two-tiles-and-more": ([290, 300], [290, 300]),
    "more-than-are-copied": ([20, 0] * 3 + [0, 1] * 600, [20, 0] * 3 + [1, 0] * 600),
    "long-keys": ([130, 0, 700, 60], [500, 1, 300, 3600]),
}


def of_lengths(name, **fields):
    q, k = LENGTHS[name]
    options = packed(*zip(q, k, strict=True), is_causal=True, causal_alignment="bottom_right")
    return Case(name, sum(q), sum(k), batch=1, options=options, **fields)


@every_route
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths, route):
    case, options = on_route(of_lengths(lengths), route)
    check(case, "bfloat16", **options)


WITH_SINKS = {"sinks": (2,)}  # the Hopper family then reads a table, however long they are


@pytest.mark.parametrize("route", ["sm90", "sm90-wide"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_by_the_table(lengths, route):
    case, options = on_route(of_lengths(lengths, **WITH_SINKS), route)
    for backward in (False, True):
        assert "as a table" in kernels.schedule(case, "bfloat16", backward=backward)
    check(case, "bfloat16", **options)


def garbage(kind, rng):
    """Options whose integers were never meant."""
    low, high = -(2**31), 2**31 - 1
    anything = rng.choice([low, high, -1, 0, 1, 50, 130, 129, 2**29, -(2**29)], 64)

    def numbers(*shape):
        near = rng.integers(-20, 160, shape)
        return np.where(rng.random(shape) < 0.5, near, np.resize(anything, shape)).tolist()

    alignment = {"causal_alignment": ("top_left", "bottom_right")[rng.integers(2)]}
    if kind == "packed":
        return dict(zip(PACKED, (numbers(9), numbers(9)), strict=True)) | alignment
    if kind == "spans":
        return {"is_causal": True, "bidirectional_spans": numbers(1, 5, 2)} | alignment
    return {"query_segment_ids": numbers(1, 130), "key_value_segment_ids": numbers(1, 140)}


@every_route
@pytest.mark.parametrize("kind", ["packed", "spans", "segments"])
def test_garbage_is_safe(kind, route):
    for seed in range(4):
        options = garbage(kind, np.random.default_rng(seed))
        case = Case(f"garbage-{seed}", 130, 140, batch=1, heads=1, options=options)
        case, route_options = on_route(case, route)
        if kind == "packed":
            kernels.run(case, "bfloat16", seed=seed, **route_options)
        else:  # any int32 means something
            check(case, "bfloat16", seed=seed, **route_options)


@dataclasses.dataclass(frozen=True)
class Poisoned(Case):
    """NaN in tokens that see nothing and that nobody sees."""

    def _alone(self):
        """Indices of such rows and of such keys."""
        if "cu_seqlens_q" in self.options:
            i, j = np.arange(self.q_len), np.arange(self.k_len)
            cu_q, cu_k = (self.options[name] for name in PACKED)
            belongs = [np.digitize(x, cu) for x, cu in ((i, cu_q), (j, cu_k))]
            n = len(cu_q)
            sees = (belongs[0][:, None] == belongs[1]) & (belongs[1] > 0) & (belongs[1] < n)
        else:
            options = {n: np.asarray(x) if n in INTEGERS else x for n, x in self.options.items()}
            sees = visible_keys(1, self.q_len, self.k_len, **options)[0]
        return ~sees.any(axis=1), ~sees.any(axis=0)

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        rows, keys = self._alone()
        assert keys.any()
        arrays["query"][:, rows] = np.nan
        arrays["key"][:, keys] = arrays["value"][:, keys] = np.nan
        return arrays

    def cotangents(self, dtype):
        d_out, d_lse = super().cotangents(dtype)
        rows, _ = self._alone()
        d_out[:, rows] = np.nan
        d_lse[:, :, rows] = np.nan
        return d_out, d_lse


def islands(tokens, stranger):
    """Ids in runs, and among them single tokens with one that the other side lacks."""
    ids = np.arange(tokens) // 23
    return (tuple(np.where(np.arange(tokens) % 9 == 4, stranger, ids).tolist()),)


ALONE = {
    "packed": packed((30, 40), (9, 0), (0, 5), (60, 70), first=(11, 7)),
    "segments": {
        "query_segment_ids": islands(130, 77), "key_value_segment_ids": islands(300, 88),
    },
    "sink-tokens": {
        "is_causal": True, "causal_alignment": "bottom_right", "local_window_size": (9, None),
        "num_sink_tokens": 5,
    },
}  # fmt: skip


# The same behind so many tokens that a warp looks for them in a second round.
FAR = {
    "keys": (120, 2150, packed((60, 2100), (0, 20), (60, 30))),
    "rows": (2150, 125, packed((2100, 60), (20, 0), (0, 5), (30, 60))),
}


def run_poisoned(kind, route, **options):
    """Both runs' results in float32: with NaN where nobody looks, and without."""
    q_len, k_len, who = FAR[kind] if kind in FAR else (130, 300, ALONE[kind])
    for of in (Poisoned, Case):
        case, more = on_route(of("alone", q_len, k_len, batch=1, options=who), route)
        results = kernels.run(case, "bfloat16", **more, **options)
        yield {name: x.astype(np.float32) for name, x in results.items()}


@every_route
@pytest.mark.parametrize("kind", ALONE)
def test_what_nobody_sees_does_not_leak(kind, route):
    actual, desired = run_poisoned(kind, route)
    for name, x in desired.items():
        assert x.any(), name
        if route == "sm80" or (route == "sm90" and name == "query"):  # dQ adds in any order
            np.testing.assert_allclose(actual[name], x, rtol=0.1, atol=0.02, err_msg=name)
        else:
            np.testing.assert_array_equal(actual[name], x, err_msg=name)


@pytest.mark.parametrize("route", ["sm90", "sm90-deterministic"])
@pytest.mark.parametrize("kind", FAR)
def test_what_nobody_sees_far_away_does_not_leak(kind, route):
    test_what_nobody_sees_does_not_leak(kind, route)


# A file below csrc, what to replace in it, by what; the route and the case that must notice.
MUTANTS = {
    "sequence-begins-late": (
        "common/visibility.cuh",
        "(*this)[middle] <= x", "(*this)[middle] < x", "sm90-deterministic", "packed-cross"),
    "begins-not-awaited": (
        "common/visibility.cuh", "if (p.visibility.cu_q != nullptr) barrier();", "",
        "sm90-deterministic",
        "packed-cross"),
    "too-many-begins-copied": (
        "common/visibility.cuh", "copied_(count_ <= kCopiedBegins)", "copied_(true)",
        "sm90-deterministic", "more-than-are-copied"),
    "offset-of-the-next-sequence": (
        "common/visibility.cuh",
        "begin_of(others, n + v.bottom_right)", "begin_of(others, n + 1)",
        "sm90-deterministic", "packed-cross-causal"),
    "span-as-keys-see-it": (
        "common/visibility.cuh",
        "const int back = is_row ? 0 : -sight.offset;", "const int back = 0;",
        "sm90", "spans-prefix-bottom-right"),
    "ids-not-compared": (
        "common/segments.cuh", "sight.exact = count ==", "sight.exact = true || count ==",
        "sm90", "segments-mixed"),
    "any-ids-a-run": (
        "common/segments.cuh", "return run.empty() ||", "return true ||",
        "sm90", "segments-mixed"),
    "ids-where-the-first-lane-looks": (
        "common/segments.cuh", "max_over_warp(mine ? sight.of.end : 0)",
        "int(broadcast(sight.of.end))", "sm90-deterministic", "segments-causal"),
    "tile-summary-of-one-block": (
        "common/visibility.cuh", "n < kTableTile / kTableBlock", "n < 1",
        "sm90-deterministic", "packed-cross-causal"),
    "gaps-forgotten": (
        "common/visibility.cuh", "gap |= from(gap);", "gap = 0;", "sm90-deterministic", "alone"),
    "sinks-hidden": (
        "common/scores.cuh", "col >= begin || col < sink_end", "col >= begin",
        "sm90-wide", "sink-tokens-4-of-8"),
    "sinks-seen-by-a-window": (
        "common/sequence.cuh", "is_sink(j) ? q_len : ", "", "sm90", "sink-tokens-4-of-8"),
    "rows-not-cleaned": (
        "sm90/backward_load.cuh", "return sequence.sees(row);", "return true;", "sm90", "alone"),
    "gaps-not-looked-for": (
        "common/sequence.cuh", "x < end; x += kWarpThreads * kTableTile", "x < 0; x += 1",
        "sm90", "alone"),
    "gaps-of-the-first-round": (
        "common/sequence.cuh", "x += kWarpThreads * kTableTile", "x = end",
        "sm90", "alone-far"),
    "tiles-of-the-last-sequence": (
        "sm90/work_place.cuh", "return rest + (rank - before)", "return (rank - before)",
        "sm90", "two-tiles-and-more"),
}  # fmt: skip


def run_mutant(route, name, edits):
    if name.startswith("alone"):
        kind = "rows" if name == "alone-far" else "segments"
        actual, desired = run_poisoned(kind, route, edits=edits)
        for x in desired:
            np.testing.assert_allclose(actual[x], desired[x], rtol=0.1, atol=0.02)
    else:
        case = of_lengths(name, **WITH_SINKS) if name in LENGTHS else CASES[name]
        case, options = on_route(case, route)
        check(case, "bfloat16", edits=edits, **options)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    file, old, new, route, name = MUTANTS[mutant]
    with pytest.raises(AssertionError, match=r"csrc/|off by|at other|never written|non-zeros|nan"):
        run_mutant(route, name, ((file, old, new),))
