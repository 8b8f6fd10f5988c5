"""Bad calls of the score and mask features, of varlen_attention and lse_without_sinks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits
from test_options import B, H, K, N, S, T, arrays, raises

from jax_flashattn import _ffi, _options, attention, explain, lse_without_sinks, varlen_attention

SEEDS = {"dropout_key": jax.random.key(0), "dropout_rate": 0.5}
IDS = {"query_segment_ids": jnp.zeros((B, T), "int32")}
IDS |= {"key_value_segment_ids": jnp.zeros((B, S), "int32")}
CAUSAL = {"is_causal": True}
SPANS = jnp.zeros((B, 1, 2), "int32")


@pytest.mark.parametrize(
    ("bad", "error", "fragments"),
    [
        ({"logits_soft_cap": 0.0}, ValueError, ["logits_soft_cap", "0.0"]),
        ({"logits_soft_cap": -30.0}, ValueError, ["logits_soft_cap", "-30"]),
        ({"logits_soft_cap": float("inf")}, ValueError, ["logits_soft_cap", "inf"]),
        ({"logits_soft_cap": float("nan")}, ValueError, ["logits_soft_cap", "nan"]),
        ({"logits_soft_cap": jnp.float32(3)}, TypeError, ["logits_soft_cap", "Python number"]),
        ({"logits_soft_cap": True}, TypeError, ["logits_soft_cap", "True"]),
        ({"logits_soft_cap": "big"}, TypeError, ["logits_soft_cap", "big"]),
        ({"alibi_slopes": jnp.zeros((N + 1,))}, ValueError, ["alibi_slopes", "[4]", "[5]"]),
        ({"alibi_slopes": jnp.zeros((1, N))}, ValueError, ["alibi_slopes", "[2, 4]", "[1, 4]"]),
        ({"alibi_slopes": jnp.zeros((N,), bool)}, TypeError, ["alibi_slopes", "bool"]),
        ({"alibi_slopes": [0.5] * N}, TypeError, ["alibi_slopes", "array"]),
        ({"sinks": jnp.zeros((B,))}, ValueError, ["sinks", "[4]", "[2]"]),
        ({"sinks": jnp.zeros((N, 1))}, ValueError, ["sinks", "[2, 4]", "[4, 1]"]),
        ({"sinks": jnp.zeros((N,), "complex64")}, TypeError, ["sinks", "complex64"]),
        ({"sinks": 1.0}, TypeError, ["sinks", "1.0"]),
        ({"num_sink_tokens": -1}, ValueError, ["num_sink_tokens", "-1"]),
        ({"num_sink_tokens": 1.5}, TypeError, ["num_sink_tokens", "1.5"]),
        ({"num_sink_tokens": True}, TypeError, ["num_sink_tokens", "True"]),
        ({"num_sink_tokens": jnp.int32(3)}, TypeError, ["num_sink_tokens", "int32"]),
        ({"dropout_rate": 0.5}, ValueError, ["dropout_rate", "0.5", "dropout_key"]),
        (SEEDS | {"dropout_rate": 1.0}, ValueError, ["dropout_rate", "1.0"]),
        (SEEDS | {"dropout_rate": -0.1}, ValueError, ["dropout_rate", "-0.1"]),
        (SEEDS | {"dropout_rate": float("nan")}, ValueError, ["dropout_rate", "nan"]),
        (SEEDS | {"dropout_rate": jnp.float32(0.5)}, TypeError, ["dropout_rate"]),
        (SEEDS | {"dropout_key": jnp.zeros((3,), "uint32")}, TypeError, ["dropout_key", "[3]"]),
        (SEEDS | {"dropout_key": jnp.zeros((2,), "int32")}, TypeError, ["dropout_key", "int32"]),
        (SEEDS | {"dropout_key": 7}, TypeError, ["dropout_key", "7"]),
        (
            SEEDS | {"dropout_key": jax.random.split(jax.random.key(0))},
            TypeError,
            ["dropout_key", "one jax.random key", "[2]"],
        ),
        ({"query_segment_ids": IDS["query_segment_ids"]}, ValueError, ["key_value_segment_ids"]),
        (
            {"key_value_segment_ids": IDS["key_value_segment_ids"]},
            ValueError,
            ["query_segment_ids", "together"],
        ),
        (IDS | {"query_segment_ids": jnp.zeros((B, S), "int32")}, ValueError, ["[2, 5]", "[2, 8]"]),
        (IDS | {"key_value_segment_ids": jnp.zeros((S,), "int32")}, ValueError, ["[2, 8]", "[8]"]),
        (IDS | {"query_segment_ids": jnp.zeros((B, T))}, TypeError, ["query_segment_ids", "float"]),
        (IDS | {"num_sink_tokens": 2}, ValueError, ["num_sink_tokens", "query_segment_ids"]),
        ({"prefix_lengths": jnp.zeros((B,), "int32")}, ValueError, ["prefix_lengths", "is_causal"]),
        (CAUSAL | {"prefix_lengths": jnp.zeros((3,), "int32")}, ValueError, ["prefix_lengths"]),
        (CAUSAL | {"prefix_lengths": jnp.zeros((B,))}, TypeError, ["prefix_lengths", "float32"]),
        ({"bidirectional_spans": SPANS}, ValueError, ["bidirectional_spans", "is_causal"]),
        (CAUSAL | {"bidirectional_spans": SPANS[0]}, ValueError, ["[1, 2]", "batch 2"]),
        (CAUSAL | {"bidirectional_spans": SPANS[:1]}, ValueError, ["[1, 1, 2]", "batch 2"]),
        (CAUSAL | {"bidirectional_spans": SPANS[..., :1]}, ValueError, ["[2, 1, 1]", "(begin"]),
        (CAUSAL | {"bidirectional_spans": SPANS * 0.5}, TypeError, ["bidirectional_spans"]),
    ],
)
def test_bad_features(bad, error, fragments):
    raises(error, fragments, **arrays(), **bad)


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_one_number_per_head_where_there_is_no_batch(name):
    single = {name: x[0] for name, x in arrays().items()}
    raises(ValueError, [name, "[4]", "[2, 4]"], **single, **{name: jnp.zeros((B, N))})
    attention(**single, **{name: jnp.zeros((N,))})


def test_features_of_other_types_are_taken():
    """Integers and wider or narrower floats, keys old and new, NumPy's numbers."""
    some = {name: x + 1 for name, x in arrays(dtype="float32").items()}
    sinks = attention(**some, sinks=np.int32([1, 2, 3, 4]))
    assert_same_bits(sinks, attention(**some, sinks=jnp.arange(1, 5, dtype="bfloat16")))
    cap = attention(**some, logits_soft_cap=np.float32(2))
    assert_same_bits(cap, attention(**some, logits_soft_cap=2))
    rate = {"dropout_rate": np.float64(0.5)}
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    assert_same_bits(
        attention(**some, **rate, dropout_key=old), attention(**some, **rate, dropout_key=new)
    )


