"""Runs the package on a case and judges what it returns against the oracle.

The bound:  max|x - ref| <= k max|low - ref| + 2 max|(ref + 0.3 - 0.3) - ref|,  k = 2 for outputs
and 3 for gradients, where `ref` is the oracle in float64 from the inputs as rounded, `low` the
oracle's unfused steps in the input's precision, and the last term the rounding of the result's own
dtype.
"""

import importlib.util

import jax
import numpy as np
import pytest
from cases import PACKED
from oracle import attend

from jax_flashattn import attention, varlen_attention

HAS_KERNELS = importlib.util.find_spec("jax_flashattn._ext") is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="the package was built without kernels")

DIFFERENTIABLE = ("query", "key", "value", "bias", "scale", "sinks")
OUTPUT_FACTOR, GRADIENT_FACTOR = 2, 3
MOST_BITS = 1024
FLOAT32_SLACK = 2  # `low` is one order of summation, itself no better than any other


def traceable(case, dtype, *, lse_cotangent=True, gradients=True, **options):
    """A function of the arrays that are differentiated, for jit, which runs a case; the arrays."""
    arrays = case.arrays(dtype)
    primal = {name: arrays.pop(name) for name in DIFFERENTIABLE if name in arrays}
    d_out, d_lse = case.cotangents(dtype)

    def call(primal):
        if "cu_seqlens_q" in arrays:
            return packed_call(primal)
        out, lse = attention(**primal, **arrays, **case.static(), **options, return_lse=True)
        return (out, lse) if lse_cotangent else (out, jax.lax.stop_gradient(lse))

    def packed_call(primal):
        operands = primal | arrays
        for name in ("query", "key", "value", *PACKED):
            operands[name] = operands[name][0]
        results = varlen_attention(**operands, **case.static(), **options, return_lse=True)
        out, lse = (x[None] for x in results)
        return (out, lse) if lse_cotangent else (out, jax.lax.stop_gradient(lse))

    def forward_and_backward(primal):
        if not gradients:
            (out, lse), gradient = call(primal), {}
        else:
            (out, lse), pullback = jax.vjp(call, primal)
            gradient = pullback((d_out, d_lse))[0]
        return {"out": out, "lse": lse} | gradient

    return forward_and_backward, primal


def prepare(case, dtype, **options):
    """A function without arguments, compiled at its first call, that runs attention on a case."""
    function, primal = traceable(case, dtype, **options)
    compiled = jax.jit(function)
    return lambda: compiled(primal)


def run(case, dtype, **options):
    """{name: array} of out, lse and the gradients that attention gives for a case."""
    return prepare(case, dtype, **options)()


def expected(case, dtype, *, lse_cotangent=True, precision="float64"):
    """The same from the oracle."""
    d_out, d_lse = case.cotangents(dtype)
    results = attend(
        **with_seeds(case.arrays(dtype)), **case.static(), d_out=d_out,
        d_lse=d_lse if lse_cotangent else None, precision=precision,
    )  # fmt: skip
    return results | {"soft cap": case.static().get("logits_soft_cap") or 0}


def with_seeds(arrays):
    """A case's arrays with dropout_seeds, for those that know no keys, in place of dropout_key."""
    arrays = dict(arrays)
    if "dropout_key" in arrays:
        batch, _, heads, _ = arrays["query"].shape
        # One program for any number of heads: its first bits are those of a smaller array.
        bits = np.asarray(jax.random.bits(arrays.pop("dropout_key"), (MOST_BITS,), "uint32"))
        if 2 * batch * heads > MOST_BITS:
            raise ValueError(f"{batch} x {heads} seeds are more than with_seeds() makes")
        arrays["dropout_seeds"] = bits[: 2 * batch * heads].reshape(batch, heads, 2)
    return arrays


def judge(name, actual, reference, low, factor):
    """Raises AssertionError unless `actual` is within the bound of the module's docstring."""
    actual = np.asarray(actual)
    assert actual.shape == reference.shape, f"{name}: shape {actual.shape}, not {reference.shape}"
    x = actual.astype(np.float64)
    for kind, test in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = test(x) != test(reference)
        assert not wrong.any(), f"{name}: {kind} at other places, {_where(wrong, x, reference)}"
    finite = np.isfinite(reference)
    if not finite.any():
        return
    rounded = reference.astype(actual.dtype)
    offset = actual.dtype.type(0.3)
    with np.errstate(invalid="ignore"):  # inf - inf, and the -inf of lse
        rounding = np.abs(((rounded + offset) - offset).astype(np.float64) - reference)[finite]
        low_error = np.abs(np.asarray(low, np.float64) - reference)[finite]
        error = np.where(finite, np.abs(x - reference), 0)
    bound = factor * low_error.max() + 2 * rounding.max()
    worst = error == error.max()
    assert error.max() <= bound, (
        f"{name}: off by {error.max():.3e}, bound {bound:.3e}, {_where(worst, x, reference)}"
    )


