"""attention_fn in Flax's modules, NNX and Linen, against their own attention."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jax_flashattn import attention
from jax_flashattn.flax import attention_fn, make_attention_fn

B, T, FEATURES, HEADS = 2, 24, 32, 4


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(actual, expected, tolerance=2e-5):
    """Every leaf, relative to the largest element of its kind."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))


TEXT = jnp.ones((B, T))
PADDING = (jnp.arange(T) < jnp.array([[T], [T - 7]])).reshape(B, 1, 1, T)
PER_HEAD = jax.random.bernoulli(jax.random.key(9), 0.7, (B, HEADS, T, T)) | jnp.eye(T, dtype=bool)
MASKS = {
    "none": None,
    "causal float": nnx.make_causal_mask(TEXT),
    "padding": PADDING,
    "padding float": PADDING.astype(jnp.float32),
    "per head": PER_HEAD,
    "shared": PER_HEAD[:1, :1],
}


def nnx_layer(function, **options):
    options = {"num_heads": HEADS, "in_features": FEATURES, "decode": False} | options
    return nnx.MultiHeadAttention(**options, attention_fn=function, rngs=nnx.Rngs(0))


def nnx_run(function, inputs, call, **options):
    """The layer's output, and the gradients of its weights and inputs."""
    layer = nnx_layer(function, **options)

    @nnx.jit
    def run(layer, inputs):
        def loss(layer, inputs):
            out = layer(*inputs, **call)
            return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        gradient = nnx.grad(loss, argnums=(0, 1), has_aux=True)
        (weights, inputs), out = gradient(layer, inputs)
        return out, nnx.to_pure_dict(weights), inputs

    return run(layer, inputs)


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [(name, False) for name in MASKS] + [("none", True), ("padding float", True)],
)
def test_nnx(name, is_causal):
    inputs = (normal(1, B, T, FEATURES),)
    call = {"mask": MASKS[name], "is_causal": is_causal}
    close(nnx_run(attention_fn, inputs, call), nnx_run(nnx.dot_product_attention, inputs, call))


@pytest.mark.parametrize(
    "options",
    [{"num_kv_heads": 2}, {"num_kv_heads": 1}, {"normalize_qk": True}, {"qkv_features": 64}],
    ids=str,
)
def test_nnx_layer_options(options):
    inputs = (normal(1, B, T, FEATURES), normal(2, B, T + 5, FEATURES))
    close(
        nnx_run(attention_fn, inputs, {}, **options),
        nnx_run(nnx.dot_product_attention, inputs, {}, **options),
    )


@pytest.mark.parametrize(
    ("batch", "mask"),
    [((), (1, T, T)), ((), (T, T))]
    + [
        ((3, 2), m)
        for m in [None, (3, 2, HEADS, T, T), (1, 1, 1, T, T), (1, T, T), (1, 2, 1, 1, T)]
    ]
    + [((3, 2), (2, 1, 1, T)), ((2, 1, 3), (2, 1, 3, 1, T, T))],
)
def test_nnx_batch_dimensions(batch, mask):
    """Masks that share some batch dimensions, spelt out for NNX, which cannot broadcast them."""
    inputs = (normal(1, *batch, T, FEATURES),)
    full = None
    if mask is not None:
        mask = jax.random.bernoulli(jax.random.key(3), 0.8, mask).at[..., 0].set(True)
        full = jnp.broadcast_to(mask, (*batch, HEADS, T, T))
    expected = nnx_run(nnx.dot_product_attention, inputs, {"mask": full})
    close(nnx_run(attention_fn, inputs, {"mask": mask}), expected)


def test_nnx_bfloat16():
    """The module's dtype wins over that of its inputs, as in Flax."""
    inputs = (normal(1, B, T, FEATURES),)
    exact, *_ = nnx_run(attention_fn, inputs, {"is_causal": True})
    actual = nnx_run(attention_fn, inputs, {"is_causal": True}, dtype=jnp.bfloat16)
    expected = nnx_run(nnx.dot_product_attention, inputs, {"is_causal": True}, dtype=jnp.bfloat16)
    assert actual[0].dtype == jnp.bfloat16
    close(actual, expected, 3e-2)
    error = jnp.abs(actual[0] - exact).max()
    assert 0 < error < 0.05


