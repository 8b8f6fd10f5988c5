"""Relations between calls, most of them bit for bit: on the reference, the emulator and a GPU.

Each relation is a test of `run`, a way of running a Call (ways.py). test_metamorphic_mutants.py
hands them wrong ways, and they must fail.
"""

import jax
import numpy as np
import pytest
from cases import LENGTHS, normal
from compare import assert_same_bits
from ways import (
    IMPLEMENTATIONS,
    WAYS,
    Call,
    assert_same,
    differing,
    parts,
    through_jax,
    visible,
    way_params,
)


@pytest.fixture(params=way_params("reference", "emulator", "gpu"))
def run(request):
    return WAYS[request.param]


# What a row does not see does not reach it -------------------------------------------------------

BOTTOM = {"causal_alignment": "bottom_right"}


def runs(*lengths, modulo=9):
    """Segment ids [1, tokens] in runs of these lengths; they come back after `modulo` runs."""
    return np.repeat(np.arange(len(lengths)) % modulo, lengths).astype(np.int32)[None]


def segments(*entries, modulo=9):
    """Both arrays of ids, packed alike, for batch entries of these lengths of runs."""
    ids = np.concatenate([runs(*lengths, modulo=modulo) for lengths in entries])
    return {"query_segment_ids": ids, "key_value_segment_ids": ids}


UNSEEN = {
    "causal": Call("m-causal", 150, options={"is_causal": True}),
    "bottom-right": Call("m-bottom", 70, 150, options={"is_causal": True} | BOTTOM),
    "window": Call("m-window", 150, heads=4, kv_heads=2, options={"local_window_size": (20, 7)}),
    "left": Call("m-left", 150, batch=1, options={"local_window_size": (9, None)}),
    "right": Call("m-right", 150, 90, batch=1, options={"local_window_size": (None, 4)} | BOTTOM),
    "lengths": Call("m-lengths", 150, options={
        "local_window_size": (30, 5), "query_seq_lengths": (130, 77),
        "key_value_seq_lengths": (140, 66)} | BOTTOM),
    "mask": Call("m-mask", 80, 150, bias=(1, 2, 80, 150), options={"is_causal": True}).on(
        mask=np.random.default_rng(1).random((2, 1, 80, 150)) < 0.05),
    "segments": Call("m-segments", 150, heads=4, kv_heads=2, options={"is_causal": True}).on(
        **segments((30, 45, 75), (70, 80))),
    "segments, mixed": Call("m-mixed", 150, sinks=(2,)).on(
        **segments((37, 4, 30, 60, 19), (150,), modulo=3)),
    "packed otherwise": Call("m-cross", 70, 150, batch=1).on(
        **segments((35, 0, 35)) | {"key_value_segment_ids": runs(60, 60, 30)}),
    "spans": Call("m-spans", 150, options={"is_causal": True}).on(
        bidirectional_spans=np.int32([[[50, 66], [90, 120]], [[3, 9], [41, 58]]])),
    "prefix": Call("m-prefix", 150, options={"is_causal": True}).on(
        prefix_lengths=np.int32([75, 0])),
    "sink tokens": Call("m-tokens", 150, options={
        "local_window_size": (9, 3), "num_sink_tokens": 5}),
    "everything": Call("m-scores", 90, 150, alibi=(2,), sinks=(2,), options={
        "is_causal": True, "logits_soft_cap": 3.0, "dropout_rate": 0.2} | BOTTOM),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSEEN)
