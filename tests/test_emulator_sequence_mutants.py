"""sm90/sequence_tiles.cuh edited: what few calls come to, and what the emulator must catch."""

import pytest
from cases import CASES, Case, packed
from emulator.emulator import why_unavailable
from test_emulator import check
from test_emulator_sequence_tiles import (
    DECREASING,
    FORWARD,
    GAP,
    check_among_others,
    check_batch,
    check_ends,
    check_garbage,
    of_kind,
)

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

TILES, STORE, WORK = (
    f"sm90/{name}.cuh" for name in ("sequence_tiles", "forward_store", "forward_work")
)
LIST = "sm90/sequence_tiles.h"
# What makes calls of a few sequences ones of many, and breaks what must not run then.
OF_MANY = {
    "in-the-order-of-rows": (
        (LIST, "kOrderedTiles = 1024", "kOrderedTiles = 2"),
        (TILES, "rank += other > length ||", "rank += true ||"),
    ),
    "by-the-table": (
        (LIST, "kTiledSequences = 4096", "kTiledSequences = 1"),
        (TILES, "tile.stop = end;", "tile.stop = 0;"),
    ),
}


@pytest.mark.parametrize("variant", OF_MANY)
def test_more_sequences_than_are_tiled_or_ordered(variant):
    for name in ("packed-long-causal", "packed-long-cap-alibi"):
        check(CASES[name], "bfloat16", **FORWARD, edits=OF_MANY[variant])
        with pytest.raises(AssertionError, match=r"two threads of this kernel|never written"):
            check(CASES[name], "bfloat16", **FORWARD, edits=OF_MANY[variant][1:])
    check_batch("blocks", edits=OF_MANY[variant])


# Warps of which the first copies nine rows, and the others none.
FEW = Case("few", 70, 9, batch=1, options=packed((9, 9)))


def judged(case):
    """What runs the kernels on a case with these options and judges them."""
    return lambda **options: check(case, "bfloat16", **FORWARD, multiprocessors=1, **options)


RUNS = {  # by name, besides those of cases of packed-
    "batch": lambda **options: check_batch("blocks", **options),
    "pairs": lambda **options: check_batch("pairs", **options),
    "decreasing": lambda **options: check_garbage(DECREASING, **options),
    "ends": lambda **options: check_ends({}, **options),
    "among-others": check_among_others,
    "few": judged(FEW),
    "gap": judged(GAP),
    "wide": judged(of_kind("short", (256, 256))),
}


@pytest.mark.parametrize("name", RUNS)
def test_run_passes_unedited(name):
    RUNS[name](seed=1)


