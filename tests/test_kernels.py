"""The CUDA kernels against the float64 oracle, and what only kernels can get wrong."""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, EVERYTHING, every_case, normal, some_cases
from compare import assert_same_bits, check_case, prepare, run
from order import TILE, Cancelling
from ways import ALONE_ON_THE_GPU

from jax_flashattn import attention

pytestmark = pytest.mark.gpu
kernels = functools.partial(attention, implementation="cuda")


CASE_TESTS = {  # the test: what it passes to check_case
    "test_bfloat16_equals_oracle": {"dtype": "bfloat16"},
    "test_float16_equals_oracle_without_lse_cotangent": {
        "dtype": "float16",
        "lse_cotangent": False,
    },
}


@pytest.fixture(scope="module")
def checked(request):
    """checked(test, case) judges a case. All those selected start at once, in threads: most of the
    time is XLA's compilation, which runs without Python's lock.
    """
    selected = [item for item in request.session.items if item.originalname in CASE_TESTS]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {}
        for item in selected:
            case, options = item.callspec.params["case"], CASE_TESTS[item.originalname]
            started[item.originalname, case.name] = pool.submit(
                check_case, case, **options, implementation="cuda"
            )
        yield lambda test, case: started[test, case.name].result()


@every_case()
def test_bfloat16_equals_oracle(case, checked):
    checked("test_bfloat16_equals_oracle", case)


@every_case()
def test_float16_equals_oracle_without_lse_cotangent(case, checked):
    checked("test_float16_equals_oracle_without_lse_cotangent", case)


@some_cases("dense-65x200", "causal-bottom_right-65x129", "gqa-bias-lengths", "dim-136",
            "bias-1x1x65x70", "everything")  # fmt: skip
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_deterministic_backward_equals_oracle(case, dtype):
    check_case(case, dtype, deterministic=True, implementation="cuda")


@some_cases("dense-1000x1000", "causal-1000", "dim-256", "everything")
def test_none_picks_the_kernels(case):
    named = run(case, "bfloat16", gradients=False, implementation="cuda")
    assert_same_bits(run(case, "bfloat16", gradients=False), named)
    text = jax.jit(attention).lower(*_inputs((1, 64, 2, 64))).compile().as_text()
    assert "jax_flashattn_fwd_v2" in text


@some_cases("dense-1000x1000", "window-narrow-1000", "gqa-6-3-causal", "dim-192-value-128",
            "mask-bias", "everything")  # fmt: skip
def test_forward_repeats_bit_for_bit(case):
    results = prepare(case, "bfloat16", gradients=False, implementation="cuda")
    first = results()
    for _ in range(20):
        assert_same_bits(results(), first)


@some_cases("dense-1000x1000", "causal-1000", "gqa-6-3-causal", "bias-1x1x65x70", "dim-256",
            "everything")  # fmt: skip
def test_deterministic_backward_repeats_bit_for_bit(case):
    results = prepare(case, "bfloat16", deterministic=True, implementation="cuda")
    first = results()
    for _ in range(20):
        assert_same_bits(results(), first)


