"""The order in which the Hopper backward up to head dim 128 adds to dQ in deterministic mode."""

import dataclasses
import zlib

import numpy as np
import pytest
from cases import every_case, some_cases
from emulator import kernels
from emulator.emulator import why_unavailable
from order import TILE, Cancelling
from test_emulator import DTYPES, SOME, check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

ROUTE = {"family": "sm90", "deterministic": True}
DIMS = (64, 96, 128)


@every_case()
def test_case(case):
    turn = zlib.crc32(case.name.encode()) + 1
    blocks = {"multiprocessors": 2 + turn % 3, "together": turn // 3 % 2 == 0}
    check(case, DTYPES[turn % 2], **ROUTE, **blocks, seed=turn)


@some_cases(*SOME)
@pytest.mark.parametrize("dtype", DTYPES)
def test_general_scores(case, dtype):
    options = {"general": True, "lse_cotangent": False, "together": True, "seed": 7}
    check(case, dtype, **ROUTE, **options)


EXTENTS = {"batch": 1, "heads": 2, "kv_heads": 1}
CANCELLING = Cancelling("cancelling", 150, 3 * TILE, **EXTENTS)
# No row sees the third of four tiles: it is no use to wait for that one alone.
IDS = {
    "query_segment_ids": ((1,) * 150,),
    "key_value_segment_ids": ((1,) * 2 * TILE + (2,) * TILE + (1,) * TILE,),
}
SKIPPING = Cancelling("skipping", 150, 4 * TILE, **EXTENTS, options=IDS, ordinary=2)


def additions(case, dim, seed=0, **options):
    """dQ where blocks take turns, and each draws one of the tiles of keys."""
    case = dataclasses.replace(case, head_dim=dim, value_dim=dim)
    options = {"multiprocessors": 5, "together": True} | options
    return kernels.run(case, "float16", family="sm90", seed=seed, **options)["query"]


def check_order(case, dim, **options):
    alone = additions(case, dim, deterministic=True, multiprocessors=1)
    assert alone.any()
    for seed in range(6):
        ordered = additions(case, dim, seed, deterministic=True, **options)
        np.testing.assert_array_equal(ordered, alone)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_additions_come_in_the_order_of_keys(dim, general):
    check_order(CANCELLING, dim, general=general)


@pytest.mark.parametrize("dim", DIMS)
def test_additions_of_documents_come_in_the_order_of_keys(dim):
    check_order(SKIPPING, dim)


@pytest.mark.parametrize("case", [CANCELLING, SKIPPING], ids=lambda case: case.name)
@pytest.mark.parametrize("dim", DIMS)
def test_another_order_would_show(dim, case):
    first, *others = (additions(case, dim, seed) for seed in range(6))
    assert any((other != first).any() for other in others)


LOADER = "sm90/backward_load.cuh"
# What to replace, and by what. Blocks that take turns must then come to another sum.
MUTANTS = {
    "no-waiting": (CANCELLING, LOADER, "waits |= earlier.begin", "waits &= earlier.begin"),
    "told-before-it-is-added": (
        CANCELLING, LOADER, "mbarrier_wait(shared_address(&smem.dq_added), added_parity);",
        "if (lane_index() == 0) publish(of_head, i);\n"
        "mbarrier_wait(shared_address(&smem.dq_added), added_parity);"),
    "turn-not-awaited": (
        CANCELLING, "sm90/backward.cuh", "ordered ? (kTurns ? turn_parity : ds_at.parity) : 1",
        "1"),
    "rows-of-one-tile-less": (
        CANCELLING, LOADER, "earlier.end > i;", "earlier.end > i + Shape::kQ;"),
    "only-the-tile-before": (
        SKIPPING, LOADER, "in_order ? max(item.rank - 1, 0) : 0",
        "in_order ? 0 : max(item.rank - 1, 0)"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_of_the_order_is_caught(mutant):
    case, *edit = MUTANTS[mutant]
    # A turn that was not awaited is none of the last two phases.
    says = "waits for phase -1" if mutant == "turn-not-awaited" else "Arrays are not equal"
    with pytest.raises(AssertionError, match=says):
        check_order(case, 96, edits=(tuple(edit),))
