"""A bias or a mask that TMA brings to the Hopper forward and backward, on the emulator."""

import dataclasses

import numpy as np
import pytest
from cases import CASES, Case
from emulator.emulator import why_unavailable
from test_emulator import DTYPES, check
from test_emulator_hopper import DIMS
from test_emulator_hopper_wide import POISONED_SHORT, check_poisoned

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("scores", ["bias", "mask"])
def test_forward_of_scores_that_tma_copies(dims, scores):
    """More items than places for them, tiles that end before the tensor, rows that see little."""
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    case = Case(f"{scores}-by-tma", 290, 272, batch=1, heads=3, kv_heads=1, bias_dtype=None,
                options=options, **{scores: (1, 3, 290, 272)})  # fmt: skip
    case = dataclasses.replace(case, head_dim=dims[0], value_dim=dims[1])
    check(case, "float16", family="sm90", gradients=False, multiprocessors=2)


@pytest.mark.parametrize(
    ("dims", "deterministic"), [(d, False) for d in DIMS[:3]] + [(d, True) for d in DIMS], ids=str
)
@pytest.mark.parametrize("scores", ["bias", "mask"])
def test_backward_of_scores_that_tma_copies(dims, deterministic, scores):
    """The same of the kernels of the backward."""
    options = {"is_causal": True, "causal_alignment": "bottom_right", "logits_soft_cap": 3.0}
    case = Case(f"{scores}-by-tma", 290, 272, batch=1, heads=2, kv_heads=1, bias_dtype=None,
                options=options, head_dim=dims[0], value_dim=dims[1] - 24,
                **{scores: (1, 2, 290, 272)})  # fmt: skip
    check(case, DTYPES[dims[0] % 64 != 0], family="sm90", deterministic=deterministic,
          multiprocessors=2)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Blocks(Case):
    """A mask that is all true or all false for some warps, and NaN in keys that it hides.

    In the backward these would reach the queries as 0 x NaN: a mask cleans no tiles.
    """

    hidden: float = np.nan

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        mask = arrays["mask"]
        mask[:, :, :64, :128] = True
        mask[:, :, 8:16, :128:7] = False  # only one of the two rows that a thread has
        mask[:, :, 16:32, :128] = False
        mask[:, :, 32:48] = False  # sees nothing
        mask[:, :, 64:80] = True
        mask[:, :, :, 130:135] = False
        arrays["key"][:, 130:135] = self.hidden
        return arrays


BLOCKS = Blocks("mask-blocks", 150, 272, heads=4, kv_heads=2, mask=(2, 1, 150, 272))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tiles_of_a_mask(dtype):
    actual = check(BLOCKS, dtype, family="sm90", gradients=False, multiprocessors=2)
    assert np.isneginf(actual["lse"][:, :, 32:48]).all()
    assert not actual["out"][:, 32:48].any()


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 192), (256, 256)], ids=str)
def test_gradients_of_whole_tiles_of_a_mask(dims):
    case = dataclasses.replace(BLOCKS, hidden=100.0, head_dim=dims[0], value_dim=dims[1])
    actual = check(case, DTYPES[dims[0] % 128 == 0], family="sm90", multiprocessors=4,
                   deterministic=dims[0] > 64)  # fmt: skip
    assert not actual["query"][:, 32:48].any()
    assert not actual["key"][:, 130:135].any()


@pytest.mark.parametrize("dims", [(192, 128), (256, 256)], ids=str)
def test_what_nobody_sees_does_not_leak_beside_a_mask(dims):
    case = dataclasses.replace(POISONED_SHORT, head_dim=dims[0], value_dim=dims[1], k_len=304,
                               mask=(3, 1, 40, 304))  # fmt: skip
    check_poisoned(case, multiprocessors=4)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", ["mask-aligned-2x1x1x272", "bias-aligned-2x2x1x264"])
def test_backward_of_one_row_for_all_queries(name, dims):
    case = dataclasses.replace(CASES[name], head_dim=dims[0], value_dim=dims[1])
    check(case, DTYPES[dims[0] % 64 == 0], family="sm90", deterministic=name.startswith("mask"))


