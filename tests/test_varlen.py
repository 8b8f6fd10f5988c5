"""varlen_attention against the oracle on each sequence alone, and what must not leak between them.

On the CPU the reference in float32, on a GPU the kernels in bfloat16.
"""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits, judge_scale
from oracle import attend

from jax_flashattn import attention, varlen_attention

N, K, H, HV = 4, 2, 32, 24
# Lengths of the sequences in queries and in keys, and how many tokens lie before and behind them.
PACKINGS = {
    "alike": ([50, 1, 70, 9], [50, 1, 70, 9], 0, 0),
    "one": ([130], [130], 0, 0),
    "empty": ([0, 40, 0, 0, 65, 0], [0, 40, 0, 0, 65, 0], 0, 0),
    "other keys": ([33, 64, 5], [100, 20, 77], 0, 0),
    "no keys, no queries": ([30, 40, 0, 12], [0, 70, 9, 12], 0, 0),
    "gaps": ([30, 64, 1], [66, 20, 3], 7, 19),
    "nothing": ([0, 0], [0, 0], 5, 9),
    # What has hung, overrun or overflowed elsewhere: a long sequence before a shorter one, lengths
    # around tiles, few keys for many rows, and whole tiles of rows without a key.
    "long": ([1743, 1559], [1743, 1559], 0, 0),
    "around tiles": ([0, 1, 127, 128, 129, 0, 300], [0, 1, 127, 128, 129, 0, 300], 0, 0),
    "few keys": ([76, 34, 146], [1, 1, 1], 0, 0),
    "no side": ([0, 10, 0, 20, 0, 30], [5, 0, 0, 7, 9, 0], 0, 0),
    "empty tiles first": ([130, 130, 130, 130], [0, 0, 0, 130], 0, 0),
    "empty tile between": ([130, 260, 130], [130, 0, 130], 0, 0),
    "more keys": ([129], [463], 0, 0),
    "large scores": ([1, 2, 5, 17, 128], [1, 2, 5, 17, 128], 0, 0),
}
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"local_window_size": (20, 5), "causal_alignment": "bottom_right"},
    "scores": {"is_causal": True, "logits_soft_cap": 2.0, "scale": 0.3},
    "alibi and sinks": {"alibi_slopes": np.float32([0.5, 0.1, 0, 2]),
                        "sinks": np.float32([0.3, -2, 1, -np.inf])},
    "traced scale": {"scale": jnp.float32(0.4), "causal_alignment": "bottom_right",
                     "alibi_slopes": np.float32([0.5, 0.1, 0, 2])},
}  # fmt: skip


