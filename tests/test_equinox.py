"""The Equinox layer against Equinox's own."""

import importlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashattn.equinox import MultiheadAttention, from_equinox

B, T, S, HEADS, SIZE = 3, 20, 28, 4, 32
KEY = jax.random.key(0)
MASK = jax.random.bernoulli(jax.random.key(5), 0.7, (HEADS, T, S)).at[..., 0].set(True)
SIZES = {
    "defaults": {},
    "sizes and biases": {
        "key_size": 24,
        "value_size": 40,
        "output_size": 12,
        "qk_size": 16,
        "vo_size": 24,
        **{f"use_{name}_bias": True for name in ("query", "key", "value", "output")},
    },
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def inputs(options, *batch):
    sizes = SIZE, options.get("key_size", SIZE), options.get("value_size", SIZE)
    lengths = T, S, S
    return [normal(i, *batch, n, c) for i, (n, c) in enumerate(zip(lengths, sizes, strict=True))]


def close(actual, expected, tolerance=2e-5):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


def run(layer, arrays, mask=None, mask_axis=None):
    """Output of the vmapped layer; gradients of its weights and inputs."""

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def gradients(layer_and_arrays, mask):
        layer, arrays = layer_and_arrays
        call = lambda q, k, v, mask: layer(q, k, v, mask=mask)  # noqa: E731
        out = jax.vmap(call, in_axes=(0, 0, 0, mask_axis))(*arrays, mask)
        return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    (layer, arrays), out = gradients((layer, arrays), mask)
    projections = layer.query_proj, layer.key_proj, layer.value_proj, layer.output_proj
    return out, projections, arrays


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("mask", "axis"),
    [
        (None, None),
        (MASK[0], None),
        (MASK, None),
        (MASK[:B], 0),  # [B, T, S]: one for each sequence
        (jnp.stack([MASK, MASK[::-1], MASK[:, ::-1]], axis=2), 2),  # [H, T, B, S]
    ],
    ids=["none", "TS", "HTS", "vmapped TS", "vmapped HTS"],
)
def test_values_and_gradients(options, mask, axis):
    module = eqx.nn.MultiheadAttention(HEADS, SIZE, **options, key=KEY)
    arrays = inputs(options, B)
    actual = run(from_equinox(module), arrays, mask, axis)
    expected = run(module, arrays, mask, axis)
    close(actual, expected)


@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
def test_same_key_same_weights(options):
    layer = MultiheadAttention(HEADS, SIZE, **options, key=KEY)
    module = eqx.nn.MultiheadAttention(HEADS, SIZE, **options, key=KEY)
    close(eqx.filter(layer, eqx.is_array), eqx.filter(module, eqx.is_array), 0)
    close(layer(*inputs(options)), module(*inputs(options)))


def test_from_equinox_shares_its_arrays():
    module = eqx.nn.MultiheadAttention(
        HEADS, SIZE, use_key_bias=True, dropout_p=0.25, inference=True, key=KEY
    )
    layer = from_equinox(module, is_causal=True, local_window_size=(4, 0))
    arrays = eqx.filter(module, eqx.is_array)
    for a, b in zip(
        jax.tree.leaves(eqx.filter(layer, eqx.is_array)), jax.tree.leaves(arrays), strict=True
    ):
        assert a is b
    assert (layer.dropout.p, layer.dropout.inference) == (0.25, True)
    assert layer.num_kv_heads == HEADS
    assert layer.is_causal
    assert layer.local_window_size == (4, 0)
    # A layer without its arrays, as eqx.partition leaves it, keeps its place in the tree.
    _, rest = eqx.partition(module, eqx.is_array)
    assert from_equinox(rest).query_proj.weight is None


