"""The Hopper family's backward on the emulator: head dims up to 128, where one kernel owns keys."""

import dataclasses
import zlib

import numpy as np
import pytest
from cases import CASES, LENGTHS, Case, some_cases
from compare import expected, judge_all
from emulator import kernels
from emulator.emulator import why_unavailable
from test_emulator import DTYPES, SOME, check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

# Of each kind of option a few; every one of them crosses tiles of both sides.
CASES_OF_GRADIENTS = (
    *SOME,
    "dense-1x1",
    "dense-129x1",
    "causal-top_left-129x65",
    "causal-bottom_right-129x65",
    "window-(16,0)",
    "window-leaves-rows-empty",
    "window-bottom-right-129x65",
    "lengths-both",
    "lengths-causal-bottom-right",
    "lengths-window-bottom-right",
    "cap",
    "cap-bias-mask",
    "cap-traced-scale-gqa",
    "alibi-causal-bottom-right",
    "alibi-lengths",
    "sinks-lengths",
    "sinks-everything",
    "spans",
    "spans-nested",
    "spans-prefix-bottom-right",
    "packed-causal",
    "packed-cross",
    "packed-cross-bottom-right",
    "packed-gaps",
    "packed-window-bottom-right",
    "packed-nothing",
    "segments-causal",
    "segments-cross",
    "segments-mixed",
    "segments-padding-sees-nothing",
    "sink-tokens-4-of-8",
    "sink-tokens-70-of-5",
    "sink-tokens-lengths",
    "spans-sink-tokens",
    "dropout",
    "dropout-high-65x200",
    "dropout-window-cap",
    "dropout-causal-alibi",
)


def with_dim(case, dim):
    """The case with another head dim, and a value dim of its own."""
    return dataclasses.replace(case, head_dim=dim, value_dim=dim - 24)


@pytest.mark.parametrize("dim", [64, 96, 128])
@some_cases(*CASES_OF_GRADIENTS)
def test_backward(case, dim):
    turn = zlib.crc32(case.name.encode())
    check(with_dim(case, dim), DTYPES[turn % 2], family="sm90", seed=turn)


@pytest.mark.parametrize("dim", [64, 128])
@some_cases(*SOME)
def test_backward_of_general_scores(case, dim):
    options = {"general": True, "multiprocessors": 1, "seed": 7}
    check(with_dim(case, dim), "bfloat16", family="sm90", **options)


