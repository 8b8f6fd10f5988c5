"""The emulator computes what a GPU does, on the same inputs: so what it proves holds there.

Bit for bit where nothing but results is rounded (exact.py), and on N(0, 1) inputs up to the last
bits of the GPU's exponential and sums, which move a 16-bit result now and then by one place.
"""

import dataclasses

import numpy as np
import pytest
from cases import Case
from compare import assert_same_bits, expected, run
from emulator import kernels
from exact import SCALE, exact, solve
from ways import NO_EMULATOR

FAMILIES = ("sm80", "sm90")
BOTTOM = {"causal_alignment": "bottom_right"}
CASES = {  # a name ends in the head dim; every second is in bfloat16
    "dense-64": Case("", 128, 200, batch=1),
    "dense-128": Case("", 200, 130, batch=1),
    "causal-64": Case("", 200, options={"is_causal": True}),
    "causal-128": Case("", 70, 200, batch=1, options={"is_causal": True} | BOTTOM),
    "window-64": Case("", 200, batch=1, options={"local_window_size": (60, 9)}),
    "window-128": Case("", 150, 200, batch=1, options={"local_window_size": (31, 0)} | BOTTOM),
    "gqa-64": Case("", 130, batch=1, heads=4, kv_heads=2, options={"is_causal": True}),
    "mqa-128": Case("", 70, 130, batch=1, heads=4, kv_heads=1),
    "lengths-64": Case("", 150, batch=3, heads=1, options={
        "query_seq_lengths": (150, 33, 0), "key_value_seq_lengths": (17, 129, 150)}),
    "lengths-128": Case("", 130, 150, heads=1, options={"is_causal": True} | BOTTOM | {
        "query_seq_lengths": (130, 65), "key_value_seq_lengths": (64, 150)}),
    "bias-64": Case("", 100, 150, batch=1, bias=(1, 2, 100, 150)),
    "bias-128": Case("", 130, heads=2, kv_heads=1, batch=1, bias=(1, 1, 130, 130),
                     options={"is_causal": True}),
    "causal-96": Case("", 130, 200, batch=1, options={"is_causal": True} | BOTTOM),
    "gqa-192": Case("", 130, batch=1, heads=4, kv_heads=2, options={"is_causal": True}),
    "window-256": Case("", 150, 130, batch=1, options={"local_window_size": (60, 9)}),
}  # fmt: skip
CASES = {name: dataclasses.replace(case, name=name, head_dim=int(name.split("-")[1]))
         for name, case in CASES.items()}  # fmt: skip
DTYPES = {name: ("float16", "bfloat16")[n // 2 % 2] for n, name in enumerate(CASES)}
every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def emulated(call, name, family, deterministic=True):
    return kernels.run(call, DTYPES[name], family=family, deterministic=deterministic)


def on_gpu(call, name, family, deterministic=True):
    return run(call, DTYPES[name], implementation=f"cuda:{family}", deterministic=deterministic)


def same(actual, desired):
    """Bit for bit but lse, whose logarithm is each machine's own, and the gradient of bias, which
    is not rounded to 16 bits and shows the last bits of p. `desired` may have more."""
    actual = {name: np.asarray(x) for name, x in actual.items()}
    desired = {name: np.asarray(desired[name]) for name in actual}
    np.testing.assert_array_max_ulp(actual["lse"], desired["lse"].astype(np.float32), 2)
    if "bias" in actual:
        np.testing.assert_allclose(actual["bias"], desired["bias"], rtol=4e-6, atol=4e-6)
    bits = actual.keys() - {"lse", "bias"}
    assert_same_bits({n: actual[n] for n in bits}, {n: desired[n] for n in bits})


# The mean difference, as a share of the mean error that the precision of the inputs makes by itself
# (oracle, `low`). Exponentials off by 4e-6, more than a GPU's, give up to 0.017 and 0.07 of it.
SHARES = {"bfloat16": 1 / 20, "float16": 1 / 5}


def near(actual, desired, case, dtype):
    """N(0, 1): far below the judge's tolerance, which allows twice the error and more."""
    reference, low = expected(case, dtype), expected(case, dtype, precision=dtype)
    for name, x in actual.items():
        x, y = np.asarray(x), np.asarray(desired[name])
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x), finite, err_msg=name)
        place = np.abs(np.spacing(y[finite])).astype(np.float64)
        error = np.abs(low[name][finite] - reference[name][finite])
        difference = np.abs(x[finite].astype(np.float64) - y[finite].astype(np.float64))
        if name == "lse":
            assert difference.max() <= 1e-5, f"lse: off by {difference.max():.1e}"
            continue
        share = difference.mean() / error.mean()
        assert share <= SHARES[dtype], f"{name}: differs by {share:.3f} of the rounding error"
        assert (difference <= place + error.max()).all(), f"{name}: off by {difference.max():.1e}"


@NO_EMULATOR
@every_case
@every_family
def test_emulator_is_exact(name, family):
    """It returns float64's results, rounded where exact.py says and nowhere else."""
    dtype = DTYPES[name]
    call = exact(CASES[name], dtype)
    desired = solve(call, dtype)
    for gradient in ("query", "key", "value"):
        assert np.count_nonzero(desired[gradient]) > desired[gradient].size / 50
    same(emulated(call, name, family, deterministic=len(name) % 2 == 0), desired)


def test_factor_of_exact_scores_is_one():
    """scale * log2(e) as the kernels compute it, and the bias of exact.py in their units."""
    log2_e = np.float32(1.4426950408889634)
    assert np.float32(SCALE) * log2_e == 1
    for score in range(8):
        assert np.float32(np.float64(log2_e) * np.float32(SCALE) + score) == score + 1


@NO_EMULATOR
@pytest.mark.parametrize("name", ["causal-64", "gqa-64", "bias-128"])
def test_a_difference_is_seen(name):
    """Positive controls: one bit of exact results, and a scale that is a thousandth off."""
    dtype, case = DTYPES[name], CASES[name]
    desired = emulated(case, name, "sm80")
    near(desired, desired, case, dtype)
    other = dict(desired)
    other["key"] = desired["key"].copy()
    other["key"].reshape(-1).view(np.int16)[77] ^= 1
    with pytest.raises(AssertionError, match=r"1 of \d+ elements differ"):
        same(other, desired)
    scale = 1.001 / np.sqrt(case.head_dim)
    wrong = dataclasses.replace(case, options=case.options | {"scale": scale})
    with pytest.raises(AssertionError, match="of the rounding error"):
        near(emulated(wrong, name, "sm80"), desired, case, dtype)


@pytest.mark.gpu
@NO_EMULATOR
@every_case
@every_family
def test_exact_calls_agree(name, family):
    """Also with d_query summed in any order: its sums are exact too."""
    call = exact(CASES[name], DTYPES[name])
    desired = emulated(call, name, family)
    for deterministic in (True, False):
        same(on_gpu(call, name, family, deterministic), desired)


@pytest.mark.gpu
@NO_EMULATOR
@every_case
@every_family
def test_normal_calls_agree(name, family):
    case, dtype = CASES[name], DTYPES[name]
    near(on_gpu(case, name, family), emulated(case, name, family), case, dtype)
