"""The package on the CPU, its executable definition, against the oracle and against jax.nn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, LENGTHS, every_case, some_cases
from compare import DIFFERENTIABLE, assert_same_bits, check_case, run

from jax_flashattn import attention

HALF = ["bfloat16", "float16"]


@every_case()
def test_float32_equals_oracle(case):
    check_case(case, "float32")


@pytest.mark.parametrize("dtype", HALF)
@some_cases("dense-65x200", "causal-bottom_right-65x129", "gqa-bias-lengths", "bias-in-query-dtype",
            "mask-bias", "dim-40-value-72", "everything")  # fmt: skip
def test_half_types_equal_oracle_without_lse_cotangent(case, dtype):
    check_case(case, dtype, lse_cotangent=False)


@some_cases("everything", "lengths-causal-bottom-right")
def test_named_reference_is_what_none_picks_for_float32(case):
    assert_same_bits(run(case, "float32", implementation="xla"), run(case, "float32"))


@pytest.mark.parametrize("dtype", HALF)
def test_eager_equals_jit(dtype):
    case = CASES["gqa-bias-lengths"]
    arrays, static = case.arrays(dtype), case.static()
    eager = attention(**arrays, **static, return_lse=True)
    compiled = jax.jit(lambda a: attention(**a, **static, return_lse=True))(arrays)
    for x, y in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-2, atol=1e-2)


@some_cases(
    "dense-65x200", "causal-top_left-65x129", "window-(16,0)", "window-causal", "gqa-6-3-causal",
    "mqa-4-1", "bias-rank-70", "bias-rank-65x70", "bias-1x2x65x70", "mask-2x1x65x70", "mask-bias",
    "gqa-bias-lengths", "scale-static", "scale-traced",
)  # fmt: skip
def test_equals_jax_nn(case):
    """Values and gradients, where jax.nn means the same: top-left, no row without a key."""
    arrays = case.arrays("float32")
    primal = {name: arrays.pop(name) for name in DIFFERENTIABLE if name in arrays}
    d_out, _ = case.cotangents("float32")
    static = case.static()
    assert static.pop("causal_alignment", "top_left") == "top_left"

    def results(function, **options):
        def call(primal):
            return function(**primal, **arrays, **static, **options)

        out, pullback = jax.vjp(call, primal)
        return out, pullback(d_out)[0]

    ours = jax.jit(lambda: results(attention))()
    theirs = jax.jit(lambda: results(jax.nn.dot_product_attention, implementation="xla"))()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), ours, theirs)


def test_query_lengths_equal_jax_nn():
    """jax.nn computes rows past the length and zeroes them afterwards; the result is the same."""
    query, key, value = (CASES["dense-64x64"].arrays("float32")[n] for n in DIFFERENTIABLE[:3])
    lengths = {"query_seq_lengths": np.int32([20, 64]), "key_value_seq_lengths": np.int32([64, 33])}
    ours = attention(query, key, value, **lengths, is_causal=True)
    theirs = jax.nn.dot_product_attention(query, key, value, **lengths, is_causal=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("batched", [True, False], ids=["BTNH", "TNH"])
def test_residual_is_jax_nns(dtype, batched):
    """Shape, dtype and values of return_residual, and its place beside lse."""
    arrays = [CASES["gqa-4-2"].arrays(dtype)[name] for name in DIFFERENTIABLE[:3]]
    if not batched:
        arrays = [x[0] for x in arrays]
    out, residual = attention(*arrays, return_residual=True)
    _, theirs = jax.nn.dot_product_attention(
        *(jnp.float32(x) for x in arrays), return_residual=True, implementation="xla"
    )
    assert residual.shape == theirs.shape == out.shape[:-1]
    assert residual.dtype == arrays[1].dtype
    np.testing.assert_allclose(np.float32(residual), theirs, rtol=1e-2 if dtype in HALF else 1e-5)

    also_out, also_residual, lse = attention(*arrays, return_residual=True, return_lse=True)
    assert_same_bits((also_out, also_residual), (out, residual))
    assert lse.dtype == jnp.float32
    assert lse.shape == (*out.shape[:-3], out.shape[-2], out.shape[-3])
    assert_same_bits(lse.swapaxes(-1, -2).astype(residual.dtype), residual)


def test_residual_has_no_gradient_and_lse_has():
    query, key, value = (CASES["dense-64x64"].arrays("float32")[n] for n in DIFFERENTIABLE[:3])

    def gradient(**which):
        return jax.grad(lambda q: attention(q, key, value, **which)[1].sum())(query)

    assert not gradient(return_residual=True).any()
    assert gradient(return_lse=True).any()


@some_cases("everything", "gqa-bias-lengths")
def test_unbatched_layout(case):
    """TNH operands give the first batch entry's results."""
    arrays = case.arrays("float32")
    unbatched = {}
    for name, x in arrays.items():
        shared = name == "scale" or (name == "bias" and x.shape[0] == 1)
        unbatched[name] = x if shared else x[0]
    for lengths in ("scalar", "one"):
        if lengths == "one":
            unbatched |= {
                name: np.reshape(unbatched[name], 1) for name in LENGTHS if name in unbatched
            }
        out, lse = attention(**unbatched, **case.static(), return_lse=True)
        whole, whole_lse = attention(**arrays, **case.static(), return_lse=True)
        np.testing.assert_allclose(out, whole[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, whole_lse[0], rtol=1e-5, atol=1e-5)


def test_causal_takes_the_window_to_its_right_away():
    arrays = CASES["window-causal"].arrays("float32")
    closed = attention(**arrays, local_window_size=(20, 0))
    assert_same_bits(attention(**arrays, local_window_size=(20, 9), is_causal=True), closed)


@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float16", "float32", "int32"])
def test_bias_of_any_dtype(bias_dtype):
    arrays = CASES["dense-64x64"].arrays("float32")
    bias = np.random.default_rng(0).integers(-3, 4, (64, 64))
    like = attention(**arrays, bias=bias.astype(np.float32))
    assert_same_bits(attention(**arrays, bias=jnp.asarray(bias, bias_dtype)), like)


LIMIT = 4 * 2**30


def _temporary_bytes(function, dtype):
    shape = jax.ShapeDtypeStruct((1, 16384, 8, 64), dtype)
    compiled = jax.jit(function).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_sequences_fit_in_memory(dtype):
    """16k tokens and 8 heads: their scores alone would take 8 GiB."""

    def call(query, key, value):
        return attention(query, key, value, is_causal=True)

    def backward(*arrays):
        return jax.grad(lambda *a: call(*a).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    assert _temporary_bytes(call, dtype) < LIMIT
    assert _temporary_bytes(backward, dtype) < LIMIT


def test_memory_limit_would_catch_materialised_scores():
    """Positive control of the test above."""
    plain = lambda *a: jax.nn.dot_product_attention(*a, implementation="xla", is_causal=True)  # noqa: E731
    assert _temporary_bytes(plain, "float32") > LIMIT


def test_long_sequence_values():
    """More than one query chunk: 3000 rows, judged on some of them by a float64 softmax."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 5000, 4, 16)).astype(np.float32) for _ in range(3))
    out = np.asarray(jax.jit(lambda *a: attention(*a, is_causal=True))(query, key, value))
    for row in (0, 1, 511, 512, 1023, 1024, 2047, 2048, 4095, 4096, 4999):
        for head in (0, 3):
            s = key[0, : row + 1, head].astype(np.float64) @ query[0, row, head] / 4
            p = np.exp(s - s.max())
            np.testing.assert_allclose(
                out[0, row, head], p @ value[0, : row + 1, head] / p.sum(), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_products_ask_for_the_highest_precision(dtype):
    """Or a GPU would run the reference's float32 products in TF32."""
    arrays = CASES["dense-64x64"].arrays(dtype)
    text = jax.jit(
        jax.grad(lambda q: attention(q, arrays["key"], arrays["value"]).astype(jnp.float32).sum())
    ).lower(arrays["query"]).as_text()  # fmt: skip
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert all(line.rstrip().endswith("xf32>") for line in products)
