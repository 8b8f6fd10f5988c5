"""The package's Hopper forward on the CPU emulator."""

import dataclasses
import zlib

import numpy as np
import pytest
from cases import CASES, Case, every_case, some_cases
from emulator import kernels
from emulator.emulator import why_unavailable
from test_emulator import DTYPES, SOME, check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())


@every_case()
def test_forward(case):
    turn = zlib.crc32(case.name.encode())
    check(case, DTYPES[turn % 2], family="sm90", gradients=False, seed=turn)


@some_cases(*SOME)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_of_general_scores(case, dtype):
    check(case, dtype, family="sm90", gradients=False, general=True, multiprocessors=2, seed=7)


DIMS = [(d, d) for d in kernels.HEAD_DIMS] + [(192, 128)]


def many_rows(kind, dims):
    """Of groups of two heads, which clusters take by pairs, but for those of "long"."""
    q_len, k_len, heads, kv_heads = {
        "dense": (300, 410, 2, 1), "long-dense": (200, 1030, 2, 1),
        "long": (70, 2100, 3, 1), "long-pairs": (140, 2100, 4, 2),
    }[kind]  # fmt: skip
    bottom = {"is_causal": True, "causal_alignment": "bottom_right"}
    case = Case("many-rows", q_len, k_len, batch=1, heads=heads, kv_heads=kv_heads,
                options={} if "dense" in kind else bottom)  # fmt: skip
    return dataclasses.replace(case, head_dim=dims[0], value_dim=dims[1])


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("kind", ["dense", "long-dense", "long", "long-pairs"])
def test_forward_of_many_rows(dims, kind):
    check(many_rows(kind, dims), "bfloat16", family="sm90", gradients=False, multiprocessors=2)


def test_pair_of_heads_that_are_one_is_noticed():
    edit = ("sm90/forward_work.cuh", "place.head + (pair ? rank : 0)", "place.head")
    case = many_rows("long-pairs", (128, 128))
    with pytest.raises(AssertionError, match="two threads of this kernel write"):
        check(case, "bfloat16", family="sm90", gradients=False, edits=(edit,), multiprocessors=2)


@pytest.mark.parametrize("scale", [1e-38, 1e4])
def test_forward_with_an_extreme_scale(scale):
    case = Case("extreme-scale", 65, 200, options={"scale": scale})
    check(case, "bfloat16", family="sm90", gradients=False)


@pytest.mark.parametrize("extents", [(65, 0), (0, 65)], ids=["no-keys", "no-queries"])
def test_forward_of_nothing(extents):
    actual = kernels.run(Case("empty", *extents), "float16", family="sm90", gradients=False)
    assert np.isneginf(actual["lse"]).all()
    assert not actual["out"].any()


def test_order_of_threads_does_not_matter():
    runs = [
        kernels.run(
            CASES["everything"], "float16", family="sm90", gradients=False,
            seed=seed, host_threads=1 + seed % 2, multiprocessors=1 + 2 * seed,
        )
        for seed in range(3)
    ]  # fmt: skip
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0]["out"], other["out"])
        np.testing.assert_array_equal(runs[0]["lse"], other["lse"])


# A file below csrc/sm90, what to replace in it, by what, and the case that must notice.
MUTANTS = {
    "no-wait-for-full": (
        "forward.cuh",
        "if (!is_full) mbarrier_wait(full + 8 * at.slot, at.parity);\n", "", "dense-127x129"),
    "answer-made-up": (
        "forward.cuh", "mbarrier_test(full + 8 * at.slot, at.parity)", "true", "dense-1000x1000"),
    "answer-for-two-places": (
        "forward.cuh", "    is_full = false;\n    const int slot", "    const int slot",
        "dense-1000x1000"),
    "early-release": (
        "forward.cuh",
        "wgmma_wait<1>();\n      release(k_slot);", "release(k_slot);\n      wgmma_wait<1>();",
        "dense-1000x1000"),
    "probabilities-packed-early": (
        "forward.cuh",
        "wgmma_wait<0>();\n      release(v_slot);\n      ask_full();",
        "take_probabilities(s, kept);\n      wgmma_wait<0>();\n      release(v_slot);",
        "dense-127x129"),
    "no-proxy-fence": (
        "forward_store.cuh",
        "fence_async_shared();\n    warp_barrier();", "warp_barrier();", "dense-127x129"),
    "no-wait-for-the-store": (
        "forward_store.cuh",
        "tma_store_wait_read();  // of", "(void)0;  //", "gqa-6-3-causal"),
    "one-arrival-of-two": (
        "forward.cuh",
        "mbarrier_init(shared_address(&smem.free[slot]), Shape::kCluster * Shape::kWarpgroups)",
        "mbarrier_init(shared_address(&smem.free[slot]), 1)", "dense-127x129"),
    "query-given-back-while-it-is-read": (
        "forward.cuh", "settle_loads(q_registers);", ";", "gqa-6-3-causal"),
    "query-released-early": (
        "forward.cuh",
        "wgmma_wait<0>();\n    release(k_slot);\n    release_query(true);",
        "release_query(true);\n    wgmma_wait<0>();\n    release(k_slot);", "dim-64-value-32"),
    "query-released-before-its-first-product": (
        "forward.cuh",
        "wgmma_wait<0>();\n      release(k_slot);\n      release_query(true);",
        "release_query(true);\n      wgmma_wait<0>();\n      release(k_slot);", "gqa-6-3-causal"),
    "queries-overwritten": (
        "forward_load.cuh", "mbarrier_wait(q_free(queries), queries.parity ^ 1);", "",
        "gqa-6-3-causal"),
    "queries-of-the-other-place": (
        "forward.cuh", "q = q_first + broadcast(queries.slot * (QueryTile::kBytes / 16));", "",
        "gqa-6-3-causal"),
    "queries-of-the-item-before": (
        "forward.cuh", "      load_query();\n      store_output", "      store_output",
        "gqa-6-3-causal"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_of_the_forward_is_caught(mutant):
    file, old, new, name = MUTANTS[mutant]
    options = {"family": "sm90", "gradients": False, "multiprocessors": 1}
    edits = ((f"sm90/{file}", old, new),)
    for seed in range(3):
        with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
            check(CASES[name], "bfloat16", seed=seed, edits=edits, **options)