def test_grouped_heads_are_repeated_heads():
    layer = MultiheadAttention(HEADS, SIZE, num_kv_heads=2, key=KEY)
    assert layer.key_proj.weight.shape == layer.value_proj.weight.shape == (2 * 8, SIZE)

    def repeated(linear):
        weight = linear.weight.reshape(2, 8, SIZE)
        return jnp.repeat(weight, HEADS // 2, axis=0).reshape(HEADS * 8, SIZE)

    module = eqx.tree_at(
        lambda m: [m.query_proj, m.key_proj.weight, m.value_proj.weight, m.output_proj],
        eqx.nn.MultiheadAttention(HEADS, SIZE, key=jax.random.key(1)),
        [layer.query_proj, repeated(layer.key_proj), repeated(layer.value_proj), layer.output_proj],
    )
    close(layer(*inputs({})), module(*inputs({})))
    with pytest.raises(ValueError, match="num_heads=4 and num_kv_heads=3"):
        MultiheadAttention(HEADS, SIZE, num_kv_heads=3, key=KEY)


def band(left, right, offset=0):
    i, j = jnp.arange(T)[:, None] + offset, jnp.arange(S)
    return (j >= i - left) & (j <= i + right)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({"is_causal": True}, band(S, 0)),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, band(S, 0, S - T)),
        ({"local_window_size": (4, 2)}, band(4, 2)),
        ({"local_window_size": 3, "is_causal": True}, band(3, 0)),
    ],
    ids=str,
)
def test_options(options, mask):
    module = eqx.nn.MultiheadAttention(HEADS, SIZE, key=KEY)
    close(from_equinox(module, **options)(*inputs({})), module(*inputs({}), mask=mask))


def test_scale():
    module = eqx.nn.MultiheadAttention(HEADS, SIZE, key=KEY)
    sharper = eqx.tree_at(lambda m: m.query_proj.weight, module, 2 * module.query_proj.weight)
    close(from_equinox(module, scale=2 / 8**0.5)(*inputs({})), sharper(*inputs({})))


def test_lengths_by_vmap():
    module = eqx.nn.MultiheadAttention(HEADS, SIZE, key=KEY)
    arrays, lengths = inputs({}, B), jnp.array([5, S, 1], jnp.int32)
    masks = jnp.broadcast_to(jnp.arange(S) < lengths[:, None, None], (B, T, S))
    layer = from_equinox(module)
    actual = jax.vmap(lambda q, k, v, n: layer(q, k, v, key_value_seq_lengths=n))(*arrays, lengths)
    close(actual, jax.vmap(module)(*arrays, masks))
    rows = jnp.array([T, 3, 0], jnp.int32)
    actual = jax.vmap(lambda q, k, v, n: layer(q, k, v, query_seq_lengths=n))(*arrays, rows)
    visible = (jnp.arange(T) < rows[:, None])[..., None]
    close(actual, jnp.where(visible, jax.vmap(module)(*arrays), 0))  # no output bias


def test_process_heads():
    rotate = eqx.nn.RotaryPositionalEmbedding(8)

    def process_heads(query, key, value):
        return jax.vmap(rotate, 1, 1)(query), jax.vmap(rotate, 1, 1)(key), value

    module = eqx.nn.MultiheadAttention(HEADS, SIZE, key=KEY)
    close(
        from_equinox(module)(*inputs({}), process_heads=process_heads),
        module(*inputs({}), process_heads=process_heads),
    )
    with pytest.raises(ValueError, match="process_heads must not change shapes"):
        from_equinox(module)(*inputs({}), process_heads=lambda q, k, v: (q, k, v[:1]))


def test_a_row_that_sees_nothing_gives_the_output_bias():
    layer = MultiheadAttention(HEADS, SIZE, use_output_bias=True, key=KEY)
    out = layer(*inputs({}), mask=jnp.zeros((T, S), bool))
    close(out, jnp.broadcast_to(layer.output_proj.bias, (T, SIZE)), 0)


RATE = 0.3
DROPPING = eqx.nn.MultiheadAttention(HEADS, SIZE, dropout_p=RATE, key=KEY)


def test_dropout_has_the_mean_and_variance_of_equinoxs():
    keys = jax.random.split(jax.random.key(8), 400)

    def statistics(layer):
        one = jax.jit(lambda key: layer(*inputs({}), key=key))
        outs = np.asarray(jax.lax.map(one, keys), np.float64)
        return outs.mean(axis=0), outs.var(axis=0)

    mean, variance = statistics(from_equinox(DROPPING))
    theirs, their_variance = statistics(DROPPING)
    error = np.sqrt(variance / len(keys))
    exact = eqx.nn.inference_mode(DROPPING)(*inputs({}))
    assert np.abs((mean - exact) / error).max() < 5.5
    assert np.abs((mean - theirs) / error).max() < 5.5 * np.sqrt(2)
    np.testing.assert_allclose(variance.mean(), their_variance.mean(), rtol=0.03)


