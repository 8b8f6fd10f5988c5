"""Packed sequences with tiles of their own in the Hopper backward: sm90/sequence_tiles.cuh."""

import numpy as np
import pytest
from cases import CASES, PACKED, packed
from emulator import kernels
from emulator.emulator import why_unavailable
from oracle import attend
from order import TILE, Cancelling
from test_emulator import check
from test_emulator_hopper import DIMS
from test_emulator_sequence_tiles import BOTTOM, CAUSAL, PackedBatch, between_gaps, has_tiles
from ways import Call

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

GRADIENTS = ("query", "key", "value")


def test_cases_with_tiles_of_sequences():
    found = {
        name
        for name, case in CASES.items()
        if PACKED[0] in case.options and has_tiles(case, backward=True)
    }
    long = {"packed-long-dense", "packed-long-causal", "packed-long-bottom-right"}
    assert found == long | {"packed-nothing", "packed-one"}  # long-window has fewer keys


# Sequences, none of whose ends is at a multiple of 16, with gaps around them.
KINDS = {
    "dense": (((1, 30), (133, 150), (0, 0), (150, 170)), {}),
    "causal": (((133, 133), (0, 7), (150, 150)), CAUSAL),
    "bottom-right": (((150, 90), (37, 203), (99, 0)), BOTTOM),
    "window": (((150, 190), (140, 103)), {"local_window_size": (40, 30)}),
}


def of_kind(kind, dims):
    pairs, options = KINDS[kind]
    return between_gaps(kind, pairs, (2, 1), options, dims)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile(kind, dims):
    case = of_kind(kind, dims)
    assert has_tiles(case, backward=True)
    for deterministic in (False, True):
        check(case, "bfloat16", family="sm90", deterministic=deterministic, multiprocessors=3)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_blocks_without_an_item(dims):
    """The host starts as many as there might be tiles."""
    case = of_kind("causal", dims)
    check(case, "bfloat16", family="sm90", multiprocessors=64)


@pytest.mark.parametrize("dim", [64, 192])
def test_each_batch_entry_has_its_tiles(dim):
    bounds = (((0, 30, 200), (9, 140, 199), (0, 0, 7)), ((0, 150, 190), (0, 1, 200), (3, 4, 100)))
    case = PackedBatch(
        "tiles-batch", 200, 200, batch=3, heads=2, kv_heads=1, head_dim=dim,
        options=dict(zip(PACKED, bounds, strict=True)) | CAUSAL,
    )  # fmt: skip
    assert has_tiles(case, backward=True)
    actual = kernels.run(case, "bfloat16", family="sm90", multiprocessors=2)
    arrays, cotangents = case.arrays("bfloat16"), case.cotangents("bfloat16")
    for b in range(case.batch):
        entry = {name: x[b : b + 1] for name, x in arrays.items()}
        d_out, d_lse = (x[b : b + 1] for x in cotangents)
        desired = attend(**entry, **case.static(), d_out=d_out, d_lse=d_lse, precision="float32")
        for name in GRADIENTS:
            x = actual[name][b].astype(np.float32)
            y = desired[name][0]
            np.testing.assert_allclose(x, y, atol=0.02 * abs(y).max(), err_msg=f"{name} of {b}")


def check_among_others(dims=(96, 96), **options):
    """A sequence between others and gaps, all of which are NaN: the same bits.

    But for keys of other sequences up to head dim 128: tiles of dQ begin at multiples of 64 rows.
    """
    case = Call(**vars(of_kind("bottom-right", dims)))
    clean = case.arrays("bfloat16") | dict(
        zip(("d_out", "d_lse"), case.cotangents("bfloat16"), strict=True)
    )
    (_, *between, _), (first, *bounds, last) = (case.options[name] for name in PACKED)
    rows, keys = slice(*between[:2]), slice(*bounds[:2])
    places = {"query": np.s_[:, rows], "d_out": np.s_[:, rows], "d_lse": np.s_[:, :, rows]}
    places |= {"key": np.s_[:, keys], "value": np.s_[:, keys]}
    dirty = {name: np.full_like(clean[name], np.nan) for name in places}
    stays = places if dims[0] > 128 else places | {"key": np.s_[:, first:last]}
    for name, place in stays.items():
        dirty[name][place] = clean[name][place]
    options = {"family": "sm90", "multiprocessors": 1} | options
    desired = kernels.run(case, "bfloat16", **{**options, "edits": ()})
    actual = kernels.run(case.on(**dirty), "bfloat16", **options)
    for name in GRADIENTS:
        np.testing.assert_array_equal(actual[name][places[name]], desired[name][places[name]])


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_what_others_hold_does_not_leak(dims):
    check_among_others(dims)