def test_neutral_values():
    neutral = {"logits_soft_cap": None, "alibi_slopes": None, "sinks": None, "num_sink_tokens": 3}
    neutral |= {"query_segment_ids": None, "key_value_segment_ids": None, "dropout_rate": 0.0}
    assert_same_bits(
        attention(**arrays(), **neutral, dropout_key=jax.random.key(1)), attention(**arrays())
    )


def test_the_dropout_rate_is_rounded_to_what_kernels_have():
    def steps(rate):
        return _options.dropout(rate, jax.random.key(0), 1, 1)[0]

    assert steps(2.0**-16) == 1
    assert steps(2.0**-18) == 0
    assert steps(0.5) == 2**15
    assert steps(1 - 2.0**-20) == 2**16 - 1  # never all


@pytest.mark.parametrize("scores", ["general scores", "plain scores"])
def test_explain_names_what_made_scores_general(monkeypatch, scores):
    """Whether they are is the kernels' to say; which operands did it is seen here."""
    plan = _ffi.Plan("sm90", 64, 128, 128, 12, 1, 1, 1, "schedule", f"capability 9.0; {scores}")
    monkeypatch.setattr(_ffi, "plan", lambda *args, **kwargs: plan)

    def reason(**options):
        return explain(**arrays(), **options, platform="cuda").reason

    features = {
        "bias": {"bias": jnp.zeros((T, S))},
        "mask": {"mask": jnp.ones((T, S), bool)},
        "a scale on the device": {"scale": jnp.float32(1)},
        "logits_soft_cap": {"logits_soft_cap": 2.0},
        "alibi_slopes": {"alibi_slopes": jnp.ones((N,))},
        "dropout": SEEDS,
    }
    for name, options in features.items():
        general = f"capability 9.0; general scores ({name})"
        assert reason(**options) == (general if scores != "plain scores" else plan.why)
    both = reason(bias=jnp.zeros((T, S)), logits_soft_cap=2.0)
    assert ("(bias, logits_soft_cap)" in both) == (scores != "plain scores")