def decode(layer, x):
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, token: layer(token, decode=True))
    return jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(x.shape[1])], axis=1)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_nnx_decode(kv_heads):
    x = normal(1, B, 6, FEATURES)
    bottom_right = make_attention_fn(is_causal=True, causal_alignment="bottom_right")
    layer = nnx_layer(attention_fn, num_kv_heads=kv_heads)
    whole = layer(x, is_causal=True)
    close(decode(layer, x), whole)
    close(decode(nnx_layer(nnx.dot_product_attention, num_kv_heads=kv_heads), x), whole)
    layer = nnx_layer(bottom_right, num_kv_heads=kv_heads)
    close(layer(x), whole)
    close(decode(layer, x), whole)


def test_nnx_decode_with_alibi():
    """Slopes are counted from the end of the cache there, from the query in the whole."""
    x, slopes = normal(1, B, 6, FEATURES), np.float32([0.5, 0.1, 2, 0])
    options = {"is_causal": True, "causal_alignment": "bottom_right", "alibi_slopes": slopes}
    layer = nnx_layer(make_attention_fn(**options))
    close(decode(layer, x), layer(x))
    with pytest.raises(ValueError, match="alibi_slopes and sinks"):
        decode(nnx_layer(make_attention_fn(**options, sinks=slopes)), x)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"local_window_size": (3, 0)},
        {"alibi_slopes": np.full(2, 9, np.float32)},
    ],
    ids="-".join,
)
def test_decode_needs_an_alignment(options):
    layer = nnx_layer(make_attention_fn(**options))
    with pytest.raises(ValueError, match='causal_alignment="bottom_right"'):
        decode(layer, normal(1, B, 6, FEATURES))
    # "top_left", named, is obeyed: the query sees the first key.
    query, key, value = normal(1, B, 1, 2, 8), normal(2, B, 6, 2, 8), normal(3, B, 6, 2, 8)
    options = options | ({"alibi_slopes": 99 * np.ones(2)} if "alibi_slopes" in options else {})
    function = make_attention_fn(**options, causal_alignment="top_left")
    close(function(query, key, value, mask=jnp.ones((B, 1, 1, 6), bool)), value[:, :1])


def linen_run(function, x, mask, **options):
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=function, **options)
    weights = layer.init(jax.random.key(0), x)

    def loss(weights, x):
        out = layer.apply(weights, x, mask=mask)
        return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(weights, x)
    return out, gradients


@pytest.mark.parametrize("name", MASKS)
def test_linen(name):
    x = normal(1, B, T, FEATURES)
    expected = linen_run(linen.dot_product_attention, x, MASKS[name])
    close(linen_run(attention_fn, x, MASKS[name]), expected)
    if name == "causal float":
        close(linen_run(make_attention_fn(is_causal=True), x, None), expected)
    elif name != "none":  # the mask arrives: linen would drop it without a word
        unmasked = linen_run(attention_fn, x, None)
        assert np.abs(unmasked[0] - expected[0]).max() > 1e-2


def test_linen_options():
    x = normal(1, B, T, FEATURES)
    actual = linen_run(attention_fn, x, None, dtype=jnp.bfloat16, force_fp32_for_softmax=True)
    expected = linen_run(linen.dot_product_attention, x, None, dtype=jnp.bfloat16)
    assert actual[0].dtype == jnp.bfloat16
    close(actual[0], expected[0], 3e-2)
    close(linen_run(attention_fn, x, None, dropout_rate=0.5, deterministic=True),
          linen_run(attention_fn, x, None))  # fmt: skip


def test_linen_decode():
    x = normal(1, B, 6, FEATURES)
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, decode=True)
    variables = layer.init(jax.random.key(0), x)
    steps, cache = [], variables["cache"]
    for i in range(6):
        variables = {"params": variables["params"], "cache": cache}
        out, changed = layer.apply(variables, x[:, i : i + 1], mutable=["cache"])
        steps.append(out)
        cache = changed["cache"]
    whole = linen.MultiHeadDotProductAttention(HEADS)
    expected = whole.apply(
        {"params": variables["params"]}, x, mask=linen.make_causal_mask(x[..., 0])
    )
    close(jnp.concatenate(steps, axis=1), expected)


QKV = tuple(normal(seed, B, T, HEADS, 8) for seed in (1, 2, 3))


def test_bias():
    query, key, value = (x.reshape(2, 1, T, HEADS, 8) for x in QKV)
    for shape in [(HEADS, T, T), (2, 1, HEADS, 1, T), (1, 1, 1, T, T), (T,)]:
        bias = normal(4, *shape)
        expected = attention(*QKV, bias=bias if bias.ndim < 5 else bias[:, 0])
        close(attention_fn(query, key, value, bias)[:, 0], expected)
    with pytest.raises(ValueError, match="bias of shape"):
        attention_fn(query, key, value, jnp.zeros((1, 1, 1, 1, 1, T)))


