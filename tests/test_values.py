"""Extreme values: NaN, infinities, overflow. On the CPU the reference, on a GPU the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from compare import assert_same_bits

from jax_flashattn import attention

BATCH, LENGTH, HEADS, DIM = 2, 130, 2, 32
both_types = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture(params=["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def call(request):
    """attention with return_lse, jitted; its gradient function beside it."""

    def function(*arrays, **options):
        compiled = jax.jit(
            lambda *a: attention(*a, implementation=request.param, return_lse=True, **options)
        )
        return tuple(np.array(x) for x in compiled(*arrays))

    def gradients(d_out, *arrays, **options):
        def one(*a):
            return attention(*a, implementation=request.param, **options)

        pullback = jax.jit(lambda d, *a: jax.vjp(one, *a)[1](d))
        return tuple(np.asarray(x) for x in pullback(d_out, *arrays))

    function.gradients = gradients
    return function


def _inputs(dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    return [normal(rng, (BATCH, LENGTH, HEADS, DIM), dtype) for _ in range(3)]


def test_nan_query_row_stays_in_its_row(call):
    query, key, value = _inputs()
    clean, clean_lse = call(query, key, value)
    query[1, 7, 0, 3] = np.nan
    out, lse = call(query, key, value)
    assert np.isnan(out[1, 7, 0].astype(np.float32)).all()
    assert np.isnan(lse[1, 0, 7])
    out[1, 7, 0], lse[1, 0, 7] = clean[1, 7, 0], clean_lse[1, 0, 7]
    assert_same_bits((out, lse), (clean, clean_lse))


def test_nan_key_reaches_only_rows_that_see_it(call):
    query, key, value = _inputs()
    clean, _ = call(query, key, value, is_causal=True)
    key[0, 70, 1, 0] = np.nan
    out, lse = call(query, key, value, is_causal=True)
    assert np.isnan(out[0, 70:, 1].astype(np.float32)).all()
    assert np.isnan(lse[0, 1, 70:]).all()
    out[0, 70:, 1] = clean[0, 70:, 1]
    assert_same_bits(out, clean)


@both_types
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_padding_never_reaches_anything(call, poison, dtype):
    """Keys and values past key_value_seq_lengths, query rows past query_seq_lengths."""
    query, key, value = _inputs(dtype)
    d_out = _inputs(dtype, seed=1)[0]
    lengths = {
        "query_seq_lengths": np.int32([90, 13]),
        "key_value_seq_lengths": np.int32([65, 128]),
    }
    clean = call(query, key, value, **lengths), call.gradients(d_out, query, key, value, **lengths)
    for b in range(BATCH):
        query[b, lengths["query_seq_lengths"][b] :] = poison
        d_out[b, lengths["query_seq_lengths"][b] :] = poison
        key[b, lengths["key_value_seq_lengths"][b] :] = poison
        value[b, lengths["key_value_seq_lengths"][b] :] = poison
    dirty = call(query, key, value, **lengths), call.gradients(d_out, query, key, value, **lengths)
    assert_same_bits(dirty, clean)


def test_keys_out_of_the_window_never_reach_a_row(call):
    query, key, value = _inputs()
    options = {"local_window_size": (10, 5)}
    clean, _ = call(query, key, value, **options)
    key[:, 60:], value[:, 60:] = key[:, 60:] * 3 + 1, -value[:, 60:]
    out, _ = call(query, key, value, **options)
    assert_same_bits(out[:, :55], clean[:, :55])
    assert (out[:, 55:] != clean[:, 55:]).any(axis=(0, 2, 3)).all()


def close(actual, desired):
    """What differs by rounding alone: a bias is added where a mask leaves scores as they are."""
    for x, y in zip(actual, desired, strict=True):
        tolerance = 1e-5 if x.dtype == np.float32 else 2e-2
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=tolerance, rtol=tolerance)


def test_bias_of_minus_infinity_masks(call):
    """A row all -inf gives 0 and -inf; -inf elsewhere acts as the mask does, in gradients too."""
    query, key, value = _inputs()
    d_out = _inputs(seed=1)[0]
    mask = np.random.default_rng(0).random((1, 1, LENGTH, LENGTH)) < 0.5
    mask[..., 5, :] = False
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    out, lse = call(query, key, value, bias)
    assert not out[:, 5].any()
    assert np.isneginf(lse[:, :, 5]).all()
    close((out, lse), call(query, key, value, None, mask))
    ours = call.gradients(d_out, query, key, value, bias)
    assert np.isfinite(ours[3]).all()
    assert not ours[3][..., 5, :].any()
    close(ours[:3], call.gradients(d_out, query, key, value, None, mask)[:3])


@pytest.mark.parametrize(
    ("dtype", "large"), [("float16", 65504.0), ("bfloat16", 65536.0), ("bfloat16", 133120.0)]
)
def test_large_values_do_not_overflow(call, dtype, large):
    """Scores of up to 1e11, in float32; equal keys weigh equally."""
    shape = (1, 70, 1, 32)
    query = key = np.full(shape, large, jnp.dtype(dtype))
    value = _inputs(dtype)[2][:1, :70, :1]
    out, lse = call(query, key, value)
    mean = value.astype(np.float32).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out.astype(np.float32), np.broadcast_to(mean, shape), atol=2e-2)
    np.testing.assert_allclose(lse, large**2 * np.sqrt(32) + np.log(70), rtol=1e-5)


@both_types
def test_gradients_of_large_values(call, dtype):
    """One key outweighs all others by thousands: a probability of 1, whose d_score is 0."""
    query, _, value = (x[:, :70] for x in _inputs(dtype))
    d_out = _inputs(dtype, seed=1)[0][:, :70]
    query[...], key = 100, np.zeros_like(query)
    key[:, 5] = 100
    d_query, d_key, d_value = (np.float32(x) for x in call.gradients(d_out, query, key, value))
    total = d_out.astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(d_value[:, 5], total, rtol=2.0**-8, atol=0.02)
    assert not d_value[:, np.arange(70) != 5].any()
    # What is left of d_score is the rounding of a product in float32, times 100 in each of 70 rows.
    for gradient in (d_query, d_key):
        assert np.abs(gradient).max() < 0.1


@both_types
def test_subnormal_values(call, dtype):
    """Equal weights of 2 and 4 times the smallest number; of bfloat16 it may count as 0."""
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    query, key = (np.full_like(x, tiny) for x in _inputs(dtype)[:2])
    value = np.where(np.arange(LENGTH)[:, None, None] % 2, 4, 2) * np.full_like(query, tiny)
    d_out = _inputs(dtype, seed=1)[0]
    out, lse = call(query, key, value.astype(query.dtype))
    slack = 0 if dtype == "float16" else float(jnp.finfo(dtype).smallest_normal)
    np.testing.assert_allclose(np.float64(out), 3 * tiny, rtol=0, atol=slack)
    np.testing.assert_allclose(lse, np.log(LENGTH), rtol=1e-6)
    d_query, d_key, d_value = call.gradients(d_out, query, key, value.astype(query.dtype))
    mean = np.float32(d_out).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(np.float32(d_value), np.broadcast_to(mean, out.shape), atol=2e-3)
    for gradient in (d_query, d_key):
        assert np.abs(np.float32(gradient)).max() < 1e-3


def test_infinite_scores_stay_in_their_rows(call):
    """+inf, once or twice in a row: inf - inf is NaN, as in jax.nn; other rows keep their bits."""
    query, key, value = _inputs()
    bias = np.zeros((1, 1, LENGTH, LENGTH), np.float32)
    clean = call(query, key, value, bias)
    bias[..., 3, 100], bias[..., 70, [2, 129]] = np.inf, np.inf
    out, lse = call(query, key, value, bias)
    for row in (3, 70):
        assert np.isnan(np.float32(out[:, row])).all()
        assert np.isnan(lse[..., row]).all()
        out[:, row], lse[..., row] = clean[0][:, row], clean[1][..., row]
    assert_same_bits((out, lse), clean)


def test_scale_on_the_device_of_any_value(call):
    """0 weighs all keys equally; NaN and infinity give NaN, but 0 where a row sees nothing."""
    query, key, value = _inputs()
    lengths = np.int32([90, 0])
    out, lse = call(query, key, value, scale=jnp.float32(0), query_seq_lengths=lengths)
    mean = np.float32(value).mean(axis=1, keepdims=True)[:1]
    np.testing.assert_allclose(
        np.float32(out[:1, :90]), np.broadcast_to(mean, (1, 90, HEADS, DIM)), atol=2e-3
    )
    np.testing.assert_allclose(lse[0, :, :90], np.log(LENGTH), rtol=1e-6)
    for scale in (np.nan, np.inf, -np.inf):
        out, lse = call(query, key, value, scale=jnp.float32(scale), query_seq_lengths=lengths)
        assert np.isnan(np.float32(out[0, :90])).all()
        assert np.isnan(lse[0, :, :90]).all()
        assert not out[0, 90:].any()
        assert not out[1].any()
        assert np.isneginf(lse[1]).all()


def test_one_hot_values_show_the_mask_exactly(call):
    """Constant keys and one-hot values: out is the probability matrix, 1/count where visible."""
    length = 64
    query = np.zeros((1, length, 1, length), np.float16)
    value = np.eye(length, dtype=np.float16)[None, :, None]
    out, lse = call(query, query, value, local_window_size=(9, 2))
    i, j = np.indices((length, length))
    visible = (j >= i - 9) & (j <= i + 2)
    count = visible.sum(axis=1, keepdims=True)
    assert_same_bits(out[0, :, 0] != 0, visible)
    np.testing.assert_allclose(out[0, :, 0].astype(np.float32), visible / count, rtol=1e-3)
    np.testing.assert_allclose(lse[0, 0], np.log(count[:, 0]), rtol=1e-5)


def test_scaling_by_powers_of_two_is_exact(call):
    query, key, value = _inputs()
    clean = call(query, key, value, scale=0.25)
    assert_same_bits(call(query * np.asarray(4, query.dtype), key, value, scale=0.0625), clean)


@both_types
def test_very_small_lse_keeps_its_gradient(call, dtype):
    """Scores near -1e4 everywhere: exp(s) underflows, exp(s - lse) does not."""
    query, key, value = _inputs(dtype)
    d_out = _inputs(dtype, seed=1)[0]
    plain = call.gradients(d_out, query, key, value)
    bias = np.full((1, 1, 1, 1), -8192, np.float32)
    shifted = call.gradients(d_out, query, key, value, bias)
    for x, y in zip(plain, shifted, strict=False):
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(
    "neutral",
    [
        {"local_window_size": (None, None)},
        {"local_window_size": (2**31 - 1, 10**12)},
        {"query_seq_lengths": np.int32([LENGTH, LENGTH + 9])},
        {"key_value_seq_lengths": np.int32([LENGTH, LENGTH + 9])},
        {"causal_alignment": "bottom_right"},
        {"scale": 1 / np.sqrt(DIM)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_neutral_options_change_no_bit(call, neutral):
    arrays = _inputs()
    assert_same_bits(call(*arrays, **neutral), call(*arrays))


@pytest.mark.parametrize(
    "option",
    [
        {"is_causal": True},
        {"local_window_size": (3, 0)},
        {"query_seq_lengths": np.int32([3, 4])},
        {"key_value_seq_lengths": np.int32([3, 4])},
        {"scale": 0.5},
        {
            "is_causal": True,
            "causal_alignment": "bottom_right",
            "query_seq_lengths": np.int32([50, 60]),
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_options_change_the_output(call, option):
    arrays = _inputs()
    assert (call(*arrays, **option)[0] != call(*arrays)[0]).any()