# Packed sequences --------------------------------------------------------------------------------

PACKED = {
    "query": jnp.zeros((T, N, H), "bfloat16"),
    "key": jnp.zeros((S, K, H), "bfloat16"),
    "value": jnp.zeros((S, K, H), "bfloat16"),
    "cu_seqlens_q": jnp.asarray([0, 2, T], "int32"),
    "cu_seqlens_k": jnp.asarray([0, 3, S], "int32"),
}
BOUNDS = ["cu_seqlens_q", "cu_seqlens_k"]


@pytest.mark.parametrize(
    ("bad", "error", "fragments"),
    [
        (arrays(), ValueError, ["varlen_attention", "[tokens, heads, head_dim]"]),
        ({"query": None}, TypeError, ["query"]),
        ({"key": PACKED["key"][1:]}, ValueError, ["length", "7", "8"]),
        ({"cu_seqlens_q": None}, TypeError, ["cu_seqlens_q"]),
        ({"cu_seqlens_k": (0, 3, 8)}, TypeError, ["cu_seqlens_k", "array"]),
        ({"cu_seqlens_q": jnp.zeros(3)}, TypeError, ["cu_seqlens_q", "int32", "float32"]),
        ({"cu_seqlens_k": jnp.zeros(3, bool)}, TypeError, ["cu_seqlens_k", "bool"]),
        ({"cu_seqlens_k": jnp.zeros(4, "int32")}, ValueError, [*BOUNDS, "[3]", "[4]"]),
        ({"cu_seqlens_q": jnp.zeros((1, 3), "int32")}, ValueError, [*BOUNDS, "[1, 3]"]),
        ({name: jnp.zeros(0, "int32") for name in BOUNDS}, ValueError, [*BOUNDS, "[0]"]),
        ({name: jnp.zeros((), "int32") for name in BOUNDS}, ValueError, [*BOUNDS, "[]"]),
        ({"cu_seqlens_k": np.array([0, 3, 2**40])}, ValueError, ["cu_seqlens_k", str(2**40)]),
        ({"sinks": jnp.zeros((2, N))}, ValueError, ["sinks", "[4]", "[2, 4]"]),
        ({"alibi_slopes": jnp.zeros((2, N))}, ValueError, ["alibi_slopes", "[4]", "[2, 4]"]),
        ({"logits_soft_cap": -1.0}, ValueError, ["logits_soft_cap", "-1"]),
        ({"local_window_size": -1}, ValueError, ["local_window_size", "-1"]),
        ({"dropout_rate": 0.5}, ValueError, ["dropout_rate", "dropout_key"]),
        ({"is_causal": 1}, TypeError, ["is_causal", "1"]),
        ({"return_lse": 1}, TypeError, ["return_lse", "1"]),
        ({"causal_alignment": "left"}, ValueError, ["causal_alignment", "left"]),
        ({"implementation": "cudnn"}, ValueError, ["implementation", "cudnn"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_packed_sequences(bad, error, fragments):
    raises(error, fragments, varlen_attention, **PACKED | bad)


@pytest.mark.parametrize(
    "name", ["bias", "mask", "query_seq_lengths", "query_segment_ids", "num_sink_tokens"]
)
def test_packed_sequences_do_not_take(name):
    with pytest.raises(TypeError, match=name):
        varlen_attention(**PACKED, **{name: None})


def test_packed_sequences_take_what_attention_has():
    """The same names, kinds and defaults."""
    ours = inspect.signature(varlen_attention).parameters
    theirs = inspect.signature(attention).parameters
    shared = [name for name in ours if name not in BOUNDS]
    assert [name for name in theirs if name in shared] == shared
    assert all(ours[name] == theirs[name] for name in shared)


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_bounds_of_other_integers(dtype):
    """Narrowed where their values can be seen; an int64 tracer must be cast by the caller."""
    cu_q, cu_k = (np.asarray(PACKED[name], dtype) for name in BOUNDS)
    made = _options.cumulative(cu_q, cu_k)
    assert [(x.shape, str(x.dtype)) for x in made] == [((1, 3), "int32")] * 2
    assert_same_bits(np.concatenate(made), np.int32([cu_q, cu_k]))
    with jax.enable_x64(True), pytest.raises(TypeError, match="cast it with"):
        jax.eval_shape(lambda x: _options.cumulative(x, x), np.zeros(3, "int64"))


@pytest.mark.parametrize("bounds", [[0, 4, 2], [-3, 2, 99], [5, 5, 5], [2**31 - 1, 0, -(2**31)]])
def test_any_bounds_are_safe(bounds):
    """Values that are no prefix sums: finite results, and zeros where a row sees nothing."""
    rng = np.random.default_rng(0)
    packed = PACKED | {
        name: jnp.asarray(rng.standard_normal(PACKED[name].shape), "float32")
        for name in ("query", "key", "value")
    }
    packed |= {name: jnp.asarray(bounds, "int32") for name in BOUNDS}
    out, lse = varlen_attention(**packed, is_causal=True, return_lse=True)
    assert np.isfinite(out).all()
    assert not np.isnan(lse).any()
    assert not out[np.isneginf(lse).T].any()


# The log-sum-exp without sinks -------------------------------------------------------------------


def with_and_without(sinks, **options):
    rng = np.random.default_rng(1)
    some = {
        name: jnp.asarray(rng.standard_normal(x.shape), "float32") for name, x in arrays().items()
    }
    _, lse = attention(**some, **options, sinks=sinks, return_lse=True)
    _, of_keys = attention(**some, **options, return_lse=True)
    return lse, of_keys


@pytest.mark.parametrize("shape", [(N,), (B, N)], ids=str)
def test_lse_without_sinks(shape):
    sinks = 3 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    lse, of_keys = with_and_without(sinks)
    assert (lse > of_keys).all()
    np.testing.assert_allclose(lse_without_sinks(lse, sinks), of_keys, rtol=1e-5, atol=1e-5)
    if len(shape) == 1:
        alone = lse_without_sinks(lse[0], sinks)
        np.testing.assert_allclose(alone, of_keys[0], rtol=1e-5, atol=1e-5)


def test_lse_without_sinks_where_nothing_is_left():
    """Padding, which sees not even the sink; rows without keys; a sink of -inf, which is none."""
    lengths = {
        "query_seq_lengths": jnp.asarray([3, T]),
        "key_value_seq_lengths": jnp.asarray([8, 0]),
    }
    sinks = jnp.asarray([0.5, -1.0, 2.0, -jnp.inf])
    lse, of_keys = with_and_without(sinks, **lengths)
    made = np.asarray(lse_without_sinks(lse, sinks))
    np.testing.assert_array_equal(np.isneginf(made), np.isneginf(of_keys))
    np.testing.assert_allclose(made, of_keys, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made[:, 3], of_keys[:, 3])


def test_lse_without_sinks_has_a_finite_gradient():
    """1 / (1 - share of the sink); nothing infinite where no key or nothing at all is left."""
    lse = jnp.asarray([[1.0, -jnp.inf, 2.0, 0.5]])
    sinks = jnp.asarray([0.5])

    def total(lse, sinks):
        made = lse_without_sinks(lse, sinks)
        return jnp.where(jnp.isfinite(made), made, 0).sum()

    d_lse, d_sinks = jax.grad(total, (0, 1))(lse, sinks)
    share = np.exp(0.5 - np.float64([1, 2]))
    np.testing.assert_allclose(d_lse[0, [0, 2]], 1 / (1 - share), rtol=1e-5)
    np.testing.assert_allclose(d_sinks, [-(share / (1 - share)).sum()], rtol=1e-5)
    assert not d_lse[0, [1, 3]].any()
