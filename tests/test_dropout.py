"""Dropout: its generator against the standard, statistics of masks, one mask on every path."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ways import WAYS, Call, parts, way_params

from jax_flashattn import _dropout, attention

B, N, T, S = 3, 4, 70, 96


@pytest.fixture(params=way_params("reference", "emulator", "gpu"))
def run(request):
    return WAYS[request.param]


# The generator -----------------------------------------------------------------------------------

# Counter, key and result of philox2x32 with 10 rounds in kat_vectors of Random123.
KNOWN = [
    ((0x00000000, 0x00000000, 0x00000000), (0xFF1DAE59, 0x6CD10DF2)),
    ((0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), (0x2C3F628B, 0xAB4FD7AD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E), (0xDD7CE038, 0xF62A4C12)),
]


@pytest.mark.parametrize(("given", "desired"), KNOWN)
def test_philox_is_the_standards(given, desired):
    made = _dropout.philox2x32(*map(jnp.uint32, given), rounds=10)
    assert tuple(map(int, made)) == desired
    fewer = _dropout.philox2x32(*map(jnp.uint32, given), rounds=9)
    assert tuple(map(int, fewer)) != desired


def test_the_rounds_are_those_of_big_crush():
    given = KNOWN[2][0]
    default = _dropout.philox2x32(*map(jnp.uint32, given))
    assert_same_bits(default, _dropout.philox2x32(*map(jnp.uint32, given), rounds=7))


# The mask ----------------------------------------------------------------------------------------


def random_bits(seed, batch=B, heads=N, rows=256, keys=256):
    """What decides about each score, uint16 as float64 [batch, heads, rows, keys]."""
    seeds = jax.random.bits(jax.random.key(seed), (batch, heads, 2), jnp.uint32)
    row, key = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.arange(keys, dtype=jnp.int32)
    bits = _dropout.random_bits(
        seeds[:, :, None, None], row.astype(jnp.uint32), key.astype(jnp.uint32)
    )
    return np.asarray(bits).astype(np.float64)


def correlation(x, y):
    """In units of what it is for independent numbers."""
    x, y = (z.ravel() - z.mean() for z in (x, y))
    return (x @ y) / math.sqrt((x @ x) * (y @ y)) * math.sqrt(x.size)


def test_bits_are_uniform():
    bits = random_bits(0)
    assert bits.min() >= 0
    assert bits.max() < 2**16
    counts = np.bincount((bits.ravel() // 256).astype(int), minlength=256)
    mean = bits.size / 256
    chi_square = ((counts - mean) ** 2 / mean).sum()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)
    low = bits[:, :, np.arange(256) % 16 < 8][..., np.arange(256) % 32 < 8] % 256
    counts = np.bincount(low.ravel().astype(int), minlength=256)
    assert abs(((counts - mean / 8) ** 2 / (mean / 8)).sum() - 255) < 4 * math.sqrt(2 * 255)


def test_eight_scores_share_their_lower_bits():
    """And no more scores do; each score's upper bits are its own."""
    bits = random_bits(4, batch=1, heads=1, rows=32, keys=64)[0, 0]
    low = (bits % 256).reshape(2, 2, 8, 2, 4, 8)  # blocks of 16 x 32, of 2 x 4 octets
    np.testing.assert_array_equal(low, np.broadcast_to(low[:, :1, :, :, :1], low.shape))
    one, high = low[:, 0, :, :, 0].ravel(), (bits // 256).ravel()
    for x in (one, high):
        assert abs((x == np.roll(x, 1)).mean() - 1 / 256) < 0.02


@pytest.mark.parametrize("shift", [1, 2, 7, 8, 9, 15, 16, 17, 32, 64, 128])
@pytest.mark.parametrize("axis", [2, 3], ids=["rows", "keys"])
def test_neighbours_are_uncorrelated(axis, shift):
    """At the distances at which scores share a counter (8), a block (16) or a tile, and others."""
    bits = random_bits(1)
    x, y = np.split(bits, [shift], axis)[1], np.split(bits, [bits.shape[axis] - shift], axis)[0]
    assert abs(correlation(x, y)) < 4.5
    both = (np.roll(bits, shift, 2), np.roll(bits, -shift, 3))
    assert abs(correlation(*both)) < 4.5


def test_heads_batches_and_keys_are_uncorrelated():
    """Also each row with the others, and a mask with its transpose and with itself reversed."""
    bits, other = random_bits(2), random_bits(3)
    flat = bits.reshape(B * N, -1)
    pairs = [(flat[i], flat[j]) for i in range(len(flat)) for j in range(i)]
    above = np.triu_indices(256, 1)
    pairs += [(bits, other), (bits[(..., *above)], bits.swapaxes(2, 3)[(..., *above)])]
    pairs += [(bits[:, :, :128], bits[:, :, :127:-1])]
    assert max(abs(correlation(x, y)) for x, y in pairs) < 4.5
    rows = bits[0, 0] - bits[0, 0].mean()
    matrix = np.corrcoef(rows) * math.sqrt(rows.shape[1])
    np.fill_diagonal(matrix, 0)
    assert np.abs(matrix).max() < 5.5  # of 32640 pairs


def test_correlation_is_noticed():
    """Positive control: a generator of one round, whose neighbours are alike."""
    row, key = jnp.uint32(jnp.arange(256)[:, None]), jnp.uint32(jnp.arange(256))
    bits, _ = _dropout.philox2x32(*jnp.broadcast_arrays(row, key), jnp.uint32(5), rounds=1)
    bits = np.asarray(bits & 0xFFFF).astype(np.float64)
    assert abs(correlation(bits[:, 1:], bits[:, :-1])) > 20


# Masks as attention shows them: with equal scores and one-hot values, out is the mask itself.


def shown(**options):
    """A Call whose out [B, T, N, S] is the mask, and whose dv [B, S, N, T] is its transpose."""
    call = Call("dropout-shown", T, S, batch=B, heads=N, value_dim=S, options=options)
    arrays = call.arrays()
    dtype = arrays["query"].dtype
    value = np.broadcast_to(np.eye(S, dtype=dtype)[:, None], (B, S, N, S))
    d_out = np.zeros((B, T, N, S), dtype)
    d_out[:, np.arange(T), :, np.arange(T)] = 1
    return call.on(query=0 * arrays["query"], value=value, d_out=d_out)


def mask_of(results):
    return np.asarray(results["out"]).astype(np.float32) != 0


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5, 0.9])
def test_rate_and_scale(run, rate):
    """As many are kept as should be, each of them 1 / (1 - rate) times what it is otherwise."""
    out = np.asarray(run(shown(dropout_rate=rate), gradients=False)["out"]).astype(np.float32)
    kept, count = out != 0, out.size
    assert abs(kept.mean() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / count)
    np.testing.assert_allclose(out[kept], 1 / (1 - rate) / S, rtol=2.0**-8)