@pytest.fixture(params=["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def way(request):
    """implementation and dtype of a test."""
    if request.param == "xla":
        return "xla", "float32"
    return "cuda", "bfloat16"


class Packed:
    """Arrays and cotangents of a packing, and where each of its sequences is."""

    def __init__(self, packing, dtype):
        q_lengths, k_lengths, before, behind = PACKINGS[packing]
        rng = np.random.default_rng(len(packing))
        bounds = [before + np.cumsum([0, *x]) for x in (q_lengths, k_lengths)]
        tokens, keys = (int(x[-1]) + behind for x in bounds)
        shapes = {"query": (tokens, N, H), "key": (keys, K, H), "value": (keys, K, HV)}
        drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        if packing == "large scores":
            drawn["query"] *= 5
        self.arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in drawn.items()}
        self.arrays |= {f"cu_seqlens_{x}": b.astype(np.int32) for x, b in zip("qk", bounds)}
        self.d_out = rng.standard_normal((tokens, N, HV)).astype(jnp.dtype(dtype))
        self.d_lse = rng.standard_normal((N, tokens)).astype(np.float32)
        self.rows, self.keys = (
            [np.s_[int(a) : int(b)] for a, b in itertools.pairwise(x)] for x in bounds
        )

    def changed(self, **arrays):
        """A copy, with other arrays."""
        made = copy.deepcopy(self)
        made.arrays |= arrays
        return made

    def run(self, implementation, function=varlen_attention, **options):
        """out, lse and the gradients by name, of every array that has one."""
        given = {n: options.pop(n) for n in ("sinks", "scale") if isinstance(options.get(n), (
            np.ndarray, jax.Array))}  # fmt: skip
        primal = {n: self.arrays[n] for n in ("query", "key", "value")} | given
        bounds = {n: x for n, x in self.arrays.items() if n not in primal}
        static = {n: x for n, x in options.items() if not isinstance(x, np.ndarray)}
        others = {n: x for n, x in options.items() if n not in static}

        @jax.jit
        def results(primal, bounds, others, cotangents):
            def call(primal):
                return function(
                    **primal, **bounds, **others, **static, return_lse=True,
                    implementation=implementation, deterministic=True,
                )  # fmt: skip

            (out, lse), pullback = jax.vjp(call, primal)
            return {"out": out, "lse": lse} | pullback(cotangents)[0]

        made = results(primal, bounds, others, (self.d_out, self.d_lse))
        return {name: np.asarray(x) for name, x in made.items()}


def one_by_one(packed, **options):
    """The same from the oracle; zeros and -inf for what belongs to no sequence."""
    made = {name: np.zeros_like(packed.arrays[name]) for name in ("query", "key", "value")}
    made |= {"out": np.zeros_like(packed.d_out), "lse": np.full_like(packed.d_lse, -np.inf)}
    sums = {n: 0 for n in ("sinks", "scale") if isinstance(options.get(n), (np.ndarray, jax.Array))}
    for rows, keys in zip(packed.rows, packed.keys, strict=True):
        places = {"query": rows, "key": keys, "value": keys}
        results = attend(
            **{name: packed.arrays[name][None, place] for name, place in places.items()}, **options,
            d_out=packed.d_out[None, rows], d_lse=packed.d_lse[None, :, rows], precision="float32",
        )  # fmt: skip
        for name, place in (places | {"out": rows}).items():
            made[name][place] = results[name][0]
        made["lse"][:, rows] = results["lse"][0]
        sums = {name: total + results[name] for name, total in sums.items()}
    return made | sums


def close(actual, desired, dtype):
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    assert actual.keys() == desired.keys()
    for name, x in desired.items():
        size = max(1.0, np.abs(np.where(np.isfinite(x), x, 0).astype(np.float64)).max(initial=0))
        np.testing.assert_allclose(
            actual[name].astype(np.float64), np.float64(x), rtol=0, atol=tolerance * size,
            err_msg=name,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("packing", "options"),
    [(packing, "bottom right") for packing in PACKINGS]
    + [("other keys", options) for options in OPTIONS if options != "bottom right"]
    + [("gaps", "alibi and sinks"), ("no keys, no queries", "alibi and sinks")]
    + [(packing, "causal") for packing in ("long", "few keys", "empty tiles first")],
)
def test_equals_each_sequence_alone(way, packing, options):
    implementation, dtype = way
    packed = Packed(packing, dtype)
    actual = packed.run(implementation, **OPTIONS[options])
    desired = one_by_one(packed, **OPTIONS[options])
    if "scale" in actual:  # a sum that cancels
        arrays = {"query": packed.arrays["query"], "scale": OPTIONS[options]["scale"]}
        judge_scale(actual.pop("scale"), desired.pop("scale"), arrays, desired["query"])
    close(actual, desired, dtype)


@pytest.mark.parametrize("wrong", ["a longer sequence", "the other alignment", "not packed"])
def test_the_comparison_can_fail(wrong):
    packed = Packed("other keys", "float32")
    other, given = packed, OPTIONS["bottom right"]
    if wrong == "a longer sequence":
        bounds = packed.arrays["cu_seqlens_k"]
        other = packed.changed(cu_seqlens_k=bounds + np.int32([0, 1, 0, 0]))
    elif wrong == "not packed":
        ends = {name: packed.arrays[name][[0, -1]] for name in ("cu_seqlens_q", "cu_seqlens_k")}
        other = packed.changed(**ends)
    else:
        given = OPTIONS["causal"]
    with pytest.raises(AssertionError):
        close(other.run("xla", **given), one_by_one(packed, **OPTIONS["bottom right"]), "float32")


def by_segment_ids(packed, implementation, **options):
    """The same by segment ids, of queries and keys that are packed alike."""
    segments = packed.changed()
    bounds = segments.arrays.pop("cu_seqlens_q")
    np.testing.assert_array_equal(bounds, segments.arrays.pop("cu_seqlens_k"))
    ids = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)).astype(np.int32)
    ids = {"query_segment_ids": ids, "key_value_segment_ids": ids}
    return segments.run(implementation, attention, **options, **ids)


