"""Where operands come from: views of larger arrays, numpy, unaligned memory, donation, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from compare import assert_same_bits

from jax_flashattn import attention

PLATFORMS = ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH, LENGTH, HEADS, DIM = 2, 65, 2, 64


def inputs(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [normal(rng, (BATCH, LENGTH, HEADS, DIM), "bfloat16") for _ in range(count)]


def results(implementation, query, key, value):
    """The output and the gradients of query, key and value."""
    call = functools.partial(
        attention, is_causal=True, deterministic=True, implementation=implementation
    )
    out, pullback = jax.vjp(call, query, key, value)
    return out, *pullback(jnp.asarray(inputs(1, seed=1)[0]))


@functools.cache
def compiled(implementation):
    return jax.jit(functools.partial(results, implementation))


def agree(implementation, actual, desired):
    """Kernels give the same bits; XLA may fuse the reference with what surrounds it."""
    if implementation == "cuda":
        assert_same_bits(actual, desired)
    for x, y in zip(actual, desired, strict=True):
        assert np.count_nonzero(np.float32(y)) > np.size(y) / 2
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=4e-3, rtol=2e-2)


def _shifted(x):
    """The array one element into a flat one."""
    return jnp.concatenate([jnp.full(1, jnp.nan, x.dtype), x.ravel()])


VIEWS = {  # an operand as it is stored, and back to [B, T, N, H] inside jit
    "heads first": (lambda x: x.swapaxes(1, 2), lambda x: x.swapaxes(1, 2)),
    "length last": (lambda x: x.transpose(0, 2, 3, 1), lambda x: x.transpose(0, 3, 1, 2)),
    "sliced": (lambda x: jnp.pad(x, ((0, 0), (3, 2), (1, 1), (0, 8)), constant_values=jnp.nan),
               lambda x: x[:, 3:-2, 1:-1, :-8]),
    "every second row": (lambda x: jnp.stack([x, x * jnp.nan], 2).reshape(BATCH, -1, HEADS, DIM),
                         lambda x: x[:, ::2]),
    "backwards": (lambda x: x[:, ::-1], lambda x: x[:, ::-1]),
    "unaligned": (_shifted, lambda x: x[1:].reshape(BATCH, LENGTH, HEADS, DIM)),
}  # fmt: skip


@pytest.mark.parametrize("implementation", PLATFORMS)
@pytest.mark.parametrize("name", VIEWS)
def test_views(name, implementation):
    store, view = VIEWS[name]
    viewed = jax.jit(lambda *stored: results(implementation, *map(view, stored)))
    stored = [store(jnp.asarray(x)) for x in inputs()]
    if (name, implementation) == ("unaligned", "cuda"):
        # XLA hands a slice to a custom call without copying it, wherever it begins.
        with pytest.raises(jax.errors.JaxRuntimeError, match="16 bytes"):
            jax.block_until_ready(viewed(*stored))
        return
    agree(implementation, viewed(*stored), compiled(implementation)(*inputs()))


@pytest.mark.parametrize("implementation", PLATFORMS)
@pytest.mark.parametrize("axis", [2, 3], ids=["[B, T, 3, N, H]", "[B, T, N, 3 H]"])
def test_packed_query_key_and_value(axis, implementation):
    """One array; its gradient is packed as well."""

    def pack(arrays):
        return jnp.stack(arrays, 2) if axis == 2 else jnp.concatenate(arrays, 3)

    def unpack(packed):
        return [packed[:, :, n] for n in range(3)] if axis == 2 else jnp.split(packed, 3, 3)

    def call(packed):
        query, key, value = unpack(packed)
        return attention(
            query, key, value, is_causal=True, deterministic=True, implementation=implementation
        )

    @jax.jit
    def packed_results(packed):
        out, pullback = jax.vjp(call, packed)
        return out, *unpack(pullback(jnp.asarray(inputs(1, seed=1)[0]))[0])

    packed = pack([jnp.asarray(x) for x in inputs()])
    agree(implementation, packed_results(packed), compiled(implementation)(*inputs()))


def _unaligned(x):
    """The same values one byte past an address that is a multiple of 64."""
    memory = np.zeros(x.nbytes + 65, np.uint8)
    start = -memory.ctypes.data % 64 + 1
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[:] = x
    return copy


def _read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


NUMPY = {
    "contiguous": lambda x: x,
    "column-major": np.asfortranarray,
    "backwards": lambda x: x[:, ::-1].copy()[:, ::-1],
    "unaligned": _unaligned,
    "read-only": _read_only,
}


@pytest.mark.parametrize("implementation", PLATFORMS)
def test_numpy_arrays(implementation):
    call = compiled(implementation)
    desired = call(*map(jnp.asarray, inputs()))
    for name, change in NUMPY.items():
        arrays = [change(x) for x in inputs()]
        assert arrays[0].flags.aligned == (name != "unaligned")
        assert_same_bits(call(*arrays), desired)
        assert_same_bits(arrays, inputs())  # nobody wrote into them


@pytest.mark.parametrize("implementation", PLATFORMS)
def test_one_array_for_several_operands(implementation):
    """As in self-attention without projections, and a cache that holds keys and values as one."""
    call = compiled(implementation)
    x, y = (jnp.asarray(x) for x in inputs(2))
    assert_same_bits(call(x, x, x), call(x, x.copy(), x + 0))
    assert_same_bits(call(x, y, y), call(x, y.copy(), y + 0))


@pytest.mark.parametrize("implementation", PLATFORMS)
@pytest.mark.parametrize("donated", [(0,), (0, 1, 2)], ids=str)
def test_donated_operands(donated, implementation):
    """XLA may put results where donated operands lie: nothing is read after it is overwritten."""
    arrays = [jnp.asarray(x) for x in inputs()]
    desired = jax.block_until_ready(compiled(implementation)(*arrays))
    in_place = jax.jit(functools.partial(results, implementation), donate_argnums=donated)
    for _ in range(3):
        given = [x.copy() for x in arrays]
        agree(implementation, in_place(*given), desired)
        assert [x.is_deleted() for x in given] == [n in donated for n in range(3)]


def test_operands_on_different_devices():
    """An error of jax, which leaves ours as they were."""
    devices = jax.devices("cpu")
    arrays = [jax.device_put(x, d) for x, d in zip(inputs(), devices[1:4], strict=True)]
    for call in (attention, jax.jit(attention)):
        with pytest.raises(ValueError, match="incompatible devices"):
            call(*arrays)
        together = [jax.device_put(x, devices[3]) for x in inputs()]
        out = call(*together)
        assert out.devices() == {devices[3]}
        agree("xla", [out], [attention(*inputs())])