def test_unseen_keys_reach_no_row(run, name):
    """Keys that none of rows 40 to 59 sees, a thousand times larger: the same bits in these rows.

    With cotangents in these rows only, the same bits in all gradients too, and zeros for the keys.
    The other rows do see them, and change. (So they are finite: tiles are shared, a probability of
    0 times a NaN in a row of V is NaN. NaN is for padding alone, in the next test.)
    """
    rows, call = np.arange(40, 60), UNSEEN[name]
    arrays, (d_out, d_lse) = call.arrays(), call.cotangents()
    others = np.setdiff1d(np.arange(call.q_len), rows)
    d_out[:, others], d_lse[..., others] = 0, 0
    call = call.on(d_out=d_out, d_lse=d_lse)

    sees = visible(call)
    heads, kv_heads = sees.shape[1], arrays["key"].shape[2]
    by_group = sees.reshape(len(sees), kv_heads, heads // kv_heads, *sees.shape[2:])
    unseen = ~by_group[..., rows, :].any(axis=(2, 3)).swapaxes(1, 2)  # [B, S, K]
    assert unseen.any()
    factor = np.where(unseen, 1000, 1)[..., None].astype(arrays["key"].dtype)
    clean = run(call)
    dirty = run(call.on(key=arrays["key"] * factor, value=arrays["value"] * factor))

    for names, index in (
        (("out", "query"), np.s_[:, rows]),
        (("lse",), np.s_[..., rows]),
        (("key", "value", "bias"), ...),
    ):
        assert_same_bits(parts(dirty, index, names), parts(clean, index, names))
    assert not any(x[unseen].any() for x in parts(clean, names=("key", "value")).values())
    by_head = unseen.swapaxes(1, 2).repeat(heads // kv_heads, axis=1)[:, :, None]
    changed = np.asarray(dirty["lse"]) != np.asarray(clean["lse"])
    np.testing.assert_array_equal(changed, (sees & by_head).any(axis=-1))


@pytest.mark.parametrize("k_lengths", [(64, 129), (1, 150)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "local_window_size": (40, 9)}])
def test_padding_reaches_nothing(run, options, k_lengths):
    """NaN in all that lies past the lengths: where no row sees, kernels put zeros."""
    lengths = dict(zip(LENGTHS, ((150, 33), k_lengths), strict=True))
    call = Call("m-padding", 150, heads=4, kv_heads=2, options=options | BOTTOM)
    call = call.on(**{name: np.int32(x) for name, x in lengths.items()})
    dirty = {name: x.copy() for name, x in call.all_arrays().items() if name not in LENGTHS}
    for b, (q_len, k_len) in enumerate(zip(*lengths.values(), strict=True)):
        dirty["d_lse"][b, :, q_len:] = np.nan
        for name in ("query", "d_out", "key", "value"):
            dirty[name][b, k_len if name in ("key", "value") else q_len :] = np.nan
    assert_same_bits(parts(run(call.on(**dirty))), parts(run(call)))


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_entries_do_not_mix(run, axis):
    """NaN in all other batch entries, or in all other key heads and their query heads."""
    call = Call("m-mix", 70, 90, batch=3, heads=6, kv_heads=3, options={"is_causal": True})

    def thirds(name, x):
        position = 0 if axis == "batch" else 1 if name in ("lse", "d_lse") else 2
        return np.split(np.asarray(x), 3, position), position

    arrays = {}
    for name, x in call.all_arrays().items():
        (first, kept, last), position = thirds(name, x)
        arrays[name] = np.concatenate([first * np.nan, kept, last * np.nan], position)
    arrays = {name: x.astype(call.all_arrays()[name].dtype) for name, x in arrays.items()}
    clean, dirty = run(call), run(call.on(**arrays))
    for name, x in parts(clean).items():
        (_, kept, _), (_, dirty_kept, dirty_last) = (thirds(name, y)[0] for y in (x, dirty[name]))
        assert_same_bits(dirty_kept, kept)
        if name not in ("key", "value"):  # the last of which no row sees
            assert np.isnan(np.float32(dirty_last)).all()


def test_any_lengths_are_clamped(run):
    """Whatever int32 they hold, to [0, T] and [0, S]: no length makes a kernel read elsewhere."""
    call = Call("m-any", 70, 90, batch=4, heads=2, kv_heads=1, options={"is_causal": True} | BOTTOM)
    rng, limits = np.random.default_rng(0), (70, 90)
    for _ in range(8):
        given = rng.integers(-(2**31), 2**31, (2, 4)).astype(np.int32)
        given[:, 0] = rng.integers(0, 71, 2)  # one entry has keys and rows
        given[:, 1] = rng.permutation([2**31 - 1, -(2**31)])
        clamped = [np.clip(x, 0, limit) for x, limit in zip(given, limits, strict=True)]
        calls = [call.on(**dict(zip(LENGTHS, x, strict=True))) for x in (given, clamped)]
        assert_same_bits(parts(run(calls[0])), parts(run(calls[1])))


# Batches, heads and pieces -----------------------------------------------------------------------

RAGGED = Call("m-batch", 70, 90, batch=3, heads=4, kv_heads=2, options={"is_causal": True} | BOTTOM)
RAGGED = RAGGED.on(query_seq_lengths=np.int32([70, 41, 0]),
                   key_value_seq_lengths=np.int32([90, 66, 13]))  # fmt: skip


@pytest.mark.parametrize("order", [[2, 0, 1], [1], [0, 1, 2, 1, 0]], ids=str)
def test_an_entry_is_the_same_in_any_batch(run, order):
    arrays = {name: x[order] for name, x in RAGGED.all_arrays().items()}
    assert_same(run, parts(run(RAGGED.on(**arrays))), parts(run(RAGGED), order))


def test_grouped_heads_equal_repeated_keys(run):
    call = Call("m-gqa", 70, 90, heads=6, kv_heads=2, options={"is_causal": True})
    repeated = {name: call.arrays()[name].repeat(3, axis=2) for name in ("key", "value")}
    grouped, alone = run(call), run(call.on(**repeated))
    same = ("out", "lse", "query")
    assert_same(run, parts(grouped, names=same), parts(alone, names=same))
    for name in ("key", "value"):  # sums over a group, of rounded terms on one side
        total = np.float32(alone[name]).reshape(2, 90, 2, 3, -1).sum(axis=3)
        np.testing.assert_allclose(np.float32(grouped[name]), total, atol=0.05, rtol=0.02)


def test_pieces_of_keys_merge_by_lse(run):
    """The second entry has no key in the second piece: -inf, a weight of 0."""
    call = Call("m-merge", 70, 150)
    arrays, lengths, split = call.arrays(), np.int32([130, 60]), 80
    whole = run(call.on(key_value_seq_lengths=lengths), gradients=False)
    merged = np.zeros(whole["out"].shape, np.float32)
    for piece, start in ((np.s_[:, :split], 0), (np.s_[:, split:], split)):
        part = run(
            call.on(key=arrays["key"][piece], value=arrays["value"][piece],
                    key_value_seq_lengths=lengths - start), gradients=False,
        )  # fmt: skip
        weight = np.exp(np.asarray(part["lse"]) - np.asarray(whole["lse"]))
        merged += weight.swapaxes(1, 2)[..., None] * np.float32(part["out"])
    np.testing.assert_allclose(merged, np.float32(whole["out"]), atol=4e-3, rtol=2e-2)


def test_prefill_in_pieces(run):
    """The last queries alone, aligned with the last keys: as when the first ones came before."""
    call = Call("m-prefill", 150, options={"is_causal": True} | BOTTOM)
    arrays, split = call.arrays(), 90
    whole = run(call, gradients=False)
    first = call.on(**{name: arrays[name][:, :split] for name in ("query", "key", "value")})
    last = call.on(query=arrays["query"][:, split:])
    for piece, rows in ((first, np.s_[:split]), (last, np.s_[split:])):
        results = run(piece, gradients=False)
        assert_same(run, parts(results), {"out": np.asarray(whole["out"])[:, rows],
                                          "lse": np.asarray(whole["lse"])[..., rows]})  # fmt: skip


# Scale and flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("power", [-3, 2])
def test_power_of_two_moves_between_query_and_scale(run, power, traced):
    factor, call = 2.0**power, Call("m-power", 70, 90, options={"is_causal": True})
    query = call.arrays()["query"]
    factor = np.asarray(factor, query.dtype)

    def scaled(scale, query):
        given = {"scale": np.float32(scale)} if traced else {}
        return call.but(scale=None if traced else scale).on(query=query, **given)

    desired = parts(run(scaled(0.2, query)))
    desired["query"] = desired["query"] / factor
    assert_same_bits(parts(run(scaled(0.2 / float(factor), query * factor))), desired)


PLAIN = Call("m-flags", 90, 130)
CAUSAL = PLAIN.but(is_causal=True)
SQUARE = Call("m-flags-square", 90)
IDS = ("query_segment_ids", "key_value_segment_ids")
ONE_SEGMENT = np.full((2, 90), 7, np.int32)
FLAGS = {  # a call, the flag or flags, a value that changes the output and one that does not
    "causal": (PLAIN, "is_causal", True, False),
    "alignment": (CAUSAL, "causal_alignment", "bottom_right", "top_left"),
    "alignment of a window": (
        PLAIN.but(local_window_size=(9, 9)), "causal_alignment", "bottom_right", "top_left"),
    "window": (PLAIN, "local_window_size", 8, (130, 130)),
    "left": (PLAIN, "local_window_size", (8, None), (2**31 - 1, None)),
    "right": (PLAIN, "local_window_size", (None, 8), (None, 129)),
    "query lengths": (PLAIN, "query_seq_lengths", np.int32([50, 89]), np.int32([90, 91])),
    "key lengths": (PLAIN, "key_value_seq_lengths", np.int32([0, 129]), np.int32([130, 200])),
    "key lengths, aligned": (
        CAUSAL.but(**BOTTOM), "key_value_seq_lengths", np.int32([0, 129]), np.int32([130, 200])),
    "mask": (PLAIN, "mask", np.tri(90, 130, 7, bool), np.ones((90, 130), bool)),
    "bias": (PLAIN, "bias", normal(np.random.default_rng(0), (2, 1, 1, 130), "float32"),
             np.zeros((2, 1, 1, 130), np.float32)),
    "scale": (PLAIN, "scale", 0.4, 1 / np.sqrt(PLAIN.head_dim)),
    "cap": (PLAIN, "logits_soft_cap", 1.5, None),
    "alibi": (PLAIN, "alibi_slopes", np.float32([0.1, 0.7]), np.zeros(2, np.float32)),
    "sinks": (CAUSAL, "sinks", np.float32([-1, 2]), np.full(2, -np.inf, np.float32)),
    "dropout": (PLAIN, "dropout_rate", 0.3, 0.0),
    "sink tokens": (PLAIN.but(local_window_size=(8, 2)), "num_sink_tokens", 3, 0),
    "segments": (SQUARE, IDS, [*segments((50, 40), (20, 70)).values()], [ONE_SEGMENT] * 2),
    "prefix": (CAUSAL, "prefix_lengths", np.int32([60, 0]), np.int32([0, -1])),
    "spans": (CAUSAL, "bidirectional_spans", np.int32([[[20, 50]], [[3, 9]]]),
              np.int32([[[20, 20]], [[9, 3]]])),
}  # fmt: skip
NO_FORMULA = ("segments", "prefix", "spans", "sink tokens")  # a family may run other kernels
OF_ALL_ROWS = ("scale", "bias", "cap", "alibi", "sinks")


def with_flag(call, name, value):
    if isinstance(name, tuple):
        return call.on(**dict(zip(name, value, strict=True)))
    return (call.on if name not in call.options and isinstance(value, np.ndarray) else call.but)(
        **{name: value}
    )


def general(call):
    """With the scale in an array: kernels for general scores, which do not fold it into exp2."""
    return call.on(scale=np.float32(1 / np.sqrt(call.head_dim)))


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_changes_the_rows_that_it_should(run, flag):
    """Exactly those: all for what changes scores, for others those that now see other keys.

    Dropout leaves the log-sum-exp as it is, and changes the output of all rows.
    """
    call, name, value, _ = FLAGS[flag]
    call = general(call) if flag in NO_FORMULA else call
    flagged = with_flag(call, name, value)
    expected = (visible(call) != visible(flagged)).any(axis=-1) | (flag in OF_ALL_ROWS)
    before, after = run(call, gradients=False), run(flagged, gradients=False)
    np.testing.assert_array_equal(differing(run, before["lse"], after["lse"]), expected)
    expected = expected | (flag == "dropout")
    assert expected.any()
    moved = (np.asarray(before["out"]) != np.asarray(after["out"])).any(axis=-1).swapaxes(1, 2)
    assert moved[expected].mean() > 0.9  # a change may be less than bfloat16 shows


@pytest.mark.parametrize("flag", FLAGS)
def test_neutral_value_of_a_flag_changes_nothing(run, flag):
    """Not a bit, on kernels; of a flag that makes scores general, beside one that does so too."""
    call, name, _, neutral = FLAGS[flag]
    call = general(call) if flag in ("mask", "bias", "alibi", *NO_FORMULA) else call
    assert_same(run, parts(run(with_flag(call, name, neutral))), parts(run(call)))


# Order and transformations -----------------------------------------------------------------------


def test_calls_in_between_change_nothing(run):
    call = UNSEEN["causal"]
    first = parts(run(call))
    run(RAGGED)
    assert_same_bits(parts(run(call)), first)


TRANSFORMS = {"eager": lambda f: f, "vmap of unbatched": lambda f: jax.jit(jax.vmap(f))}


@pytest.mark.parametrize("way", way_params("reference", "gpu"))
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed_calls_equal_jit(way, name):
    transformed = through_jax(IMPLEMENTATIONS[way], TRANSFORMS[name])
    assert_same(WAYS[way], parts(transformed(RAGGED)), parts(WAYS[way](RAGGED)))