ONCE, TWICE = "was never written", "two threads of this kernel write bytes .* of "
# What to replace, and by what; the run that must notice, and what it says.
MUTANTS = {
    "outputs-written-on-by-tma": (
        STORE, "warp_row + kOutputRows > item.stop && item.stop < p.shape.q_len", "false",
        "long-dense", f"tma_store.*{TWICE}out"),
    "lse-written-on": (
        STORE, "at.row(1) < item.stop", "at.row(1) < p.shape.q_len", "long-dense", f"{TWICE}lse"),
    "rows-written-on": (
        STORE, "warp_row, item.stop, p.shape.value_dim",
        "warp_row, p.shape.q_len, p.shape.value_dim", "wide", f"store_rows.*{TWICE}out"),
    "a-row-too-few-copied": (
        STORE, "item.stop - first_row) * dim", "item.stop - first_row - 1) * dim", "long-causal",
        f"output out {ONCE}"),
    "a-row-too-many-copied": (
        STORE, "item.stop - first_row) * dim", "item.stop - first_row + 1) * dim", "long-causal",
        f"{TWICE}out"),
    "copied-before-it-is-there": (
        STORE, "    warp_barrier();\n    if (warp_row", "    if (warp_row", "few",
        "in copy_rows.*races with a write|in copy_rows.*nobody has written"),
    "a-pair-of-heads-that-are-one": (
        WORK, "place.head + (pair ? rank : 0)", "place.head", "pairs", f"{TWICE}(out|lse)"),
    "keys-of-all-before": (
        TILES, "item.k_begin = tile.k_begin;", "item.k_begin = 0;", "long-dense",
        r"out: off by .* \(0, 130"),
    "values-of-the-next-not-cleaned": (
        "sm90/forward_load.cuh", "return looks_past<Shape::kK>(",
        "return false && looks_past<Shape::kK>(", "among-others", "nan"),
    "offset-of-the-whole": (
        TILES, "item.offset = tile.offset;", "item.offset = 0;", "long-bottom-right",
        "out: off by"),
    "bottom-right-of-the-first-row": (
        TILES, "keys.end - rows.end", "keys.end - rows.begin", "long-bottom-right", "out: off by"),
    "top-left-of-the-first-key": (
        TILES, ": keys.begin - rows.begin", ": -rows.begin", "long-window", "out: off by"),
    "slots-of-sequences-meet": (
        TILES, "/ tiles.size + middle <= slot", "/ tiles.size <= slot", "long-dense", ONCE),
    "slots-before-a-sequence-not-taken-off": (
        TILES, "begin / tiles.size - low)", "begin / tiles.size)", "long-dense", ONCE),
    "a-slot-too-few": (
        LIST, "p.visibility.sequences + 2 :", "p.visibility.sequences + 1 :", "gap",
        ONCE),
    "gaps-as-sequences": (
        TILES, "if (low == 0 || is_last) return tile;", "", "long-bottom-right",
        "sequence_tiles.cuh.*reads shared memory that nobody has written"),
    "a-tile-too-few": (
        TILES, "store_global(tiles.count, count);", "store_global(tiles.count, count - 1);",
        "long-dense", ONCE),
    "two-tiles-of-a-rank": (
        TILES, "(other == length && n > slot)", "false", "long-dense",
        f"tile_sequences.*{TWICE}forward_scratch"),
    "tiles-of-another-entry": (
        TILES, "reinterpret_cast<int4*>(tiles.tiles + int64_t(b) * tiles.slots + rank)",
        "reinterpret_cast<int4*>(tiles.tiles + rank)", "batch",
        f"tile_sequences.*{TWICE}forward_scratch"),
    "bounds-of-another-entry": (
        TILES, "int64_t(b) * (sequences + 1) + n", "n", "batch", "out of 1"),
    "largest-bound-not-kept": (
        TILES, "if (warp_index() == 0) make_increasing(own, sequences + 2);", "",
        "decreasing", TWICE),
    "largest-bound-of-a-warp": (
        TILES, "largest = shuffle_from(x, kWarpThreads - 1);", "", "decreasing", TWICE),
    "largest-bound-of-two": (
        TILES, "step < kWarpThreads; step *= 2", "step < 2; step *= 2", "decreasing", TWICE),
    "counter-not-cleared": (
        TILES, "if (counter != nullptr && b == 0) store_global(counter, 0u);", "", "long-causal",
        "increment_global.*adds to global memory that nobody has set"),
    "rows-past-the-array": (
        TILES, "clamp(row, sequence.q_len)", "row", "ends", "out of bounds of global memory"),
    "keys-past-the-array": (
        TILES, "min(keys.end, sequence.k_len)", "keys.end", "ends",
        r"Arrays are not equal(.|\n)*\[0, 120, 0, 0\]"),
    "begins-not-awaited": (
        TILES, "  barrier();\n  if (warp_index() == 0) make", "  if (warp_index() == 0) make",
        "long-dense", "make_increasing.*(races with a write|nobody has written)"),
    "largest-bounds-not-awaited": (
        TILES, "sequences + 2);\n  barrier();", "sequences + 2);", "long-dense",
        "sequence_tiles.cuh:.*(races with a write|nobody has written)"),
    "lengths-not-awaited": (
        TILES, "  barrier();\n  for (int slot = thread_index(); slot < tiles.slots;",
        "  for (int slot = thread_index(); slot < tiles.slots;", "long-dense",
        "in tile_sequences.*(races with a write|nobody has written)"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    file, old, new, name, says = MUTANTS[mutant]
    run = RUNS.get(name) or judged(CASES[f"packed-{name}"])
    for seed in range(3):
        with pytest.raises(AssertionError, match=says):
            run(seed=seed, edits=((file, old, new),))
