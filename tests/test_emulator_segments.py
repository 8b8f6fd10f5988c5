"""Runs of segment ids on the emulator: where they are looked for by warps, in blocks of ids."""

import numpy as np
import pytest
from cases import Case
from emulator.emulator import why_unavailable
from test_emulator import check
from test_emulator_visibility import on_route

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

# Ids of runs and their tokens: a warp looks for its tokens' run together, in blocks of 128 of which
# some are mixed, and each token by itself where an id comes back, or is in many of them.
RUNS = {
    "runs": ([3, -1, 7, 5, 2**31 - 1, 0], [100, 60, 200, 1, 39, 300]),
    "runs-short": (range(26), [27] * 26),
    "runs-come-back": ([1, 2, 1, 9, 2, 4], [150, 100, 140, 30, 20, 200]),
    "runs-interleaved": ([0, 1, 2] * 200, [1] * 600),
}


def of_runs(name):
    ids = np.repeat(*map(np.asarray, RUNS[name]))
    queries, keys = ids[-530:].tolist(), ids.tolist()
    options = {"query_segment_ids": (queries,), "key_value_segment_ids": (keys,)}
    return Case(name, 530, len(ids), batch=1, options=options)


@pytest.mark.parametrize("route", ["sm90", "sm90-deterministic"])
@pytest.mark.parametrize("runs", RUNS)
def test_runs(runs, route):
    case, options = on_route(of_runs(runs), route)
    check(case, "bfloat16", **options)


def test_mutant_of_runs_is_caught():
    case, options = on_route(of_runs("runs"), "sm90-deterministic")
    edits = (("common/segments.cuh", "mixed &= mixed - 1", "mixed = 0"),)
    with pytest.raises(AssertionError, match=r"csrc/|off by|at other"):
        check(case, "bfloat16", edits=edits, **options)


# Blocks of ids grow where there are too many of them: past 131,072 tokens, or with this past 256.
FEW_BLOCKS = ("common/segments.cuh", "kIdBlocks = 1024", "kIdBlocks = 2")


def check_in_larger_blocks(runs, *edits):
    case, options = on_route(of_runs(runs), "sm90")
    check(case, "bfloat16", gradients=False, edits=(FEW_BLOCKS, *edits), **options)


@pytest.mark.parametrize("runs", RUNS)
def test_runs_in_larger_blocks(runs):
    check_in_larger_blocks(runs)


@pytest.mark.parametrize(
    "edit",
    [
        ("< tokens) block_ *= 2;", "< tokens) break;"),
        ("part < (n + 1) * block_", "part <= n * block_"),
    ],
    ids=["not-larger", "first-part-only"],
)
def test_mutant_of_larger_blocks_is_caught(edit):
    with pytest.raises(AssertionError, match=r"csrc/|off by|at other"):
        check_in_larger_blocks("runs-come-back", ("common/segments.cuh", *edit))
