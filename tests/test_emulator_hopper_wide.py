"""The Hopper backward's dK and dV for wide heads on the CPU emulator."""

import dataclasses
import zlib

import numpy as np
import pytest
from cases import CASES, LENGTHS, Case
from emulator import kernels
from emulator.emulator import why_unavailable
from test_emulator import DTYPES, check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

# Head dim and value dim. Cases are run with wide heads, whatever their own.
DIMS = ((256, 256), (192, 192), (192, 128))
SOME = (
    "dense-63x63",
    "dense-127x129",
    "dense-1x129",
    "dense-129x1",
    "causal-top_left-129x65",
    "causal-top_left-65x129",
    "causal-bottom_right-129x65",
    "causal-bottom_right-65x129",
    "window-8",
    "window-(70,3)",
    "window-(None,4)",
    "window-leaves-rows-empty",
    "lengths-query",
    "lengths-key",
    "lengths-causal-bottom-right",
    "lengths-window-bottom-right",
    "lengths-clamp",
    "lengths-all-zero",
    "gqa-6-3-causal",
    "mqa-8-1-decode",
    "gqa-bias-lengths",
    "bias-causal",
    "mask-bias",
    "scale-traced-negative",
    "everything",
)


def wide(name, dims):
    return dataclasses.replace(CASES[name], head_dim=dims[0], value_dim=dims[1])


def check_wide(case, dtype, **options):
    check(case, dtype, family="sm90", deterministic=True, **options)


@pytest.mark.parametrize("name", SOME)
def test_gradients(name):
    turn = zlib.crc32(name.encode())
    check_wide(wide(name, DIMS[turn % 3]), DTYPES[turn // 3 % 2], seed=turn)


@pytest.mark.parametrize("name", ["dense-127x129", "lengths-both"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_gradients_of_general_scores(name, dims):
    options = {"general": True, "lse_cotangent": False, "multiprocessors": 2}
    check_wide(wide(name, dims), "float16", seed=7, **options)


@pytest.mark.parametrize(
    ("dim", "value_dim"), [(136, 136), (200, 200), (128, 256), (256, 8), (192, 40)]
)
def test_dims_between_those_compiled(dim, value_dim):
    check_wide(Case("between", 70, batch=1, head_dim=dim, value_dim=value_dim), "bfloat16")


@pytest.mark.parametrize("extents", [(65, 0), (0, 65)], ids=["no-keys", "no-queries"])
def test_gradients_of_nothing(extents):
    case = Case("empty", *extents, head_dim=192)
    actual = kernels.run(case, "float16", family="sm90", deterministic=True)
    for name in ("query", "key", "value"):
        assert not actual[name].any(), name


@dataclasses.dataclass(frozen=True)
class Poisoned(Case):
    """Rows that no length lets anybody see hold NaN."""

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        for length, names in zip(LENGTHS, (("query",), ("key", "value")), strict=True):
            self._poison(length, [arrays[name] for name in names])
        return arrays

    def cotangents(self, dtype):
        d_out, d_lse = super().cotangents(dtype)
        self._poison(LENGTHS[0], [d_out, d_lse.swapaxes(1, 2)])
        return d_out, d_lse

    def _poison(self, length, arrays):
        for b, n in enumerate(self.options[length]):
            for array in arrays:
                array[b, n:] = np.nan


POISONED = Poisoned(
    "poisoned", 129, batch=3, head_dim=192, value_dim=128,
    options={"query_seq_lengths": (50, 0, 129), "key_value_seq_lengths": (129, 100, 65)},
)  # fmt: skip


def run_poisoned(**options):
    actual = kernels.run(POISONED, "bfloat16", family="sm90", deterministic=True, **options)
    return {name: actual[name].astype(np.float32) for name in ("query", "key", "value")}


@pytest.mark.parametrize("general", [False, True])
def test_what_nobody_sees_does_not_leak(general):
    for name, gradient in run_poisoned(general=general).items():
        assert np.isfinite(gradient).all(), name


def test_order_of_threads_does_not_matter():
    case = wide("everything", (192, 128))
    runs = [
        kernels.run(
            case, "float16", family="sm90", deterministic=True,
            seed=seed, host_threads=1 + seed % 2, multiprocessors=1 + 2 * seed,
        )
        for seed in range(3)
    ]  # fmt: skip
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0]["key"], other["key"])
        np.testing.assert_array_equal(runs[0]["value"], other["value"])


# What to replace in backward_wide.cuh, by what, and the case that must notice.
MUTANTS = {
    "rows-given-back-early": (
        "wgmma_wait<0>();\n      release_second();\n      pack_operand(s);",
        "release_second();\n      wgmma_wait<0>();\n      pack_operand(s);", "dense-1000x1000"),
    "probabilities-overwritten": (
        "mbarrier_wait(p_free + 8 * p_at.slot, p_at.parity);\n", "", "dense-1000x1000"),
    "mask-left-out": (
        "rule.apply_transposed(", "if (kGeneral) rule.apply_transposed(", "window-(70,3)"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    old, new, name = MUTANTS[mutant]
    edits = (("sm90/backward_wide.cuh", old, new),)
    for seed in range(3):
        with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
            check_wide(
                wide(name, (192, 128)), "bfloat16", seed=seed, edits=edits, multiprocessors=1
            )


def test_rows_that_are_not_cleaned_leak():
    edit = ("sm90/backward_wide.cuh", "end_row >= min(row + Shape::kQ, shape.q_len)", "true")
    assert not np.isfinite(run_poisoned(edits=(edit,))["key"]).all()