def test_dropout_in_training_and_inference():
    """Gradients flow; each sequence and each key has its mask; inference has none."""
    layer, plain = from_equinox(DROPPING), eqx.nn.inference_mode(DROPPING)
    arrays, keys = inputs({}, B), jax.random.split(KEY, B)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(layer, keys):
        out = jax.vmap(lambda q, k, v, key: layer(q, k, v, key=key))(*arrays, keys)
        return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape))

    one, other, again = loss(layer, keys), loss(layer, keys[::-1]), loss(layer, keys)
    close(again, one, 0)
    assert jnp.abs(one[0] - other[0]) > 0.01
    for x, y in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        assert jnp.isfinite(x).all()
        assert jnp.abs(x - y).max() > 0.01
    mapped = jax.vmap(lambda *x: layer(*x[:3], key=x[3]))(*arrays, keys)
    close(mapped, jnp.stack([layer(*(x[i] for x in arrays), key=keys[i]) for i in range(B)]))
    close(layer(*inputs({}), inference=True), plain(*inputs({})))
    close(eqx.nn.inference_mode(layer)(*inputs({}), key=KEY), plain(*inputs({})))
    back = eqx.nn.inference_mode(layer)(*inputs({}), key=KEY, inference=False)
    close(back, layer(*inputs({}), key=KEY), 0)
    close(jax.jit(lambda layer: layer(*inputs({}), inference=True))(layer), plain(*inputs({})))


def test_dropout_without_a_key_or_a_known_rate():
    layer = from_equinox(DROPPING)
    for call in (layer, eqx.filter_jit(layer), DROPPING):
        with pytest.raises(RuntimeError, match="key"):
            call(*inputs({}))
    with pytest.raises(RuntimeError, match=r"p=0.3.*inference_mode"):
        eqx.nn.inference_mode(layer)(*inputs({}), inference=False)
    with pytest.raises(TypeError, match="filter_jit"):
        jax.jit(lambda layer: layer(*inputs({}), key=KEY))(layer)


def test_segments_sinks_and_slopes():
    layer = MultiheadAttention(HEADS, SIZE, key=KEY, logits_soft_cap=0.5)
    module = eqx.nn.MultiheadAttention(HEADS, SIZE, key=KEY)
    query_ids, key_ids = jnp.arange(T) // 7, jnp.arange(S) // 10
    mask = query_ids[:, None] == key_ids
    alike = from_equinox(module)
    close(alike(*inputs({}), segment_ids=(query_ids, key_ids)), module(*inputs({}), mask=mask))
    own = [x[:T] for x in inputs({})]
    close(alike(*own, segment_ids=query_ids),
          module(*own, mask=query_ids[:, None] == query_ids))  # fmt: skip
    plain = alike(*inputs({}))
    for other in (
        layer(*inputs({})),
        alike(*inputs({}), sinks=jnp.ones(HEADS)),
        alike(*inputs({}), alibi_slopes=jnp.ones(HEADS)),
    ):
        assert jnp.abs(other - plain).max() > 0.01
    close(alike(*inputs({}), sinks=jnp.full(HEADS, -jnp.inf)), plain)
    diagonal = jnp.arange(T)[:, None] == jnp.arange(S)  # all that is left by such slopes
    close(alike(*inputs({}), alibi_slopes=jnp.full(HEADS, 1e6)), module(*inputs({}), mask=diagonal))
    gradient = jax.grad(lambda x: alike(*inputs({}), sinks=x).sum())(jnp.ones(HEADS))
    assert (jnp.abs(gradient) > 1e-3).all()


def test_rejects():
    layer = MultiheadAttention(HEADS, SIZE, key=KEY)
    query, key, value = inputs({})
    with pytest.raises(ValueError, match="equal length"):
        layer(query, key, value[1:])
    for shape in [(T,), (S,), (1, S), (1, T, S), (2, T, S), (S, T)]:
        with pytest.raises(ValueError, match=r"mask must have shape \(20, 28\) or \(4, 20, 28\)"):
            layer(query, key, value, mask=jnp.ones(shape, bool))
    with pytest.raises(TypeError, match="bool"):
        layer(query, key, value, mask=jnp.ones((T, S)))
    with pytest.raises(TypeError, match=r"equinox\.nn\.MultiheadAttention, got Linear"):
        from_equinox(layer.query_proj)
    module = eqx.nn.MultiheadAttention(HEADS, SIZE, key=KEY)
    for name in ("num_kv_heads", "causal"):
        with pytest.raises(TypeError, match=f"no option {name}; there are scale, is_causal"):
            from_equinox(module, **{name: 2})


def test_names_the_extra_without_equinox(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    monkeypatch.delitem(sys.modules, "jax_flashattn.equinox")
    with pytest.raises(ImportError, match=r'pip install "jax-flashattn\[equinox\]"'):
        importlib.import_module("jax_flashattn.equinox")
