"""Every pair of options is in the executed set, or is refused by a ValueError that names both."""

import inspect
import itertools

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PACKED
from test_fuzz import EMULATOR_SEEDS

from jax_flashattn import attention, varlen_attention

B, T, N, H = 2, 8, 2, 16
IDS = np.zeros((B, T), np.int32)
LENGTHS = IDS[:, 0]
# A value of each option, and what it cannot be without.
OPTIONS = {
    "bias": ({"bias": jnp.zeros((T, T))}, {}),
    "mask": ({"mask": np.ones((T, T), bool)}, {}),
    "scale": ({"scale": jnp.float32(0.3)}, {}),
    "is_causal": ({"is_causal": True}, {}),
    "query_seq_lengths": ({"query_seq_lengths": LENGTHS}, {}),
    "key_value_seq_lengths": ({"key_value_seq_lengths": LENGTHS}, {}),
    "local_window_size": ({"local_window_size": (3, 1)}, {}),
    "causal_alignment": ({"causal_alignment": "bottom_right"}, {}),
    "logits_soft_cap": ({"logits_soft_cap": 2.0}, {}),
    "alibi_slopes": ({"alibi_slopes": jnp.zeros(N)}, {}),
    "sinks": ({"sinks": jnp.zeros(N)}, {}),
    "num_sink_tokens": ({"num_sink_tokens": 2}, {"local_window_size": (3, 1)}),
    "query_segment_ids": ({"query_segment_ids": IDS}, {"key_value_segment_ids": IDS}),
    "key_value_segment_ids": ({"key_value_segment_ids": IDS}, {"query_segment_ids": IDS}),
    "dropout_rate": ({"dropout_rate": 0.5}, {"dropout_key": jax.random.key(0)}),
    "dropout_key": ({"dropout_key": jax.random.key(0)}, {}),
    "deterministic": ({"deterministic": True}, {}),
    "prefix_lengths": ({"prefix_lengths": LENGTHS}, {"is_causal": True}),
    "bidirectional_spans": ({"bidirectional_spans": IDS[:, None, :2]}, {"is_causal": True}),
}
# What says how and what is returned, and not what is computed.
NO_OPTION = {"query", "key", "value", "implementation", "return_residual", "return_lse", *PACKED}
REFUSED = [("num_sink_tokens", "query_segment_ids"), ("num_sink_tokens", "key_value_segment_ids")]


def options_of(function):
    return [n for n in inspect.signature(function).parameters if n not in NO_OPTION]


def pairs(names):
    return [tuple(sorted(pair)) for pair in itertools.combinations(names, 2)]


def not_executed(names, is_packed, calls):
    """Pairs of options that no random call of attention, or of varlen_attention, has."""
    used = [draws.arguments(call) for call in calls]
    used = [one for one in used if (PACKED[0] in one) == is_packed]
    return {pair for pair in pairs(names) if not any(one.issuperset(pair) for one in used)}


CALLS = [draws.draw(seed) for seed in EMULATOR_SEEDS]
FUNCTIONS = {"attention": (attention, False), "varlen_attention": (varlen_attention, True)}


def test_all_options_are_here():
    assert OPTIONS.keys() == set(options_of(attention))
    assert OPTIONS.keys() > set(options_of(varlen_attention))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_pair_is_executed(name):
    """By the seeds that the emulator runs, forward and backward, all judged by the oracle."""
    function, is_packed = FUNCTIONS[name]
    refused = set() if is_packed else set(map(tuple, map(sorted, REFUSED)))
    assert not_executed(options_of(function), is_packed, CALLS) == refused


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pair_that_is_not_executed_is_noticed(name):
    function, is_packed = FUNCTIONS[name]
    pair = ("deterministic", "logits_soft_cap")
    others = [call for call in CALLS if not draws.arguments(call).issuperset(pair)]
    assert pair in not_executed(options_of(function), is_packed, others)


def trace(names, packed=False):
    """Forward and backward of a call with these options, without running it."""
    given = {}
    for part in (1, 0):
        for name in names:
            given |= OPTIONS[name][part]
    function, shape = attention, (B, T, N, H)
    if packed:
        function, shape = varlen_attention, shape[1:]
        given |= dict.fromkeys(PACKED, np.int32([0, 3, T]))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    gradient = jax.grad(lambda *arrays: function(*arrays, **given).sum(), (0, 1, 2))
    return jax.eval_shape(gradient, *shapes)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pairs_are_taken_or_refused(name):
    """Beside nothing but what each of the two cannot be without."""
    function, is_packed = FUNCTIONS[name]
    refused = []
    for pair in pairs(options_of(function)):
        try:
            trace(pair, is_packed)
        except ValueError as error:
            refused.append(pair)
            nameless = [option for option in pair if option not in str(error)]
            if nameless:
                pytest.fail(f"{nameless} not in {error}")
    assert sorted(refused) == ([] if is_packed else sorted(map(tuple, map(sorted, REFUSED))))


@pytest.mark.parametrize(
    "given",
    [
        {"prefix_lengths": LENGTHS, "is_causal": False},
        {"bidirectional_spans": IDS[:, None, :2], "is_causal": False},
        {"dropout_rate": 0.5, "dropout_key": None},
        {"query_segment_ids": IDS, "key_value_segment_ids": None},
        {"query_segment_ids": None, "key_value_segment_ids": IDS},
    ],
    ids="-".join,
)
def test_an_option_without_what_it_needs_is_refused(given):
    """By a ValueError that names both."""
    one, other = given
    x = jnp.zeros((B, T, N, H))
    with pytest.raises(ValueError, match=f"{one}.*{other}|{other}.*{one}"):
        attention(x, x, x, **given)


@pytest.mark.parametrize(
    "name", [n for n in options_of(attention) if n not in options_of(varlen_attention)]
)
def test_packed_sequences_do_not_take(name):
    """Python says so, and names the function and the argument."""
    x, bounds = jnp.zeros((T, N, H)), np.int32([0, 3, T])
    with pytest.raises(TypeError, match=rf"varlen_attention.*{name}"):
        varlen_attention(x, x, x, bounds, bounds, **OPTIONS[name][0])