# Key tiles of two sequences come by turns: the one before is of the other sequence.
ORDERED = Cancelling(
    "ordered", 6 * TILE, 6 * TILE, batch=1, heads=2, kv_heads=1, head_dim=64, value_dim=64,
    options=packed(*[(3 * TILE, 3 * TILE)] * 2, **CAUSAL),
)  # fmt: skip


def check_order(**options):
    def additions(blocks, seed, **options):
        how = {"family": "sm90", "deterministic": True, "together": True}
        made = kernels.run(ORDERED, "float16", **how, multiprocessors=blocks, seed=seed, **options)
        return made["query"]

    alone = additions(1, 0)
    assert alone.any()
    for seed in range(6):
        np.testing.assert_array_equal(additions(5, seed, **options), alone)


def test_additions_come_in_the_order_of_keys():
    assert has_tiles(ORDERED, backward=True)
    check_order()


def judged(kind, dims):
    case = of_kind(kind, dims)
    return lambda **options: check(case, "bfloat16", family="sm90", multiprocessors=1, **options)


RUNS = {
    "narrow": judged("bottom-right", (96, 96)),
    "wide": judged("bottom-right", (192, 192)),
    "among-others": check_among_others,
    "order": check_order,
}
ONCE, TWICE = "was never written", "two threads of this kernel write bytes .* of "
TILES = "sm90/sequence_tiles.cuh"
# What to replace, and by what; the run that must notice, and what it says.
MUTANTS = {
    "keys-written-on": (
        "sm90/backward.cuh", "row, item.stop, p.shape.value_dim",
        "row, p.shape.k_len, p.shape.value_dim", "narrow", f"{TWICE}d_value"),
    "keys-written-on-by-wide-heads": (
        "sm90/backward_wide.cuh", "a.g.dk, item.stop", "a.g.dk, shape.k_len", "wide",
        f"{TWICE}d_key"),
    "rows-written-on": (
        "sm90/backward_query.cuh", "i < item.stop", "i < a.p.shape.q_len", "wide",
        f"{TWICE}d_query"),
    "rows-of-all-before": (
        TILES, "item.q_begin = tile.q_begin;", "item.q_begin = 0;", "narrow", "off by"),
    "rows-of-all-before-of-wide-heads": (
        TILES, "item.q_begin = tile.q_begin;", "item.q_begin = 0;", "wide", "off by"),
    "offset-of-the-whole": (
        TILES, "item.offset = tile.offset;", "item.offset = 0;", "narrow", "off by"),
    "keys-of-the-next-not-cleaned": (
        "sm90/backward_load.cuh",
        "part.end < min(first + Tile::kRows, length) || gaps", "gaps", "among-others",
        "Arrays are not equal"),
    "only-the-tile-before": (
        "sm90/backward_load.cuh", "a.tiles.tiles == nullptr && sequence_of", "sequence_of", "order",
        "Arrays are not equal"),
    "tiles-of-the-other-side": (
        TILES, "tiles.of_keys ? clamp(key, sequence.k_len) : clamp", "clamp", "narrow",
        f"off by|{ONCE}|{TWICE}"),
    "rows-and-keys-exchanged": (
        TILES, "tiles.of_keys ? of_others : of_own, &keys = tiles.of_keys ? of_own : of_others",
        "of_own, &keys = of_others", "narrow", "off by"),
    "a-tile-too-few": (
        TILES, "store_global(tiles.count, count);", "store_global(tiles.count, count - 1);",
        "narrow", ONCE),
    "a-tile-too-few-of-wide-heads": (
        TILES, "store_global(tiles.count, count);", "store_global(tiles.count, count - 1);",
        "wide", ONCE),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    file, old, new, name, says = MUTANTS[mutant]
    with pytest.raises(AssertionError, match=says):
        RUNS[name](edits=((file, old, new),))
