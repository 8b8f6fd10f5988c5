"""The Hopper kernel that computes the gradient of a bias, on the emulator."""

import dataclasses
import itertools
import zlib

import numpy as np
import pytest
from cases import CASES, Case, some_cases
from emulator import kernels
from emulator.emulator import why_unavailable
from test_emulator import DTYPES, check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

# The bias has rows and columns: others are the portable kernel's.
BIASED = [n for n, c in CASES.items() if c.bias and len(c.bias) > 1 and min(c.bias[-2:]) > 1]
DIMS = [(d, d) for d in kernels.HEAD_DIMS] + [(192, 128)]


@some_cases(*BIASED)
def test_case(case):
    turn = zlib.crc32(case.name.encode()) + 2
    check(case, DTYPES[turn % 2], family="sm90", seed=turn, multiprocessors=2)


CAUSAL = {"is_causal": True, "causal_alignment": "bottom_right"}
# One for each kind of tile: more of them than blocks, and more steps than places in the ring.
KINDS = {
    "narrow": {"bias_dtype": None},
    "narrow-of-another-type": {"bias_dtype": "float16"},
    "wide": {},
    "masked": {"mask": (3, 1, 1, 301)},
    "dropping": {"options": CAUSAL | {"dropout_rate": 0.3}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_every_tile(dims, kind):
    extents = {"batch": 3, "heads": 4, "kv_heads": 2, "head_dim": dims[0], "value_dim": dims[1]}
    changes = {"bias": (1, 2, 300, 301), "heads": 2, "kv_heads": 1, "options": CAUSAL}
    case = Case("bias-tiles", 300, 301, **(extents | changes | KINDS[kind]))
    check(case, "bfloat16", family="sm90", multiprocessors=2)


@pytest.mark.parametrize("shared", list(itertools.product((True, False), repeat=2)), ids=str)
def test_every_way_of_sharing(shared):
    bias = (1 if shared[0] else 3, 1 if shared[1] else 4, 140, 130)
    lengths = {"query_seq_lengths": (140, 0, 70), "key_value_seq_lengths": (20, 130, 130)}
    case = Case("bias-sharing", 140, 130, batch=3, heads=4, kv_heads=2, bias=bias, options=lengths)
    for general in (False, True):
        check(case, "float16", family="sm90", general=general, multiprocessors=4)


SEEN = ("prefix", "spans", "segments-causal", "segments-cross", "segments-mixed",
        "segments-padding-sees-nothing", "sink-tokens-4-of-8", "sink-tokens-70-of-5",
        "spans-sink-tokens", "window-leaves-rows-empty", "lengths-window-bottom-right",
        "alibi-causal-bottom-right")  # fmt: skip


@some_cases(*SEEN)
def test_whatever_says_who_sees_whom(case):
    turn = zlib.crc32(case.name.encode())
    k_len = case.q_len if case.k_len is None else case.k_len
    case = dataclasses.replace(case, bias=(1, case.heads, case.q_len, k_len))
    check(case, DTYPES[turn % 2], family="sm90", seed=turn, multiprocessors=2)


@pytest.mark.parametrize("extents", [(65, 0), (0, 65), (65, 70)], ids=str)
def test_nothing_to_sum(extents):
    """Tiles without a step are zeros as well."""
    lengths = {"query_seq_lengths": (0, 0)}
    case = Case("empty", *extents, bias=(1, 1, *extents), options=lengths)
    actual = kernels.run(case, "float16", family="sm90")
    assert actual["bias"].shape[-2:] == extents
    assert not actual["bias"].any()


@dataclasses.dataclass(frozen=True)
class Poisoned(Case):
    """NaN in all that nobody sees: rows and keys past the lengths, keys right of the diagonal."""

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        for b in range(self.batch):
            rows, keys = (self.options[name][b] for name in LENGTHS)
            arrays["query"][b, rows:] = np.nan
            for name in ("key", "value"):
                arrays[name][b, min(rows, keys) :] = np.nan
        arrays["bias"][..., max(self.options[LENGTHS[1]]) :] = np.nan
        return arrays

    def cotangents(self, dtype):
        d_out, d_lse = super().cotangents(dtype)
        for b in range(self.batch):
            rows = self.options[LENGTHS[0]][b]
            d_out[b, rows:] = np.nan
            d_lse[b, :, rows:] = np.nan
        return d_out, d_lse


LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")


def run_poisoned(bias_dtype, **options):
    """The gradient of the poisoned call's bias and of the same one without NaN."""
    lengths = dict(zip(LENGTHS, ((130, 1, 60), (131, 240, 50)), strict=True))
    fields = {"q_len": 150, "k_len": 300, "batch": 3, "bias": (1, 2, 150, 300)}
    fields |= {"bias_dtype": bias_dtype, "options": lengths | {"is_causal": True}}
    for kind in (Poisoned, Case):
        yield kernels.run(kind("poison", **fields), "bfloat16", family="sm90", **options)["bias"]


@pytest.mark.parametrize("bias_dtype", [None, "float32"])
def test_what_nobody_sees_does_not_leak(bias_dtype):
    actual, desired = run_poisoned(bias_dtype)
    assert desired.any()
    np.testing.assert_array_equal(actual, desired)


@pytest.mark.parametrize("name", ["everything", "gqa-bias-lengths"])
def test_order_of_threads_does_not_matter(name):
    runs = [
        kernels.run(
            CASES[name], "float16", family="sm90",
            seed=seed, host_threads=1 + seed % 2, multiprocessors=1 + 2 * seed,
        )["bias"]
        for seed in range(3)
    ]  # fmt: skip
    assert runs[0].any()
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0], other)


