"""The Hopper kernel that computes dQ from recomputed scores, on the emulator.

test_emulator_hopper_wide.py runs it too, on more cases.
"""

import dataclasses

import numpy as np
import pytest
from cases import CASES, Case
from emulator import kernels
from emulator.emulator import why_unavailable
from test_emulator import check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

ROUTE = {"family": "sm90"}
DIMS = ((192, 192), (192, 128), (256, 256))


def wide(case, dim=192):
    return dataclasses.replace(case, head_dim=dim, value_dim=dim)


@pytest.mark.parametrize("scores", ["plain", "general", "seeing"])
@pytest.mark.parametrize("dims", DIMS)
def test_every_place_is_used_again(dims, scores):
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    if scores == "seeing":  # what is read from a table
        options["prefix_lengths"] = (130,)
    extents = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": dims[0], "value_dim": dims[1]}
    case = Case("query-rings", 300, 700, **extents, options=options)
    check(case, "bfloat16", **ROUTE, general=scores == "general", multiprocessors=1)


@pytest.mark.parametrize("extents", [(65, 0), (0, 65)], ids=["no-keys", "no-queries"])
def test_empty(extents):
    actual = kernels.run(Case("empty", *extents, head_dim=192), "float16", **ROUTE)
    assert not actual["query"].any()


class Poisoned(Case):
    """NaN in all that nobody sees: rows and keys past the lengths, keys right of the diagonal."""

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        for b in range(self.batch):
            arrays["query"][b, self._rows(b) :] = np.nan
            for name in ("key", "value"):
                arrays[name][b, self._keys(b) :] = np.nan
        return arrays

    def cotangents(self, dtype):
        d_out, d_lse = super().cotangents(dtype)
        for b in range(self.batch):
            d_out[b, self._rows(b) :] = np.nan
            d_lse[b, :, self._rows(b) :] = np.nan
        return d_out, d_lse

    def _rows(self, b):
        return self.options["query_seq_lengths"][b]

    def _keys(self, b):
        return min(self._rows(b), self.options["key_value_seq_lengths"][b])


@pytest.mark.parametrize("general", [False, True])
def test_what_nobody_sees_does_not_leak(general):
    lengths = {"query_seq_lengths": (130, 1, 60), "key_value_seq_lengths": (131, 300, 50)}
    clean = Case("poison", 150, 400, batch=3, head_dim=192, options=lengths | {"is_causal": True})
    fields = {f.name: getattr(clean, f.name) for f in dataclasses.fields(Case)}
    runs = [
        kernels.run(case, "bfloat16", **ROUTE, general=general)
        for case in (clean, Poisoned(**fields))
    ]
    assert runs[0]["query"].any()
    np.testing.assert_array_equal(runs[0]["query"], runs[1]["query"])


def test_order_of_threads_does_not_matter():
    runs = [
        kernels.run(
            wide(CASES["everything"]), "float16", **ROUTE,
            seed=seed, host_threads=1 + seed % 2, multiprocessors=1 + 2 * seed,
        )
        for seed in range(3)
    ]  # fmt: skip
    assert runs[0]["query"].any()
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0]["query"], other["query"])


KERNEL, LOADER = "sm90/backward_query.cuh", "sm90/backward_query_load.cuh"
# File, what to replace in it, by what, and the case that must notice.
MUTANTS = {
    "no-wait-for-rows": (
        KERNEL, "if (first) mbarrier_wait(", "if (false) mbarrier_wait(", "dense-1x1"),
    "values-released-early": (
        KERNEL,
        "wgmma_wait<0>();\n    if constexpr (kGeneral) dp.settle_all();  // as the scores above\n"
        "    release(v_free + 8 * v_at.slot);", "release(v_free + 8 * v_at.slot);\n"
        "    wgmma_wait<0>();", "dense-1000x1000"),
    "no-fence-after-cleaning": (
        LOADER, "      fence_async_shared();\n      arrive_for_warp(full);",
        "      arrive_for_warp(full);", "lengths-key"),
    "sums-of-two-items": (KERNEL, "accumulate = !first;", "accumulate = true;", "gqa-6-3-causal"),
}  # fmt: skip
# Of the tile that gives dP a turn of its own.
TWO_TURNS = "    if constexpr (Shape::kTwoTurns) {\n"
MUTANTS_OF_TWO_TURNS = {
    "values-not-awaited": (
        KERNEL, TWO_TURNS + "      mbarrier_wait(v_full + 8 * v_at.slot, v_at.parity);\n",
        TWO_TURNS),
    "scores-not-awaited": (
        KERNEL, "wgmma_wait<Shape::kTwoTurns ? 0 : 1>();", "wgmma_wait<1>();"),
    "turn-not-passed": (
        KERNEL, "      issue_dp();\n      pass_turn();\n", "      issue_dp();\n"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    *edit, name = MUTANTS[mutant]
    edits = (tuple(edit),)
    for seed in range(3):
        with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
            check(wide(CASES[name]), "bfloat16", **ROUTE, multiprocessors=1, seed=seed, edits=edits)


@pytest.mark.parametrize("mutant", MUTANTS_OF_TWO_TURNS)
def test_mutant_of_two_turns_is_caught(mutant):
    case = dataclasses.replace(wide(CASES["causal-bottom_right-129x65"], 256), k_len=200)
    run = {**ROUTE, "multiprocessors": 1, "edits": (MUTANTS_OF_TWO_TURNS[mutant],)}
    with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
        check(case, "bfloat16", **run)