def test_forward_and_gradient_drop_the_same(run):
    results = run(shown(dropout_rate=0.4))
    kept = mask_of(results).transpose(0, 3, 2, 1)  # [B, S, N, T]
    gradient = np.asarray(results["value"]).astype(np.float32)[..., :T] != 0
    np.testing.assert_array_equal(gradient, kept)


def test_lse_is_that_of_all_keys(run):
    call = Call("dropout-lse", T, S)
    dropped = parts(run(call.but(dropout_rate=0.5), gradients=False), names=("lse",))
    np.testing.assert_allclose(
        dropped["lse"], run(call, gradients=False)["lse"], rtol=1e-6, atol=1e-5
    )


def test_the_mask_depends_on_position_alone(run):
    """Not on lengths, tiles, window, or what the arrays hold; on entry, head and key it does."""
    call = shown(dropout_rate=0.4)
    kept = mask_of(run(call, gradients=False))
    arrays = call.arrays()
    fewer = call.on(query=arrays["query"][:, :37], dropout_key=arrays["dropout_key"])
    assert_same_bits(mask_of(run(fewer, gradients=False)), kept[:, :37])
    window = mask_of(run(call.but(local_window_size=(40, 0)), gradients=False))
    i, j = np.arange(T)[:, None, None], np.arange(S)
    assert_same_bits(window, kept & (j <= i) & (j >= i - 40))
    again = mask_of(run(call.on(dropout_key=arrays["dropout_key"] + 1), gradients=False))
    for other in (again, np.roll(kept, 1, axis=0), np.roll(kept, 1, axis=2)):
        assert 0.4 < (kept == other).mean() < 0.64  # 0.6^2 + 0.4^2 = 0.52 by chance


def test_rate_0_is_none(run):
    """Bit for bit, with a key or without; a rate that rounds to 0 too."""
    call = Call("dropout-zero", T, S, options={"is_causal": True})
    plain = parts(run(call))
    for rate in (0.0, 2.0**-18):
        assert_same_bits(parts(run(call.but(dropout_rate=rate))), plain)


def test_expectation_is_attention_without_dropout():
    """The mean over 200 keys, in units of its own standard error."""
    keys = jax.random.split(jax.random.key(7), 200)
    call = Call("dropout-mean", 40, 50, options={"is_causal": True})
    query, key, value = (call.arrays("float32")[name] for name in ("query", "key", "value"))
    d_out = call.cotangents("float32")[0]

    def results(**dropout):
        def one(*arrays):
            return attention(*arrays, is_causal=True, **dropout)

        out, pullback = jax.vjp(one, query, key, value)
        return [out, *pullback(d_out)]

    samples = jax.jit(jax.vmap(lambda k: results(dropout_rate=0.2, dropout_key=k)))(keys)
    plain = results()
    for name, x, exact in zip(("out", "query", "key", "value"), samples, plain, strict=True):
        x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
        error, deviation = x.mean(axis=0) - exact, x.std(axis=0) / math.sqrt(len(keys))
        varies = deviation > 1e-4
        assert varies.mean() > 0.5
        z = error[varies] / deviation[varies]
        if name in ("out", "value"):  # linear in the mask; dq and dk hold its square
            assert abs(z.mean()) < 5 * z.std() / math.sqrt(T)
        assert np.abs(z).max() < 6, name


