"""The Hopper backward's dK and dV for wide heads on the CPU emulator."""

import dataclasses
import zlib

import numpy as np
import pytest
from cases import CASES, Case
from emulator import kernels
from emulator.emulator import why_unavailable
from test_emulator import DTYPES, check
from test_emulator_hopper_backward import Poisoned

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
    "cap",
    "cap-bias-mask",
    "cap-traced-scale-gqa",
    "alibi-causal-bottom-right",
    "alibi-lengths",
    "sinks-of-rows-without-keys",
    "sinks-everything",
    "dropout",
    "dropout-high-65x200",
    "dropout-window-cap",
    "dropout-causal-alibi",
    "everything",
    "prefix",
    "spans-window",
    "spans-prefix-bottom-right",
    "packed-causal",
    "packed-cross-bottom-right",
    "packed-gaps",
    "segments-window",
    "segments-mixed",
    "segments-padding-sees-nothing",
    "sink-tokens-4-of-8",
    "sink-tokens-70-of-5",
    "spans-sink-tokens",
)
IN_CLUSTERS = (
    "dense-63x63",  # the second block of a cluster has no keys
    "dense-1x129",
    "causal-top_left-129x65",
    "causal-bottom_right-65x129",
    "window-8",
    "window-leaves-rows-empty",
    "lengths-query",
    "lengths-window-bottom-right",
    "lengths-all-zero",
    "gqa-6-3-causal",
    "sinks-lengths",
    "everything",
    "spans",
    "packed-cross",
    "packed-gaps",
    "sink-tokens-lengths",
)
CLUSTER_DIMS = (256, 256)  # all but scores that are read; 192/192 has only plain ones there


def wide(name, dims):
    return dataclasses.replace(CASES[name], head_dim=dims[0], value_dim=dims[1])


def check_wide(case, dtype, **options):
    check(case, dtype, family="sm90", deterministic=True, **options)


@pytest.mark.parametrize("name", SOME)
def test_gradients(name):
    turn = zlib.crc32(name.encode())
    check_wide(wide(name, DIMS[turn % 3]), DTYPES[turn // 3 % 2], seed=turn)


@pytest.mark.parametrize("name", IN_CLUSTERS)
def test_gradients_in_clusters(name):
    turn = zlib.crc32(name.encode())
    options = {"seed": turn, "multiprocessors": 2 + turn // 6 % 2 * 2}
    check_wide(wide(name, DIMS[turn // 2 % 3]), DTYPES[turn // 3 % 2], **options)


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


POISONED = Poisoned(
    "poisoned", 129, batch=3, head_dim=192, value_dim=128,
    options={"query_seq_lengths": (50, 0, 129), "key_value_seq_lengths": (129, 100, 65)},
)  # fmt: skip

# Two blocks of a cluster, and tiles to be cleaned one right after another.
POISONED_SHORT = dataclasses.replace(
    POISONED, q_len=40, k_len=300, heads=6, kv_heads=1,
    options={"query_seq_lengths": (20, 35, 10), "key_value_seq_lengths": (300, 100, 65)},
)  # fmt: skip


def run_poisoned(case=POISONED, **options):
    """The gradients, in float32, of the poisoned call and of the same one without NaN."""
    clean = Case(**{f.name: getattr(case, f.name) for f in dataclasses.fields(Case)})
    for x in (case, clean):
        actual = kernels.run(x, "bfloat16", family="sm90", deterministic=True, **options)
        yield {name: actual[name].astype(np.float32) for name in ("query", "key", "value")}


def check_poisoned(case=POISONED, **options):
    actual, desired = run_poisoned(case, **options)
    for name, gradient in desired.items():
        assert gradient.any(), name
        np.testing.assert_array_equal(actual[name], gradient, err_msg=name)


@pytest.mark.parametrize("general", [False, True])
def test_what_nobody_sees_does_not_leak(general):
    check_poisoned(general=general)


@pytest.mark.parametrize("case", [POISONED, POISONED_SHORT], ids=["long", "short"])
def test_what_nobody_sees_does_not_leak_in_clusters(case):
    case = dataclasses.replace(case, head_dim=CLUSTER_DIMS[0], value_dim=CLUSTER_DIMS[1])
    check_poisoned(case, multiprocessors=4)


@pytest.mark.parametrize(
    ("dims", "general"), [((192, 192), True), (CLUSTER_DIMS, False)], ids=["blocks", "clusters"]
)
def test_order_of_threads_does_not_matter(dims, general):
    case = wide("gqa-6-3-causal", dims)
    runs = [
        kernels.run(
            case, "float16", family="sm90", deterministic=True, general=general,
            seed=seed, host_threads=1 + seed % 2, multiprocessors=1 + 2 * seed,
        )
        for seed in range(3)
    ]  # fmt: skip
    assert runs[0]["key"].any()
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0]["key"], other["key"])
        np.testing.assert_array_equal(runs[0]["value"], other["value"])


KERNEL, LOADER = "sm90/backward_wide.cuh", "sm90/backward_wide_load.cuh"
# What to replace, and the case and its dims that must notice.
MUTANTS = {
    "rows-given-back-early": (
        "dense-1000x1000", (192, 128),
        (KERNEL,
         "wgmma_wait<0>();\n      release_second();\n      to_operand<Element>(operand, s);",
         "release_second();\n      wgmma_wait<0>();\n      to_operand<Element>(operand, s);")),
    "probabilities-overwritten": (
        "dense-1000x1000", (192, 128),
        (KERNEL, "if constexpr (!Shape::kStagesScores) mbarrier_wait(p_free",
         "if (false) mbarrier_wait(p_free")),
    "mask-left-out": (
        "window-(70,3)", (192, 128),
        (KERNEL, "rule.template apply_transposed<",
         "if (kGeneral) rule.template apply_transposed<")),
    "stage-of-the-other-block-not-waited-for": (
        "gqa-6-3-causal", CLUSTER_DIMS,
        (KERNEL, "mbarrier_arrive_remote(free, other)", ""),
        (KERNEL, "kWarpgroupThreads + (Shape::kCluster > 1 ? 3 : 1)", "kWarpgroupThreads + 1")),
    "keys-given-back-before-they-are-read": (
        "lengths-key", (192, 128), (KERNEL, "if constexpr (kHeld > 0) settle_loads(held);", "")),
    "block-leaves-the-cluster": (
        "gqa-6-3-causal", CLUSTER_DIMS,
        (KERNEL, "cluster_barrier();  // the other", "barrier();  // the other")),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    name, dims, *edits = MUTANTS[mutant]
    case = wide(name, dims)
    options = {"edits": tuple(edits), "multiprocessors": 2 if dims == CLUSTER_DIMS else 1}
    for seed in range(3):
        with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
            check_wide(case, "bfloat16", seed=seed, **options)


def test_rows_that_are_not_cleaned_leak():
    edit = (LOADER, "end_row >= min(row + Shape::kQ, shape.q_len)", "true")
    assert not np.isfinite(next(run_poisoned(edits=(edit,)))["key"]).all()