@pytest.mark.parametrize("options", ["causal", "window", "alibi and sinks"])
def test_equals_segment_ids_where_queries_and_keys_are_packed_alike(way, options):
    """Then positions differ by a constant within each sequence, which causality does not see."""
    implementation, dtype = way
    packed = Packed("alike", dtype)
    actual = by_segment_ids(packed, implementation, **OPTIONS[options])
    close(actual, packed.run(implementation, **OPTIONS[options]), dtype)


class Many(Packed):
    """Sequences of unequal lengths, some of them empty, that fill all tokens."""

    def __init__(self, sequences, tokens, dtype):
        rng = np.random.default_rng(sequences)
        bounds = np.sort(rng.integers(0, tokens + 1, sequences + 1)).astype(np.int32)
        bounds[0], bounds[-1] = 0, tokens

        def normal(*shape):
            return rng.standard_normal(shape, np.float32)

        self.arrays = {"query": normal(tokens, 2, 32)}
        self.arrays |= {name: normal(tokens, 1, 32) for name in ("key", "value")}
        self.arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in self.arrays.items()}
        self.arrays |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), bounds)
        self.d_out, self.d_lse = normal(tokens, 2, 32).astype(jnp.dtype(dtype)), normal(2, tokens)


@pytest.mark.parametrize(
    ("implementation", "sequences", "tokens"),
    [
        ("xla", 15, 1000),
        # On Hopper: more than 1024 tiles, which stay in the order of rows; sequences for whose
        # bounds there is no place in shared memory, which have no tiles of their own.
        pytest.param("cuda", 1200, 131_072, marks=pytest.mark.gpu),
        pytest.param("cuda", 5000, 400_000, marks=pytest.mark.gpu),
    ],
)
def test_many_sequences_equal_segment_ids(implementation, sequences, tokens):
    dtype = "float32" if implementation == "xla" else "bfloat16"
    packed = Many(sequences, tokens, dtype)
    actual = packed.run(implementation, **OPTIONS["causal"])
    desired = by_segment_ids(packed, implementation, **OPTIONS["causal"])
    assert np.isfinite(desired["lse"]).all()
    close(actual, desired, dtype)


def test_one_program_for_all_lengths(way):
    """The bounds are operands: other lengths compile nothing."""
    implementation, dtype = way
    packed, traces = Packed("alike", dtype), []

    @jax.jit
    def call(arrays):
        traces.append(1)
        return varlen_attention(**arrays, implementation=implementation)

    for bounds in ([0, 50, 51, 121, 130], [0, 0, 10, 130, 130], [3, 3, 3, 4, 90]):
        given = {f"cu_seqlens_{x}": np.int32(bounds) for x in "qk"}
        call(packed.arrays | given)
    assert len(traces) == 1