KERNEL, WORK = "sm90/backward_bias.cuh", "sm90/backward_bias_work.cuh"
# Three tiles for one pair of blocks, the last one without a step.
ROWS = Case("rows", 140, 301, heads=2, kv_heads=1, bias=(1, 1, 140, 301),
            options={"is_causal": True})  # fmt: skip
WIDE_HEADS = Case("wide-heads", 130, 120, batch=3, head_dim=256, bias=(1, 2, 130, 120))
# A file below csrc, what to replace in it, by what, and the case that must notice; None: poison().
MUTANTS = {
    "no-wait-for-a-chunk": (
        KERNEL, "mbarrier_wait(full + 8 * at.slot, at.parity);", "", ROWS),
    "places-overwritten": (
        KERNEL, "mbarrier_wait(shared_address(&smem.free[at.slot]), at.parity);", "", ROWS),
    "places-released-early": (
        KERNEL,
        "wgmma_wait<Shape::kValueChunks>();\n      release(Shape::kHeadChunks);",
        "release(Shape::kHeadChunks);\n      wgmma_wait<Shape::kValueChunks>();", ROWS),
    "chunks-released-early": (
        KERNEL, "wgmma_wait<1>();\n        release(1);", "release(1);\n        wgmma_wait<1>();",
        WIDE_HEADS),
    "last-places-released-early": (
        KERNEL,
        "wgmma_wait<0>();\n    release(Shape::kTakesTurns ? Shape::kValueChunks : 1);",
        "release(Shape::kTakesTurns ? Shape::kValueChunks : 1);\n    wgmma_wait<0>();", ROWS),
    "scores-not-waited-for": (
        KERNEL, "wgmma_wait<Shape::kValueChunks>();", "", ROWS),
    "released-in-one-block": (
        KERNEL, "mbarrier_arrive_remote(free + 8 * released, 1);", "", ROWS),
    "arrivals-of-one-block": (
        KERNEL, "Shape::kCluster * Shape::kWarpgroups);", "Shape::kWarpgroups);", ROWS),
    "block-gone": (
        KERNEL, "if constexpr (Shape::kCluster > 1) cluster_barrier();  // the", "// the", ROWS),
    "keys-of-the-other-block": (
        KERNEL, "const int key = steps.first_key + rank * kShare;",
        "const int key = steps.first_key;", ROWS),
    "rows-of-the-other-block": (
        KERNEL, "steps.first_row + rank * Shape::kQ", "steps.first_row", ROWS),
    "turn-not-passed": (
        KERNEL, "if (warpgroup == 1) pass_turn();", "", ROWS),
    "sums-of-two-tiles": (
        KERNEL, "      sum.clear();", "      if (summed == 0) sum.clear();", ROWS),
    "last-tile-not-stored": (
        KERNEL, "  if (summed >= 0) store(bias_item<Shape>(a, summed), sum);\n}", "}", ROWS),
    "bias-of-the-first-keys": (
        KERNEL, "steps.h, Position<>(row, key));\n      sum",
        "steps.h, Position<>(row, 0));\n      sum", ROWS),
    "rows-past-the-length": (
        KERNEL, "row + 16 <= sequence.q_len &&", "", None),
    "tile-without-steps-left-alone": (WORK, "nothing_seen(item);", "", ROWS),
    "steps-of-the-first-entry": (WORK, "        ++b;\n", "        b = a_.p.shape.batch;\n", ROWS),
    "steps-of-the-first-head": (
        WORK, "++h < a_.p.shape.heads", "++h < 1", ROWS),
    "keys-behind-the-window": (
        WORK, "first_key < keys.end && ", "first_key + Shape::kK < keys.end && ", ROWS),
    "bias-past-its-columns": (WORK, "col < cols ? load_global(row", "true ? load_global(row", ROWS),
    "gradient-past-its-columns": (
        KERNEL, "if (col < cols) store_global(row + col, ", "store_global(row + col, ", ROWS),
    "gradient-past-its-rows": (KERNEL, "if (i >= out.q_len) continue;", "", ROWS),
}  # fmt: skip


def run_mutant(case, **options):
    if case is None:
        np.testing.assert_array_equal(*run_poisoned("float32", **options))
    else:
        check(case, "bfloat16", family="sm90", **options)


SEEN_AS = r"csrc/|off by|at other|never written|nan location"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    file, old, new, case = MUTANTS[mutant]
    options = {"edits": ((file, old, new),), "multiprocessors": 2}
    for seed in range(3):
        with pytest.raises(AssertionError, match=SEEN_AS):
            run_mutant(case, seed=seed, **options)
