"""The judge itself: the oracle's gradients are derivatives, and wrong results are rejected."""

import numpy as np
import pytest
from cases import CASES, EVERYTHING, Case, some_cases
from compare import assert_same_bits, expected, judge_all
from oracle import attend, visible_keys

SMALL = Case(
    "small", 5, 7, heads=4, kv_heads=2, head_dim=3, value_dim=2,
    bias=(1, 4, 1, 7), mask=(2, 1, 5, 7), traced_scale=0.7,
    options={"is_causal": True, "key_value_seq_lengths": (7, 3)},
)  # fmt: skip


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "scale"])
def test_oracle_gradient_is_the_derivative(name):
    """Central differences of sum(out d_out) + sum(lse d_lse) along a random direction."""
    arrays = SMALL.arrays("float64")
    d_out, d_lse = SMALL.cotangents("float64")

    def loss(arrays):
        result = attend(**arrays, **SMALL.static())
        lse = np.where(np.isfinite(result["lse"]), result["lse"], 0)
        return (result["out"] * d_out).sum() + (lse * d_lse).sum()

    gradient = attend(**arrays, **SMALL.static(), d_out=d_out, d_lse=d_lse)[name]
    direction = np.random.default_rng(0).standard_normal(np.shape(arrays[name]))
    step = 1e-5
    up, down = (arrays | {name: arrays[name] + sign * step * direction} for sign in (1, -1))
    slope = (loss(up) - loss(down)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, ["11111", "11111", "11111"]),
        ({"is_causal": True}, ["10000", "11000", "11100"]),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, ["11100", "11110", "11111"]),
        ({"local_window_size": 1}, ["11000", "11100", "01110"]),
        ({"local_window_size": (0, None)}, ["11111", "01111", "00111"]),
        ({"local_window_size": (None, 0)}, ["10000", "11000", "11100"]),
        (
            {"local_window_size": (1, 0), "causal_alignment": "bottom_right"},
            ["01100", "00110", "00011"],
        ),
        ({"query_seq_lengths": [2], "key_value_seq_lengths": [3]}, ["11100", "11100", "00000"]),
        (
            {
                "query_seq_lengths": [2],
                "key_value_seq_lengths": [3],
                "is_causal": True,
                "causal_alignment": "bottom_right",
            },
            ["11000", "11100", "00000"],
        ),
    ],
)
def test_oracle_visibility_drawn_by_hand(options, rows):
    drawn = ["".join("01"[int(x)] for x in row) for row in visible_keys(1, 3, 5, **options)[0]]
    assert drawn == rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@some_cases("dense-65x200", "everything", "lengths-all-zero")
def test_judge_accepts_rounded_oracle(case, dtype):
    reference, low, actual = _judged(case, dtype)
    judge_all(actual, reference, low, case.arrays(dtype))


def _one_element(x):
    x.flat[x.size // 2] += np.asarray(0.25, x.dtype)


def _one_row(x):
    x[-1, -1] = x[0, 0]


MUTANTS = {
    "one element off": _one_element,
    "zeros": lambda x: x.fill(0),
    "heads swapped": lambda x: x.__setitem__(slice(None), x[:, :, ::-1].copy()),
    "batches swapped": lambda x: x.__setitem__(slice(None), x[::-1].copy()),
    "one row from elsewhere": _one_row,
    "NaN": lambda x: x.__setitem__((0,) * x.ndim, np.nan),
    "inf": lambda x: x.__setitem__((0,) * x.ndim, np.inf),
    "five percent too large": lambda x: np.multiply(x, 1.05, out=x, casting="unsafe"),
}


@pytest.mark.parametrize("name", ["out", "query", "key", "value"])
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_judge_rejects_mutants(dtype, mutant, name):
    case = CASES["dense-64x64"]
    reference, low, actual = _judged(case, dtype)
    mutant(actual[name])
    with pytest.raises(AssertionError, match=name):
        judge_all(actual, reference, low, case.arrays(dtype))


@pytest.mark.parametrize("name", ["out", "query", "lse"])
def test_judge_rejects_anything_in_a_masked_row(name):
    reference, low, actual = _judged(EVERYTHING, "bfloat16")
    index = (2, 0, 0) if name == "lse" else (2, 0, 0, 0)  # batch 2 has no query row
    actual[name][index] = -1e30 if name == "lse" else 1e-30
    with pytest.raises(AssertionError, match=name):
        judge_all(actual, reference, low, EVERYTHING.arrays("bfloat16"))


def test_judge_rejects_lse_in_another_base_and_wrong_dtypes():
    case = CASES["dense-64x64"]
    arrays = case.arrays("bfloat16")
    for name, change in (
        ("lse", lambda x: x / np.float32(np.log(2))),
        ("lse", lambda x: x.astype(np.float64)),
        ("lse", lambda x: x + np.float32(1e-3)),
        ("query", lambda x: x.astype(np.float32)),
    ):
        reference, low, actual = _judged(case, "bfloat16")
        actual[name] = change(actual[name])
        with pytest.raises(AssertionError, match=name):
            judge_all(actual, reference, low, arrays)


def test_same_bits_tells_apart():
    x = np.float32([0.0, np.nan, 1.0])
    assert_same_bits([x], [x.copy()])
    for other in (np.float32([-0.0, np.nan, 1.0]), np.nextafter(x, 2), x.astype(np.float64)):
        with pytest.raises(AssertionError):
            assert_same_bits([x], [other])


def _judged(case, dtype):
    """Reference, low, and a right answer: the reference rounded to what the package returns."""
    reference, low = expected(case, dtype), expected(case, dtype, precision=dtype)
    arrays = case.arrays(dtype)
    types = {name: np.asarray(x).dtype for name, x in arrays.items()}
    types |= {"out": types["query"], "lse": np.dtype(np.float32)}
    actual = {name: np.array(reference[name], types[name]) for name in reference if name in types}
    return reference, low, actual