def test_a_row_that_sees_nothing_is_zero():
    out = attention_fn(*QKV, mask=jnp.zeros((B, 1, 1, T)))
    assert not out.any()


def test_mixed_dtypes_are_promoted():
    query, key, value = QKV
    assert attention_fn(query.astype(jnp.bfloat16), key, value).dtype == jnp.float32
    assert attention_fn(*QKV, dtype=jnp.float16).dtype == jnp.float16


@pytest.mark.parametrize(
    "options",
    [
        {"local_window_size": (3, 1)},
        {"scale": 0.5},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"key_value_seq_lengths": np.array([5, 20], np.int32)},
        {"logits_soft_cap": 0.5},
        {"alibi_slopes": np.float32([0.1, 0.2, 0.5, 1])},
        {"sinks": np.float32([0, 1, 2, 3])},
        {"is_causal": True, "prefix_lengths": np.array([5, 20], np.int32)},
        {
            "query_segment_ids": np.arange(2 * T).reshape(2, T) % 2,
            "key_value_segment_ids": np.zeros((2, 20), np.int32),
        },
    ],
    ids=str,
)
def test_options_reach_attention(options):
    query, key, value = QKV
    key, value = key[:, :20], value[:, :20]
    out = make_attention_fn(**options)(query, key, value)
    close(out, attention(query, key, value, **options))
    assert jnp.abs(out - attention_fn(query, key, value)).max() > 1e-2


def test_equal_options_share_a_jit_cache_entry():
    lengths = np.array([3, 4], np.int32)
    assert make_attention_fn(is_causal=True) == make_attention_fn(is_causal=True)
    assert make_attention_fn(is_causal=True) != make_attention_fn(is_causal=False)
    assert make_attention_fn() != len
    by_length = make_attention_fn(key_value_seq_lengths=lengths)
    assert by_length == make_attention_fn(key_value_seq_lengths=lengths)
    assert by_length != make_attention_fn(key_value_seq_lengths=lengths.copy())
    assert hash(by_length) == hash(make_attention_fn(key_value_seq_lengths=lengths))
    assert repr(make_attention_fn(is_causal=True)) == "make_attention_fn(is_causal=True)"

    traces = []

    @nnx.jit
    def run(layer, x):
        traces.append(1)
        return layer(x)

    for _ in range(2):
        run(nnx_layer(make_attention_fn(is_causal=True)), normal(1, B, T, FEATURES))
    assert len(traces) == 1
    run(nnx_layer(make_attention_fn(is_causal=False)), normal(1, B, T, FEATURES))
    assert len(traces) == 2


def test_rejects_sowing_weights():
    x = normal(1, B, T, FEATURES)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        nnx_layer(attention_fn)(x, sow_weights=True)
    layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        layer.init(jax.random.key(0), x, sow_weights=True)


def test_rejects_other_einsums():
    layer = linen.MultiHeadDotProductAttention(
        HEADS, attention_fn=attention_fn,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="_einsum_cls"):
        layer.init(jax.random.key(0), normal(1, B, T, FEATURES))


def test_rejects_positions_and_shapes():
    with pytest.raises(NotImplementedError, match="input_positions"):
        attention_fn(*QKV, input_positions=jnp.arange(T))
    query, key, value = QKV
    with pytest.raises(ValueError, match="same batch dimensions"):
        attention_fn(query, key[:1], value)
    with pytest.raises(ValueError, match="same batch dimensions"):
        attention_fn(query, key[0], value[0])
    with pytest.raises(ValueError, match="mask of shape"):
        attention_fn(*(x[0] for x in QKV), mask=jnp.ones((1, 1, T, T)))


@pytest.mark.parametrize("name", ["mask", "bias", "return_lse", "return_residual", "dropout_rate"])
def test_rejects_what_the_module_sets(name):
    with pytest.raises(TypeError, match=f"{name} is not set here"):
        make_attention_fn(**{name: None})


def test_rejects_unknown_options():
    with pytest.raises(TypeError, match=r"causal is not an option of attention.*is_causal"):
        make_attention_fn(causal=True)


def test_needs_no_flax():
    code = "import sys, jax_flashattn.flax; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