@pytest.mark.parametrize(
    "dims", [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)]
)
def test_deterministic_backward_repeats_a_thousand_times(dims):
    rng = np.random.default_rng(0)
    shapes = [(2, 300, heads, dims[n // 2]) for n, heads in enumerate((4, 2, 2, 4))]
    *operands, d_out = (jnp.asarray(normal(rng, shape, "bfloat16")) for shape in shapes)

    @jax.jit
    def gradients(*operands):
        call = functools.partial(kernels, is_causal=True, deterministic=True)
        return jax.vjp(call, *operands)[1](d_out)

    @jax.jit
    def differing(x, y):
        return sum(jnp.count_nonzero(a != b) for a, b in zip(x, y, strict=True))

    first = gradients(*operands)
    counts = [differing(gradients(*operands), first) for _ in range(1000)]  # nothing waits
    assert sum(int(n) > 0 for n in counts) == 0
    assert int(differing(gradients(operands[0] * 2, *operands[1:]), first)) > 0


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_additions_to_dq_come_in_the_order_of_keys(head_dim):
    """With sums that show their order; without `deterministic` they do."""
    shape = {"heads": 8, "kv_heads": 4, "head_dim": head_dim}
    case = Cancelling("cancelling", 700, 24 * TILE, **shape)
    in_order, in_any = (
        prepare(case, "float16", deterministic=deterministic, implementation="cuda")
        for deterministic in (True, False)
    )
    first = in_order()["query"]
    for _ in range(50):
        np.testing.assert_array_equal(in_order()["query"], first)
    assert any((in_any()["query"] != first).any() for _ in range(50))


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nan_past_the_key_length_changes_no_bit(head_dim, is_causal):
    query, key, value, d_out = (np.array(x) for x in _inputs((2, 200, 2, head_dim), count=4))
    lengths = np.int32([3, 129])

    @jax.jit
    def results(query, key, value):
        call = functools.partial(
            kernels, is_causal=is_causal, key_value_seq_lengths=lengths, deterministic=True
        )
        out, pullback = jax.vjp(call, query, key, value)
        return out, pullback(d_out)

    clean = results(query, key, value)
    for b, length in enumerate(lengths):
        key[b, length:], value[b, length:] = np.nan, np.nan
    assert_same_bits(results(query, key, value), clean)


@pytest.mark.parametrize("head_dim", [64, 200])
def test_transposed_and_sliced_operands(head_dim):
    """XLA hands over row-major copies: a packed qkv and BNTH operands give the same bits."""
    query, key, value = _inputs((2, 65, 4, head_dim))
    desired = kernels(query, key, value)
    packed = jax.jit(lambda qkv: kernels(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]))
    assert_same_bits(packed(jnp.stack([query, key, value], 2)), desired)
    swapped = jax.jit(lambda *a: kernels(*(x.swapaxes(1, 2) for x in a)))
    assert_same_bits(swapped(*(x.swapaxes(1, 2) for x in (query, key, value))), desired)


def test_vmap_equals_loop():
    query, key, value = (jnp.stack([x, -x, x * 2], 1) for x in _inputs((2, 65, 4, 64)))
    mapped = jax.jit(jax.vmap(kernels, in_axes=(1, 1, None)))(query, key, value[:, 0])
    for i in range(3):
        desired = kernels(query[:, i], key[:, i], value[:, 0])
        np.testing.assert_allclose(np.float32(mapped[i]), np.float32(desired), atol=1e-2)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0), (0, 0, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("general", [False, True], ids=["plain", "bias-mask"])
def test_empty_axes(shape, general):
    batch, q_len, k_len = shape
    query = jnp.ones((batch, q_len, 2, 64), jnp.bfloat16)
    key = jnp.ones((batch, k_len, 2, 64), jnp.bfloat16)
    extra = (jnp.ones((batch, 2, q_len, k_len)), jnp.ones((q_len, k_len), bool)) if general else ()

    @jax.jit
    def results(query, key, value):
        call = functools.partial(kernels, return_lse=True)
        (out, lse), pullback = jax.vjp(lambda *a: call(*a, *extra), query, key, value)
        return out, lse, pullback((out, jnp.ones_like(lse)))

    out, lse, gradients = results(query, key, key)
    assert out.shape == query.shape
    assert not out.any()
    assert lse.shape == (batch, 2, q_len)
    assert np.isneginf(lse).all()
    for gradient, like in zip(gradients, (query, key, key), strict=True):
        assert gradient.shape == like.shape
        assert not gradient.any()


ROWS = 2**20 + 8  # by 16 heads of 128: more than 2^31 elements a batch entry, 2^32 in two
TAIL = 192  # what is cut off the end of the long axis, and computed again alone
BOTTOM = {"local_window_size": (100, 0), "causal_alignment": "bottom_right"}
SHORT, LONG = (2, 64, 16, 128), (2, ROWS, 16, 128)
STRESS = {  # shape of query, of key, options, the long axis of query, of key, GiB needed
    "70000 heads": ((1, 24, 70000, 8), (1, 24, 70000, 8), {}, 2, 2, 2),
    "70000 batches": ((70000, 24, 1, 8), (70000, 24, 1, 8), {}, 0, 0, 2),
    "2^32 query elements": (LONG, SHORT, {}, 1, None, 60),
    "2^32 key elements": (SHORT, LONG, BOTTOM, None, 1, 60),  # the window sees the last keys alone
}


@ALONE_ON_THE_GPU
@pytest.mark.parametrize("name", STRESS)
def test_addresses_past_32_bits(name):
    """The end of a large call equals a small call on it alone, in gradients too."""
    query_shape, key_shape, options, query_axis, key_axis, gib = STRESS[name]
    _need_memory(gib)

    @jax.jit
    def results(query, key, value, d_out):
        out, pullback = jax.vjp(functools.partial(kernels, **options), query, key, value)
        return out, *pullback(d_out)

    def end(x, axis):
        return x if axis is None else jax.lax.slice_in_dim(x, x.shape[axis] - TAIL, None, axis=axis)

    operands = [_periodic(query_shape, 1), _periodic(key_shape, 2), _periodic(key_shape, 3)]
    operands.append(_periodic(query_shape, 4))
    axes = (query_axis, key_axis, key_axis, query_axis)
    pieces = [end(x, axis) for x, axis in zip(operands, axes, strict=True)]
    small = results(*pieces)
    large = results(*operands)
    # Of out, dq, dk, dv; but the gradients of keys that every row sees depend on all rows.
    axes = (query_axis,) * 2 + (() if key_axis is None else (key_axis,) * 2)
    for whole, part, axis in zip(large, small, axes, strict=False):
        desired = np.float32(part)
        assert desired.any()
        np.testing.assert_allclose(np.float32(end(whole, axis)), desired, rtol=2e-2, atol=2e-2)


@ALONE_ON_THE_GPU
def test_bias_of_more_than_2_to_the_31_elements():
    _need_memory(40)
    length = 46400
    query, key, value = (_periodic((1, length, 1, 64), i) for i in range(3))
    bias = _periodic((1, 1, length, length), 5, jnp.float32)

    @jax.jit
    def results(query, key, value, bias):
        out, pullback = jax.vjp(kernels, query, key, value, bias)
        d_query, _, _, d_bias = pullback(jnp.ones_like(out) + query)
        return out[:, -64:], d_query[:, -64:], d_bias[:, :, -64:]

    large = results(query, key, value, bias)
    small = results(query[:, -64:], key, value, bias[:, :, -64:])
    for x, y in zip(large, small, strict=True):
        assert np.any(y)
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-2, atol=1e-3)


def _periodic(shape, seed, dtype=jnp.bfloat16):
    """N(0, 1) values that repeat along the longest axis: cheap to make at any size."""
    axis = int(np.argmax(shape))
    period = 1009
    block = list(shape)
    block[axis] = period
    values = jax.random.normal(jax.random.key(seed), block, dtype)
    return jnp.take(values, jnp.arange(shape[axis]) % period, axis)


def _need_memory(gib):
    limit = jax.devices()[0].memory_stats()["bytes_limit"] / 2**30
    if limit < gib:
        pytest.skip(f"needs {gib} GiB of device memory, jax may use {limit:.0f}")


def _inputs(shape, count=3, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(normal(rng, shape, dtype)) for _ in range(count)]


def test_error_bound_is_not_vacuous():
    """Positive control: the kernels judged as if the scale were two percent larger fail."""
    case = CASES["dense-1000x1000"]
    with pytest.raises(AssertionError):
        check_case(case, "float16", implementation="cuda", scale=1.02 / np.sqrt(case.head_dim))
    check_case(EVERYTHING, "float16", implementation="cuda")