@pytest.mark.parametrize("dims", [(128, 128), (256, 256)], ids=str)
def test_sink_tokens_beside_a_mask(dims):
    case = dataclasses.replace(CASES["sink-tokens-70-of-5"], k_len=400, head_dim=dims[0],
                               value_dim=dims[1], mask=(2, 2, 150, 400))  # fmt: skip
    check(case, "bfloat16", family="sm90", deterministic=True)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", ["mask-aligned-2x2x150x272", "bias-aligned-1x2x150x264"])
def test_dropout_beside_scores_that_tma_copies(name, dims):
    options = {"dropout_rate": 0.3, "is_causal": True, "causal_alignment": "bottom_right"}
    case = dataclasses.replace(CASES[name], head_dim=dims[0], value_dim=dims[1], options=options)
    check(case, DTYPES[dims[0] % 64 != 0], family="sm90", deterministic=name.startswith("mask"))


# File, what to replace in it, by what, and the case that must notice.
STAGED, MATRIX = "sm90/forward_staged.cuh", "sm90/shared_matrix.cuh"
QUERY, WIDE = "sm90/backward_query.cuh", "sm90/backward_wide.cuh"
WIDE_LOADER = "sm90/backward_wide_load.cuh"
BACKWARD, READER = "sm90/backward_staged.cuh", "sm90/staged_scores.cuh"
BIASED = "bias-aligned-1x2x150x264"
MASKED, MASKED_WIDE = "mask-aligned-2x2x150x272", "mask-aligned-dim-160"
MUTANTS_OF_BOTH = {
    "bias-of-the-first-entry": (
        READER, "tensor.batch > 1 ? batch : 0", "0", "bias-aligned-2x1x150x264"),
    "mask-of-the-first-head": (
        READER, "tensor.heads > 1 ? head : 0", "0", MASKED),
    "mask-forgotten": (
        "common/scores.cuh", "if (staged.hides()) staged.hide(s);", "", MASKED),
    "bias-forgotten": (
        "common/scores.cuh", "if (staged.adds()) staged.add(s);", "", BIASED),
}  # fmt: skip
MUTANTS = MUTANTS_OF_BOTH | {
    "bias-overwritten": (
        STAGED, "mbarrier_wait(place.free, (place.round + 1) % 2);", "", BIASED),
    "bias-not-awaited": (
        STAGED, "mbarrier_wait(place.full, place.round % 2);", "", BIASED),
    "bias-given-back-while-it-is-read": (
        STAGED, "settle_loads(loaded);", "", BIASED),
    "item-not-kept-for-the-bias": (
        STAGED,
        "arrive_for_lane(shared_address(&smem.q_free[queries.slot]));  // the item has been read",
        "", "bias-aligned-lengths"),
    "bias-of-other-rows": (
        STAGED, " & a_.staged_row_mask", "", "bias-aligned-2x2x1x264"),
    "mask-of-other-rows": (
        STAGED, " & a_.staged_row_mask", "", "mask-aligned-2x1x1x272"),
    "mask-overwritten": (
        STAGED, "mbarrier_wait(place.free, (place.round + 1) % 2);", "", MASKED),
    "mask-not-awaited": (
        STAGED, "mbarrier_wait(place.full, place.round % 2);", "", MASKED),
    "mask-given-back-while-it-is-read": (
        STAGED, "settle_loads(loaded);", "", MASKED),
    "mask-in-one-place": (
        STAGED, "place * (Staged::kBytes / kStagedPlaces)", "0", MASKED),
    "mask-swizzle": (
        MATRIX, "(chunk16 ^ row / (kRowBytes / kCols) % (kCols / 16))", "chunk16", MASKED),
    "mask-swizzle-of-64": (
        MATRIX, "chunk16 ^ row / (kRowBytes / kCols)", "chunk16 ^ row", MASKED_WIDE),
    "mask-of-the-first-rows": (
        STAGED, "item.first_row + w * kWarpgroupRows", "item.first_row", MASKED),
    "mask-of-half-the-rows-is-all": (
        STAGED, "(visible_[0] & visible_[1]) != 0x01", "visible_[0] != 0x01", BLOCKS.name),
    "mask-of-this-lane": (
        STAGED, "shuffle_from(visible_[r], source)", "visible_[r]", MASKED),
    "mask-of-the-other-half": (
        STAGED, "low >> shift & 0xffff", "low & 0xffff", MASKED),
}  # fmt: skip
MUTANTS_OF_THE_BACKWARD = MUTANTS_OF_BOTH | {
    "bias-not-awaited": (
        "sm90/backward.cuh",
        "mbarrier_wait(shared_address(&smem.staged_full[slot]), at.parity);", "", BIASED),
    "bias-overwritten": (
        BACKWARD, "mbarrier_wait(shared_address(&smem.stage_free[at.slot]), at.parity);", "",
        BIASED),
    "bias-of-other-keys": (
        READER, "2 * (warp_index() - 4) + lane_index() / 8 % 2", "2 * (warp_index() - 4)",
        BIASED),
    "mask-of-the-first-rows": (
        BACKWARD, "item.from_row + tile * row_step<Shape>(a.g), h", "item.from_row, h", MASKED),
    "mask-of-other-rows": (
        READER, "lane_index()) & row_mask_", "lane_index())", "mask-aligned-2x1x1x272"),
    "bias-of-other-rows": (
        READER, "% 8) & row_mask_", "% 8)", "bias-aligned-2x2x1x264"),
    "mask-of-this-lane": (
        READER, "shuffle_from(visible, source),", "visible,", MASKED),
    "mask-of-even-keys": (
        READER, "lane_index() / 4 % 2 == 0 ? 0x6420 : 0x7531", "0x6420", MASKED),
    "mask-of-a-part-is-none": (
        READER, "any_lane(visible != 0x01010101u * ((1u << kBlocks) - 1))",
        "any_lane(visible == 0)", BLOCKS.name),
}  # fmt: skip
# Of dQ by recomputation, and of dK and dV of wide heads.
MUTANTS_OF_OTHER_KERNELS = {
    "bias-not-asked-for": (
        192, QUERY, "rule.apply_staged(s, at, rows, slopes, staged);", "", BIASED),
    "mask-not-awaited": (
        192, QUERY, "    staged.load_ahead();\n", "", MASKED),
    "bias-overwritten": (
        192, STAGED, "mbarrier_wait(place.free, (place.round + 1) % 2);", "", BIASED),
    "mask-given-back-while-it-is-read": (
        192, STAGED, "settle_loads(loaded);", "", MASKED),
    "wide-bias-overwritten": (
        192, WIDE_LOADER, "mbarrier_wait(shared_address(&smem.q_free[at.slot]), at.parity);", "",
        BIASED),
    "wide-bias-given-back-while-it-is-read": (192, WIDE, "staged.settle();", "", BIASED),
    "wide-mask-not-awaited": (
        192, WIDE, "kWhoFills + Shape::kStagesScores", "kWhoFills", MASKED),
    "wide-mask-of-the-first-rows": (
        192, WIDE_LOADER, "item.first_key, row,", "item.first_key, item.first_row,", MASKED),
    "wide-item-not-kept": (
        192, WIDE, "(9 + Shape::kStagesScores) * kWarpThreads", "9 * kWarpThreads", MASKED),
    "slopes-in-a-place-in-use": (
        192, WIDE, "mbarrier_wait(p_free + 8 * p_at.slot, p_at.parity);\n        slopes",
        "slopes", "mask-aligned-lengths-cap"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("mutant", "gradients"),
    [(name, False) for name in MUTANTS] + [(name, True) for name in MUTANTS_OF_THE_BACKWARD],
)
def test_mutant_is_caught(mutant, gradients):
    file, old, new, name = (MUTANTS_OF_THE_BACKWARD if gradients else MUTANTS)[mutant]
    case = CASES.get(name, dataclasses.replace(BLOCKS, hidden=100.0 if gradients else np.nan))
    for seed in range(3):
        with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
            check(case, "bfloat16", seed=seed, edits=((file, old, new),), family="sm90",
                  gradients=gradients, multiprocessors=1)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS_OF_OTHER_KERNELS)
def test_mutant_of_another_kernel_is_caught(mutant):
    dim, file, old, new, name = MUTANTS_OF_OTHER_KERNELS[mutant]
    case = dataclasses.replace(CASES[name], head_dim=dim, value_dim=dim)
    for seed in range(3):
        with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
            check(case, "bfloat16", seed=seed, edits=((file, old, new),), family="sm90",
                  multiprocessors=1)  # fmt: skip