# Transformations ---------------------------------------------------------------------------------

KEY = jax.random.key(11)


def inputs(batch=4):
    rng = np.random.default_rng(4)
    shapes = [(batch, 24, 4, 16), (batch, 24, 2, 16), (batch, 24, 2, 16)]
    return [jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes]


def loss(query, key, value, dropout_key=KEY, **options):
    out = attention(
        query, key, value, is_causal=True, dropout_rate=0.3, dropout_key=dropout_key, **options
    )
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()


GRADIENT = jax.value_and_grad(loss, (0, 1, 2))


def close(actual, desired):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), actual, desired
    )


def other_key_differs(actual, desired):
    """Positive control of a comparison by close()."""
    with pytest.raises(AssertionError):
        close(actual, desired)


def test_jit_and_eager():
    close(jax.jit(GRADIENT)(*inputs()), GRADIENT(*inputs()))
    other_key_differs(GRADIENT(*inputs(), jax.random.key(12)), GRADIENT(*inputs()))
    traced = jax.jit(GRADIENT)(*inputs(), KEY)
    close(traced, GRADIENT(*inputs()))


@pytest.mark.parametrize("mapped", ["keys", "arrays", "both"])
def test_vmap(mapped):
    """A key for each lane; or one for all, and then one mask for all, as jax's own dropout has."""
    keys, lanes = jax.random.split(KEY, 3), [jnp.stack([x, 2 * x, -x]) for x in inputs(2)]
    array_axis, key_axis = (None if mapped == "keys" else 0), (None if mapped == "arrays" else 0)
    arrays = inputs(2) if array_axis is None else lanes
    axes = (array_axis,) * 3 + (key_axis,)
    key = KEY if key_axis is None else keys
    actual = jax.jit(jax.vmap(GRADIENT, axes))(*arrays, key)
    each = [
        GRADIENT(*(x if array_axis is None else x[i] for x in arrays),
                 KEY if key_axis is None else keys[i])
        for i in range(3)
    ]  # fmt: skip
    close(actual, jax.tree.map(lambda *x: jnp.stack(x), *each))


def test_vmap_of_unbatched_has_the_mask_of_each_key():
    """Lanes without batch are entries 0 of calls of their own, not entries of one call."""
    keys = jax.random.split(KEY, 4)
    lanes = jax.vmap(loss)(*inputs(), keys)
    close(lanes, jnp.stack([loss(*(x[i] for x in inputs()), keys[i]) for i in range(4)]))


def test_remat_and_scan_draw_the_same_mask():
    for policy in (None, jax.checkpoint_policies.save_only_these_names("flash_attention_out")):
        remat = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
        close(jax.jit(remat)(*inputs()), GRADIENT(*inputs()))
    keys = jax.random.split(KEY, 3)

    def total(query, key, value):
        return jax.lax.scan(lambda c, k: (c + loss(query, key, value, k), None), 0.0, keys)[0]

    unrolled = [GRADIENT(*inputs(), k) for k in keys]
    desired = jax.tree.map(lambda *x: sum(x), *unrolled)
    close(jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*inputs()), desired)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_sharding_keeps_the_mask(cpu_mesh, explicit):
    """Batch and heads over eight devices: the mask of one device."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = cpu_mesh((4, 2), ("data", "model"), kind)
    desired = jax.jit(GRADIENT)(*inputs())
    sharding = NamedSharding(mesh, P("data", None, "model", None))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in inputs()]

        def total(*arrays):
            out = attention(*arrays, is_causal=True, dropout_rate=0.3, dropout_key=KEY)
            weights = jnp.cos(jnp.arange(out.size).reshape(out.shape))
            weights = jax.device_put(weights, sharding) if explicit else weights
            return (out * weights).sum()

        close(jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*placed), desired)


def test_shard_map_masks_by_the_key_it_is_given(cpu_mesh):
    """Each device has a call of its own; fold_in of its index gives it a mask of its own."""
    mesh = cpu_mesh((4, 2), ("data", "model"))

    def local(*arrays):
        index = jax.lax.axis_index(("data", "model"))
        return attention(*arrays, dropout_rate=0.3, dropout_key=jax.random.fold_in(KEY, index))

    spec = P("data", None, "model")
    out = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))(*inputs())
    query, key, value = inputs()
    for i in range(8):
        entry, head = np.s_[i // 2 : i // 2 + 1], i % 2
        piece = [
            x[entry, :, head * n : head * n + n] for x, n in ((query, 2), (key, 1), (value, 1))
        ]
        alone = attention(*piece, dropout_rate=0.3, dropout_key=jax.random.fold_in(KEY, i))
        close(out[entry, :, head * 2 : head * 2 + 2], alone)