def judge_lse(actual, reference, soft_cap=0):
    """The log-sum-exp stays in float32 whatever the inputs are, so its bound is absolute.

    That of a soft cap is as near as the kernels' tanh, whose relative error is 2^-11.
    """
    actual = np.asarray(actual)
    assert actual.dtype == np.float32, f"lse: dtype {actual.dtype}"
    zeros = np.zeros_like(reference)
    allowed = 1e-5 + 8e-6 * np.abs(reference) + 2**-11 * soft_cap
    allowed = np.where(np.isfinite(reference), allowed, 0)
    judge("lse", actual, reference, np.where(np.isfinite(reference), reference + allowed, zeros), 1)


def judge_scale(actual, reference, arrays, d_query):
    """d_scale = sum(q dq) / scale: q dq may cancel, so the bound is the rounding of its terms."""
    query = np.asarray(arrays["query"])
    terms = np.abs(query.astype(np.float64) * np.asarray(d_query).astype(np.float64)).sum()
    unit = np.finfo(np.float32).eps if query.dtype == np.float32 else 2.0**-8
    bound = 4 * unit * terms / abs(float(arrays["scale"]))
    assert abs(float(actual) - reference) <= bound, f"scale: {actual}, not {reference} ± {bound}"


def judge_sinks(actual, reference, dtype):
    """A sum over all rows, which may cancel, of terms that come from the rounded output."""
    unit = np.finfo(np.float32).eps if dtype == np.float32 else 2.0**-8
    error = np.abs(np.asarray(actual) - reference["sinks"])
    bound = 4 * unit * reference["sinks of absolute terms"] + 1e-30
    assert actual.dtype == np.float32, f"gradient of sinks: dtype {actual.dtype}"
    assert (error <= bound).all(), f"gradient of sinks: off by {error}, bound {bound}"


def judge_masked(actual, reference):
    """Rows that see nothing, and keys nobody sees, give exact zeros."""
    empty = np.isneginf(reference["lse"]).swapaxes(1, 2)  # [B, T, N]
    for name in ("out", "query"):
        if name in actual:
            rows = np.asarray(actual[name])[empty]
            assert not rows.any(), f"{name}: {np.count_nonzero(rows)} non-zeros in masked rows"
    # A key that is seen has weight in some output, unless dropout took that, but not its score.
    unseen = ~(reference["value"].any(axis=-1) | reference["key"].any(axis=-1))
    for name in ("key", "value"):
        if name in actual:
            rows = np.asarray(actual[name])[unseen]
            assert not rows.any(), f"{name}: {np.count_nonzero(rows)} non-zeros for unseen keys"


def judge_all(actual, reference, low, arrays, gradient_factor=GRADIENT_FACTOR):
    """Every output and gradient that `actual` has."""
    is_float32 = np.asarray(actual["out"]).dtype == np.float32
    slack = FLOAT32_SLACK if is_float32 else 1
    judge("out", actual["out"], reference["out"], low["out"], slack * OUTPUT_FACTOR)
    judge_lse(actual["lse"], reference["lse"], 0 if is_float32 else reference["soft cap"])
    for name in ("query", "key", "value", "bias"):
        if name in actual:
            gradient, like = np.asarray(actual[name]), np.asarray(arrays[name])
            assert gradient.dtype == like.dtype, f"gradient of {name}: dtype {gradient.dtype}"
            judge(
                f"gradient of {name}", gradient, reference[name], low[name], slack * gradient_factor
            )
    if "sinks" in actual:
        judge_sinks(actual["sinks"], reference, np.asarray(arrays["query"]).dtype)
    if "scale" in actual:
        judge_scale(actual["scale"], reference["scale"], arrays, reference["query"])
    judge_masked(actual, reference)


def check_case(case, dtype, *, lse_cotangent=True, **options):
    """Runs the package and the oracle on a case, and judges everything."""
    reference = expected(case, dtype, lse_cotangent=lse_cotangent)
    low = expected(case, dtype, lse_cotangent=lse_cotangent, precision=dtype)
    actual = run(case, dtype, lse_cotangent=lse_cotangent, **options)
    judge_all(actual, reference, low, case.arrays(dtype))


def assert_same_bits(actual, desired):
    """Two pytrees of arrays are bitwise equal."""
    leaves, others = jax.tree.leaves(actual), jax.tree.leaves(desired)
    assert len(leaves) == len(others)
    for x, y in zip(leaves, others, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        differing = np.count_nonzero(_bits(x) != _bits(y))
        assert differing == 0, f"{differing} of {x.size} elements differ"


def _bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def _where(wrong, actual, reference):
    index = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.ndim else ()
    return f"first at {index}: {actual[index]} where {reference[index]} was expected"