# Isolation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packing", "options"), [("alike", "causal"), ("other keys", "alibi and sinks")]
)
def test_other_sequences_reach_nothing(way, packing, options):
    """All but one sequence a thousand times larger: the same bits in it, out and gradients."""
    implementation, dtype = way
    packed, chosen = Packed(packing, dtype), 2
    places = {"query": packed.rows, "key": packed.keys, "value": packed.keys}
    larger = {}
    for name, place in places.items():
        larger[name] = packed.arrays[name] * np.asarray(100, packed.arrays[name].dtype)
        larger[name][place[chosen]] = packed.arrays[name][place[chosen]]
    clean = packed.run(implementation, **OPTIONS[options])
    dirty = packed.changed(**larger).run(implementation, **OPTIONS[options])
    for name, place in (places | {"out": packed.rows}).items():
        assert_same_bits(dirty[name][place[chosen]], clean[name][place[chosen]])
    assert (dirty["out"] != clean["out"]).any()
    assert_same_bits(dirty["lse"][:, packed.rows[chosen]], clean["lse"][:, packed.rows[chosen]])


@pytest.mark.parametrize(
    ("packing", "options"),
    [("gaps", "causal"), ("gaps", "scores"), ("no keys, no queries", "alibi and sinks"),
     ("nothing", "alibi and sinks")],
)  # fmt: skip
def test_what_belongs_to_no_sequence_may_be_nan(way, packing, options):
    """Rows and keys outside, and keys of a sequence without queries: zeros, and nothing leaks."""
    implementation, dtype = way
    packed = Packed(packing, dtype)
    clean = packed.run(implementation, **OPTIONS[options])
    rows, keys = (
        np.ones(len(packed.arrays[name]), bool) for name in ("query", "key")
    )  # in no sequence
    for place, seen_keys in zip(packed.rows, packed.keys, strict=True):
        rows[place] = False
        keys[seen_keys] = place.start == place.stop
    assert rows.any() or keys.any()
    dirty = packed.changed()
    dirty.arrays["query"][rows] = dirty.d_out[rows] = np.nan
    dirty.d_lse[:, rows] = dirty.arrays["key"][keys] = dirty.arrays["value"][keys] = np.nan
    results = dirty.run(implementation, **OPTIONS[options])
    assert_same_bits(results, clean)
    assert not results["out"][rows].any()
    assert np.isneginf(results["lse"][:, rows]).all()
    for name, none in (("query", rows), ("key", keys), ("value", keys)):
        assert not results[name][none].any()


def padded(dtype):
    """Two documents, and padding of ids that the other side does not have."""
    packed = Packed("one", dtype)
    del packed.arrays["cu_seqlens_q"], packed.arrays["cu_seqlens_k"]
    ids = np.repeat([1, 2, 0], (60, 40, 30)).astype(np.int32)
    return packed, {"query_segment_ids": ids, "key_value_segment_ids": np.where(ids == 0, 7, ids)}


@pytest.mark.parametrize("options", ["causal", "alibi and sinks", "scores"])
def test_padding_by_ids_may_be_nan(way, options):
    implementation, dtype = way
    packed, ids = padded(dtype)
    given = OPTIONS[options] | ids
    clean = packed.run(implementation, attention, **given)
    none = ids["query_segment_ids"] == 0
    dirty = packed.changed()
    for name in ("query", "key", "value"):
        dirty.arrays[name][none] = np.nan
    if "sinks" not in given:  # those rows see the sink, and their cotangent is its
        dirty.d_out[none] = np.nan
    results = dirty.run(implementation, attention, **given)
    assert_same_bits(results, clean)
    assert not results["out"][none].any()


def test_padding_reaches_no_sink(way):
    """Rows past their length: NaN in d_out and d_lse, and the same gradient of sinks."""
    implementation, dtype = way
    packed, _ = padded(dtype)
    given = {"sinks": np.float32([0.3, -2, np.inf, -np.inf]), "query_seq_lengths": np.int32([77])}
    clean = packed.run(implementation, attention, **given)
    dirty = packed.changed()
    dirty.d_out[77:], dirty.d_lse[:, 77:] = np.nan, np.nan
    results = dirty.run(implementation, attention, **given)
    assert np.isfinite(results["sinks"]).all()
    assert_same_bits(results, clean)