# Long enough for the tiles that no case of cases.py comes to; keys end in the middle of a tile.
@pytest.mark.parametrize(("dim", "q_len"), [(64, 4097), (96, 1030), (128, 1030)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_backward_of_many_rows(dim, q_len, is_causal):
    options = {"is_causal": is_causal, "causal_alignment": "bottom_right"}
    case = Case("many-rows", q_len, 260, batch=1, heads=1, head_dim=dim, options=options)
    check(case, "bfloat16", family="sm90", multiprocessors=1)


# Two key tiles, and two heads of a group. Of the query tile that a key tile begins with, the second
# warpgroup sees nothing.
DIAGONAL = Case(
    "diagonal", 256, batch=1, heads=2, kv_heads=1, head_dim=128, options={"is_causal": True}
)


@pytest.mark.parametrize("deterministic", [False, True])
def test_query_tiles_that_a_warpgroup_does_not_see_are_left_out(deterministic):
    def products_of_backward(case):
        forward = kernels.run(case, "bfloat16", family="sm90", gradients=False)
        both = check(case, "bfloat16", family="sm90", deterministic=deterministic)
        return both.session.warpgroup_products - forward.session.warpgroup_products

    of_a_pair = products_of_backward(dataclasses.replace(DIAGONAL, options={})) / 16
    # 12 of the 16 pairs of tiles are seen. In 4 of these one warpgroup of two makes its share of
    # dQ alone, a quarter of its products.
    assert products_of_backward(DIAGONAL) == (12 - 4 * (1 - 1 / 4) / 2) * of_a_pair


@pytest.mark.parametrize("extents", [(65, 0), (0, 65)], ids=["no-keys", "no-queries"])
def test_backward_of_nothing(extents):
    actual = kernels.run(Case("empty", *extents), "float16", family="sm90")
    for name in ("query", "key", "value"):
        assert not actual[name].any()


@dataclasses.dataclass(frozen=True)
class Poisoned(Case):
    """NaN in every row past its sequence's length."""

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        for lengths, names in zip(LENGTHS, (("query",), ("key", "value")), strict=True):
            for b, length in enumerate(arrays.get(lengths, ())):
                for name in names:
                    arrays[name][b, length:] = np.nan
        return arrays

    def cotangents(self, dtype):
        d_out, d_lse = super().cotangents(dtype)
        for b, length in enumerate(self.options.get(LENGTHS[0], ())):
            d_out[b, length:] = np.nan
            d_lse[b, :, length:] = np.nan
        return d_out, d_lse


def run_poisoned(is_causal, dim, **options):
    """Judges gradients of a call with NaN past its lengths by those of one without."""
    lengths = {LENGTHS[0]: (50, 0, 129), LENGTHS[1]: (64, 100, 33)}
    fields = {"q_len": 150, "k_len": 140, "batch": 3, "head_dim": dim}
    fields["options"] = lengths | {"is_causal": is_causal}
    clean = Case("lengths", **fields)
    reference = expected(clean, "bfloat16")
    low = expected(clean, "bfloat16", precision="bfloat16")
    actual = kernels.run(Poisoned("lengths", **fields), "bfloat16", family="sm90", **options)
    judge_all(actual, reference, low, clean.arrays("bfloat16"))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_what_lies_past_the_lengths_does_not_leak(is_causal, dim):
    run_poisoned(is_causal, dim)


def test_order_of_threads_matters_to_dq_alone():
    runs = [
        kernels.run(
            CASES["everything"], "float16", family="sm90",
            seed=seed, host_threads=1 + seed % 2, multiprocessors=1 + 2 * seed,
        )
        for seed in range(3)
    ]  # fmt: skip
    assert runs[0]["key"].any()
    for other in runs[1:]:
        for name in ("key", "value"):
            np.testing.assert_array_equal(runs[0][name], other[name])


# A file below csrc/sm90, what to replace in it, by what, and the case that must notice.
MUTANTS = {
    "no-wait-for-d_o": (
        "backward.cuh", "mbarrier_wait(shared_address(&smem.d_o_full[slot]), at.parity);", "",
        "dense-127x129"),
    "keys-overwritten": (
        "backward_load.cuh",
        "mbarrier_wait(shared_address(&smem.kv_free), published % 2 ^ 1);", "", "gqa-6-3-causal"),
    "stage-released-early": (
        "backward.cuh",
        "wgmma_wait<0>();\n      arrive_for_lane(shared_address(&smem.stage_free[at.slot]));",
        "arrive_for_lane(shared_address(&smem.stage_free[at.slot]));\n      wgmma_wait<0>();",
        "dense-1000x1000"),
    "ds-not-fenced": (
        "backward.cuh", "fence_async_shared();\n      arrive_for_lane(", "arrive_for_lane(",
        "dense-127x129"),
    "ds-not-complete": (
        "backward.cuh",
        "mbarrier_wait(shared_address(&smem.ds_full), ds_at.parity);", "",
        "dense-127x129"),
    "ds-overwritten": (
        "backward_tiles.h", "constexpr int kDsPlaces = 3;", "constexpr int kDsPlaces = 2;",
        "dense-1000x1000"),
    "no-dq-of-an-items-last-tile": (
        "backward.cuh", "if (!is_first) {\n      await_ds();", "if (false) {\n      await_ds();",
        "dense-127x129"),
    "keys-held-where-no-product-waits": (
        "backward.cuh", "if (item.q_tiles > 0) {", "{", "alibi-lengths"),
    "statistics-of-an-old-stage": (
        "backward_load.cuh",
        "mbarrier_wait(shared_address(&smem.stage_free[at.slot]), at.parity);\n#pragma", "#pragma",
        "dense-1000x1000"),
    "rows-not-cleaned": (
        "backward_load.cuh", "return part.contains(first + row) && ", "return ", "poisoned"),
    "masked-gradients-not-hidden": (
        "../common/softmax.cuh", "ds = hidden ? 0.0f : x * (", "ds = x * (", "poisoned"),
    "masked-gradients-not-hidden-of-general-scores": (
        "../common/softmax.cuh", "ds = hidden ? 0.0f : (", "ds = (", "poisoned-general"),
    "address-of-dq-left-behind": (
        "backward.cuh", ": dq_before + step * Shape::kHeadDim;", ": dq_before;", "dense-1000x1000"),
    "diagonal-too-wide": (
        "backward.cuh", "seen.begin - Shape::kQ + 1;", "seen.begin + 1;", "diagonal"),
    "no-ds-of-what-is-left-out": ("backward.cuh", "store_ds(n, {});", ";", "diagonal"),
    "no-dq-before-what-is-left-out": (
        "backward.cuh", "make_dq();\n      finish_step();", "finish_step();", "diagonal"),
    "dq-added-a-tile-late": (
        "backward.cuh", "row_before = i;", "row_before = i + Shape::kQ;", "cap"),
}  # fmt: skip


def run_mutant(name, **options):
    if name.startswith("poisoned"):
        run_poisoned(True, 64, general=name.endswith("general"), **options)
    else:
        case = DIAGONAL if name == "diagonal" else CASES[name]
        check(case, "bfloat16", family="sm90", **options)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_of_the_backward_is_caught(mutant):
    file, old, new, name = MUTANTS[mutant]
    options = {"edits": ((f"sm90/{file}", old, new),), "multiprocessors": 1}
    for seed in range(3):
        with pytest.raises(AssertionError, match=r"csrc/|off by|at other|non-zeros"):
            run_mutant(name, seed=seed, **options)
