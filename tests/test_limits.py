"""Sizes at which counters, offsets and grids overflow, and what the smallest GPU offers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from compare import assert_same_bits, expected, judge_all, needs_kernels
from emulator import kernels
from ways import ALONE_ON_THE_GPU, NO_EMULATOR

from jax_flashattn import _ffi, attention
from jax_flashattn._options import Operands, Options

on_gpu = functools.partial(attention, implementation="cuda")
TAIL = 24  # how much is cut off the end of a long axis and computed again alone
BOTTOM = {"causal_alignment": "bottom_right"}


def periodic(shape, seed, dtype=jnp.bfloat16):
    """N(0, 1) values that repeat along the longest axis: cheap to make at any size."""
    axis = int(np.argmax(shape))
    period = min(shape[axis], 1009)
    values = jax.random.normal(jax.random.key(seed), (*shape[:axis], period, *shape[axis + 1 :]))
    return jnp.take(values.astype(dtype), jnp.arange(shape[axis]) % period, axis)


def close(actual, desired, atol=2e-2):
    for x, y in zip(actual, desired, strict=True):
        assert np.any(np.asarray(y))
        np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=2e-2, atol=atol)


# On any machine ----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("general", [False, True], ids=["plain", "general"])
def test_every_kernel_fits_the_smallest_gpu(general):
    """The portable family in the 99 KiB that a block has on 8.6, 8.9 and 12.0."""
    device = _ffi.Device(86, 99 * 1024)
    for head_dim in _ffi.extension.build_info()["head_dims"]:
        array = jax.ShapeDtypeStruct((2, 300, 4, head_dim), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((1, 4, 300, 300), jnp.float32) if general else None
        for backward, deterministic in ((False, False), (True, False), (True, True)):
            options = Options(deterministic=deterministic, bias_gradient=general and backward)
            operands = Operands(array, array, array, bias)
            plan = _ffi.plan(operands, options, backward=backward, device=device)
            assert plan.family == "sm80"
            assert plan.head_dim == head_dim
            less = _ffi.Device(86, plan.shared_memory_bytes - 1)
            with pytest.raises(NotImplementedError, match="bytes of shared memory in a block"):
                _ffi.plan(operands, options, backward=backward, device=less)


@needs_kernels
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "length", "heads"])
def test_extents_beyond_int32_are_refused(axis):
    """When traced, by a named implementation; None takes the reference."""
    shape = [1, 1, 1, 8]
    shape[axis] = 2**31
    arrays = [jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16)] * 3
    with pytest.raises(NotImplementedError, match=r"2\^31|is longer than"):
        jax.eval_shape(on_gpu, *arrays)
    assert jax.eval_shape(attention, *arrays).shape == tuple(shape)


@NO_EMULATOR
def test_one_query_and_many_keys_emulated():
    """More keys than 15 bits count."""
    case = Case("decode-long", 1, 2**15 + 9, batch=1, heads=1, head_dim=8)
    actual = kernels.run(case, "bfloat16", gradients=False)
    reference, low = expected(case, "bfloat16"), expected(case, "bfloat16", precision="bfloat16")
    judge_all(actual, reference, low, case.arrays("bfloat16"))


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@ALONE_ON_THE_GPU
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("k_len", [2**15 + 1, 2**16 + 1, 2**17, 2**20 + 1])
def test_few_queries_and_many_keys(k_len, q_len):
    query = periodic((2, q_len, 4, 64), 0)
    key, value = (periodic((2, k_len, 2, 64), seed) for seed in (1, 2))
    lengths = jnp.array([k_len, k_len - 70], jnp.int32)

    def call(implementation):
        return attention(
            query, key, value, is_causal=True, key_value_seq_lengths=lengths, return_lse=True,
            implementation=implementation, **BOTTOM,
        )  # fmt: skip

    close(call("cuda"), call("xla"), atol=1e-3)


@pytest.mark.gpu
@ALONE_ON_THE_GPU
@pytest.mark.parametrize("length", [2**15 - 7, 2**15 + 1, 2**16 + 1, 2**17 + 1])
def test_long_sequences(length):
    """The last rows of causal attention, forward and backward, equal a call on them alone."""
    arrays = [periodic((1, length, 2, 64), seed) for seed in range(4)]

    @jax.jit
    def results(query, key, value, d_out):
        call = functools.partial(on_gpu, is_causal=True, return_lse=True, **BOTTOM)
        out, pullback, lse = jax.vjp(call, query, key, value, has_aux=True)
        d_query, d_key, d_value = pullback(d_out)
        # Of the last keys, what rows before them cannot add to.
        tails = (x[:, -TAIL:] for x in (out, d_query, d_key, d_value))
        return lse[..., -TAIL:], *tails

    query, key, value, d_out = arrays
    desired = results(query[:, -TAIL:], key, value, d_out[:, -TAIL:])
    close(results(*arrays), desired, atol=5e-3)


MANY = {"heads": (1, 70_000), "batches": (70_000, 1), "heads and batches": (300, 300)}


@pytest.mark.gpu
@ALONE_ON_THE_GPU
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", MANY)
def test_more_than_65535_heads_and_batches(name, deterministic):
    """In every kernel, those for a bias and for a fixed order of sums included."""
    batch, heads = MANY[name]
    shapes = [(batch, 24, heads, 8), (batch, 40, heads, 8), (batch, 40, heads, 8)]
    shapes += [(batch, heads, 24, 40), (batch, 24, heads, 8)]
    arrays = [periodic(shape, seed) for seed, shape in enumerate(shapes)]
    axes = [0] * 5 if heads == 1 else [2, 2, 2, 1, 2]

    @jax.jit
    def results(query, key, value, bias, d_out):
        call = functools.partial(on_gpu, deterministic=deterministic, is_causal=True)
        out, pullback = jax.vjp(call, query, key, value, bias)
        return out, *pullback(d_out)

    def end(arrays, axes):
        return [jax.lax.slice_in_dim(x, x.shape[axis] - TAIL, None, axis=axis)
                for x, axis in zip(arrays, axes, strict=True)]  # fmt: skip

    of_results = [axes[0], *axes[:4]]
    large = end(results(*arrays), of_results)
    small = results(*end(arrays, axes))
    close(large, small)
    assert_same_bits(large[0], small[0])
    if deterministic:
        assert_same_bits(large, small)


@pytest.mark.gpu
@ALONE_ON_THE_GPU
def test_many_sequences_of_one_token():
    """A softmax over one key is 1: out is the value, and its gradient that of out."""
    arrays = [periodic((100_000, 1, 2, 8), seed) for seed in range(4)]
    query, key, value, d_out = arrays

    @jax.jit
    def results(query, key, value, d_out):
        call = functools.partial(on_gpu, is_causal=True, return_lse=True)
        out, pullback, lse = jax.vjp(call, query, key, value, has_aux=True)
        return out, lse, *pullback(d_out)

    out, lse, d_query, d_key, d_value = results(query, key, value, d_out)
    assert_same_bits((out, d_value), (value, d_out))
    scores = (np.float32(query) * np.float32(key)).sum(axis=-1) / np.sqrt(8)
    np.testing.assert_allclose(lse[..., 0], scores[:, 0], rtol=1e-5, atol=1e-5)
    for gradient in (d_query, d_key):  # of a constant
        assert np.abs(np.float32(gradient)).max() < 1e-4


@pytest.mark.gpu
@ALONE_ON_THE_GPU
def test_mask_of_more_than_2_to_the_31_elements():
    length, tail = 46_400, 64
    limit = jax.devices()[0].memory_stats()["bytes_limit"] / 2**30
    if limit < 20:
        pytest.skip(f"needs 20 GiB of device memory, jax may use {limit:.0f}")
    query, key, value, d_out = (periodic((1, length, 1, 64), seed) for seed in range(4))
    mask = periodic((1, 1, length, length), 5) > 0.5

    @jax.jit
    def results(query, mask, d_out):
        out, pullback = jax.vjp(lambda q: on_gpu(q, key, value, None, mask), query)
        return out[:, -tail:], pullback(d_out)[0][:, -tail:]

    large = results(query, mask, d_out)
    assert not mask[0, 0, -1].all()
    close(large, results(query[:, -tail:], mask[:, :, -tail:], d_out[:, -tail:]), atol=1e-3)
