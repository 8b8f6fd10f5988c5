"""attention_fn's dropout in Flax's modules, NNX and Linen, against that of their own attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits
from flax import linen, nnx
from test_flax import FEATURES, HEADS, B, T, close, decode, nnx_layer, normal

from jax_flashattn import attention
from jax_flashattn.flax import attention_fn, make_attention_fn

RATE = 0.3
QKV = tuple(normal(seed, B, T, HEADS, 8) for seed in (1, 2, 3))
KEYS = jax.random.split(jax.random.key(5), 400)
X = normal(1, B, T, FEATURES)


@functools.cache
def statistics(function, **options):
    """Mean and variance of out over KEYS."""

    def one(key):
        out = function(*QKV, dropout_rng=key, dropout_rate=RATE, **options)
        return jnp.stack([out, out**2])

    mean, square = np.asarray(jax.lax.map(jax.jit(one), KEYS).mean(axis=0))
    return mean, square - mean**2


@pytest.mark.parametrize("broadcast", [False, True])
def test_mean_and_variance_are_flaxs(broadcast):
    """Of single outputs, whether or not Flax shares its mask among batch entries and heads."""
    exact = attention_fn(*QKV)
    mean, variance = statistics(attention_fn)
    theirs, their_variance = statistics(nnx.dot_product_attention, broadcast_dropout=broadcast)
    error = np.sqrt(variance / len(KEYS))
    assert np.abs((mean - exact) / error).max() < 5.5
    assert np.abs((mean - theirs) / error).max() < 5.5 * np.sqrt(2)
    np.testing.assert_allclose(variance.mean(), their_variance.mean(), rtol=0.03)
    np.testing.assert_allclose(variance, their_variance, rtol=0.8)


def test_entries_and_heads_have_masks_of_their_own():
    """Whatever broadcast_dropout says, which has no other effect."""
    one = tuple(jnp.broadcast_to(x[:1, :, :1], x.shape) for x in QKV)
    call = functools.partial(attention_fn, *one, dropout_rng=KEYS[0], dropout_rate=RATE)
    out = np.asarray(call(broadcast_dropout=False))
    assert_same_bits(out, call(broadcast_dropout=True))
    flat = out.transpose(0, 2, 1, 3).reshape(B * HEADS, -1)
    differences = np.abs(flat[:, None] - flat).max(axis=-1)
    assert (differences + np.eye(len(flat)) > 0.01).all()


def test_it_is_the_dropout_of_attention():
    given = {"dropout_rate": RATE, "dropout_key": KEYS[3]}
    out = attention_fn(*QKV, dropout_rng=KEYS[3], dropout_rate=RATE)
    assert_same_bits(out, attention(*QKV, **given))
    function = make_attention_fn(is_causal=True, logits_soft_cap=2.0)
    out = function(*QKV, dropout_rng=KEYS[3], dropout_rate=RATE)
    assert_same_bits(out, attention(*QKV, is_causal=True, logits_soft_cap=2.0, **given))
    batched = [x.reshape(1, B, 1, *x.shape[1:]) for x in QKV]
    folded = attention_fn(*batched, dropout_rng=KEYS[3], dropout_rate=RATE)
    assert_same_bits(folded.reshape(B, T, HEADS, 8), attention(*QKV, **given))


def trained(layer, x, **call):
    """The layer's output, and the gradients of its weights and inputs."""

    @nnx.jit
    def run(layer, x):
        def loss(layer, x):
            out = layer(x, **call)
            return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        (weights, inputs), out = nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
        return out, nnx.to_pure_dict(weights), inputs

    return run(layer, x)


def test_nnx_trains_and_evaluates():
    plain = trained(nnx_layer(attention_fn), X)
    layer = nnx_layer(attention_fn, dropout_rate=RATE)
    first, second = (trained(layer, X, deterministic=False) for _ in range(2))
    again = trained(nnx_layer(attention_fn, dropout_rate=RATE), X, deterministic=False)
    assert_same_bits(again, first)  # the stream of keys starts anew
    for dropped in (first, second):
        assert jnp.abs(dropped[0] - plain[0]).max() > 0.05
        pairs = zip(jax.tree.leaves(dropped), jax.tree.leaves(plain), strict=True)
        assert all(jnp.isfinite(x).all() for x, _ in pairs)
    assert jnp.abs(first[0] - second[0]).max() > 0.05
    weights = zip(jax.tree.leaves(first[1]), jax.tree.leaves(plain[1]), strict=True)
    # All weights feel it but the bias of the keys, whose gradient is 0, and that of the output.
    assert sum(bool(jnp.abs(x - y).max() > 1e-2) for x, y in weights) >= 6
    close(trained(layer, X, deterministic=True), plain)
    layer.eval()
    close(trained(layer, X), plain)


def test_nnx_decodes_without_dropout():
    layer = nnx_layer(attention_fn, dropout_rate=RATE)
    layer.eval()
    close(decode(layer, X[:, :6]), layer(X[:, :6], is_causal=True))


@pytest.mark.parametrize("new_style", [True, False], ids=["key", "PRNGKey"])
def test_linen_trains_and_evaluates(new_style):
    make = jax.random.key if new_style else jax.random.PRNGKey
    layer = linen.MultiHeadDotProductAttention(
        HEADS, dropout_rate=RATE, attention_fn=attention_fn, deterministic=False
    )
    variables = layer.init({"params": make(0), "dropout": make(1)}, X)

    @jax.jit
    def run(key):
        def loss(variables):
            out = layer.apply(variables, X, rngs={"dropout": key})
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(variables)

    one, other = run(make(2)), run(make(3))
    assert_same_bits(run(make(2)), one)
    assert jnp.abs(one[0][1] - other[0][1]).max() > 0.05
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(one))
    plain = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    expected = plain.apply(variables, X)
    close(layer.clone(deterministic=True).apply(variables, X), expected)
    given = layer.apply(variables, X, dropout_rng=make(2))
    assert jnp.abs(given - expected).max() > 0.05


def test_a_rate_without_a_key_is_refused():
    with pytest.raises(ValueError, match=r"dropout_rate=0.3 needs dropout_rng.*deterministic"):
        attention_fn(*QKV, dropout_rate=RATE)
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\)"):
        attention_fn(*QKV, dropout_rate=1.0, dropout_rng=KEYS[0])
    assert_same_bits(attention_fn(*QKV, dropout_rate=RATE, deterministic=True), attention_fn(*QKV))
