"""Positive controls of test_metamorphic.py: each relation fails for a wrong attention.

The wrong ones are made of the oracle, which is fast, and for which every relation holds but one.
"""

import numpy as np
import pytest
import test_metamorphic as relations
from cases import LENGTHS
from ways import oracle


def edited(edit):
    """A way that runs another call than it is asked to."""
    return lambda call, gradients=True: oracle(edit(call), gradients)


def without(*options):
    """A way that ignores options."""
    nothing = dict.fromkeys(options)
    return edited(lambda call: call.but(**nothing).on(**nothing))


def rearranged(names, change):
    """A way that changes arrays: change(array, call)."""
    return edited(lambda call: call.on(**{n: change(call.arrays()[n], call) for n in names}))


def spoiled(name, spoil):
    """A way that changes a result: spoil(array)."""

    def run(call, gradients=True):
        results = oracle(call, gradients)
        return results | {name: spoil(results[name])}

    return run


def leaking():
    """A way whose results depend on the call before."""
    means = [0]

    def spoil(out):
        means.append(out.mean())
        return out + means[-2]

    return spoiled("out", spoil)


KEYS = ("key", "value")
unseen = relations.test_unseen_keys_reach_no_row
any_batch = relations.test_an_entry_is_the_same_in_any_batch
MUTANTS = {  # a wrong way, the test that must notice, its other arguments
    "causality ignored": (without("is_causal"), unseen, "causal"),
    "one key of the future": (
        edited(lambda call: call.but(is_causal=None, local_window_size=(None, 1))),
        unseen, "causal"),
    "alignment ignored": (without("causal_alignment"), unseen, "bottom-right"),
    "window wider by one": (
        edited(lambda call: call.but(local_window_size=(21, 7))), unseen, "window"),
    "left side ignored": (without("local_window_size"), unseen, "left"),
    "right side ignored": (without("local_window_size"), unseen, "right"),
    "lengths ignored": (without(*LENGTHS), unseen, "lengths"),
    "segments ignored": (without(*relations.IDS), unseen, "segments"),
    "ids in one interval": (
        rearranged(relations.IDS, lambda x, call: x // 2), unseen, "segments, mixed"),
    "spans one longer": (
        rearranged(("bidirectional_spans",), lambda x, call: x + np.int32([0, 1])),
        unseen, "spans"),
    "prefix one longer": (
        rearranged(("prefix_lengths",), lambda x, call: x + 1), unseen, "prefix"),
    "one sink token more": (
        edited(lambda call: call.but(num_sink_tokens=6)), unseen, "sink tokens"),
    "mask ignored": (
        rearranged(("mask",), lambda x, call: np.ones_like(x)), unseen, "mask"),
    "gradient of unseen keys": (spoiled("key", lambda x: x + 1e-9), unseen, "causal"),
    "zero times NaN": (oracle, relations.test_padding_reaches_nothing, {}, (64, 129)),
    "batches share keys": (
        rearranged(KEYS, lambda x, call: x[[0] * len(x)]),
        relations.test_entries_do_not_mix, "batch"),
    "heads share keys": (
        rearranged(KEYS, lambda x, call: x[:, :, [0] * x.shape[2]]),
        relations.test_entries_do_not_mix, "heads"),
    "lengths wrap": (
        rearranged(LENGTHS, lambda x, call: x % 128), relations.test_any_lengths_are_clamped),
    "one length for all": (
        rearranged(LENGTHS, lambda x, call: x[[0] * len(x)]), any_batch, [2, 0, 1]),
    "depends on the batch size": (
        spoiled("out", lambda x: x * (1 + len(x) / 50)), any_batch, [1]),
    "groups interleaved": (
        rearranged(KEYS, lambda x, call: x[:, :, np.arange(call.heads) % x.shape[2]]),
        relations.test_grouped_heads_equal_repeated_keys),
    "lse in base 2": (
        spoiled("lse", lambda x: x / np.log(2)), relations.test_pieces_of_keys_merge_by_lse),
    "pieces aligned to the left": (
        without("causal_alignment"), relations.test_prefill_in_pieces),
    "scale ignored": (
        without("scale"), relations.test_power_of_two_moves_between_query_and_scale, 2, False),
    "traced scale ignored": (
        without("scale"), relations.test_power_of_two_moves_between_query_and_scale, 2, True),
    "the call before leaks": (leaking(), relations.test_calls_in_between_change_nothing),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_breaks_its_relation(mutant):
    wrong, relation, *arguments = MUTANTS[mutant]
    if wrong is not oracle:
        relation(oracle, *arguments)
    with pytest.raises(AssertionError):
        relation(wrong, *arguments)


@pytest.mark.parametrize("flag", relations.FLAGS)
def test_mutant_of_a_flag_is_noticed(flag):
    """A flag that is ignored, and a neutral value that is taken for another."""
    call, name, value, _ = relations.FLAGS[flag]
    names = name if isinstance(name, tuple) else (name,)
    changes = relations.test_flag_changes_the_rows_that_it_should
    is_neutral = relations.test_neutral_value_of_a_flag_changes_nothing
    changes(oracle, flag)
    is_neutral(oracle, flag)
    with pytest.raises(AssertionError):
        changes(without(*names), flag)
    flagged = relations.with_flag(call, name, value)
    if flag == "cap":  # which only None leaves out
        return
    with pytest.raises(AssertionError):
        is_neutral(edited(lambda c: flagged if names[0] in c.options | c.given else c), flag)


def test_results_that_may_differ_in_their_last_bit_are_judged():
    """The slack of the reference is not enough for a scale that is one percent off."""
    call = relations.PLAIN
    wrong = edited(lambda call: call.but(scale=1.01 / np.sqrt(call.head_dim)))
    with pytest.raises(AssertionError):
        relations.assert_same(oracle, wrong(call), oracle(call))
