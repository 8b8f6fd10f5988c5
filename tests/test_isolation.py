"""NaN in every token that sees nothing, or that no row sees: not a bit of any result changes.

In lengths, packings and segments there is such padding; here there is all else that nobody looks
at: the future of the last row, what lies before the first row's window, between windows and sink
tokens, behind spans; and a bias wherever a row does not see the key. test_metamorphic.py says the
same of keys that some rows see, a thousand times larger: tiles are shared, there NaN may spread.
"""

import numpy as np
import pytest
from compare import assert_same_bits
from emulator import kernels
from test_metamorphic import BOTTOM, segments
from ways import DTYPE, WAYS, Call, oracle, parts, visible, way_params

CAUSAL = {"is_causal": True}
CALLS = {
    "future": Call("i-future", 70, 150, heads=4, kv_heads=2, options=CAUSAL),
    "rows before the first key": Call("i-before", 150, 70, options=CAUSAL | BOTTOM),
    "right": Call("i-right", 70, 200, options={"local_window_size": (None, 9)}),
    "left": Call("i-left", 70, 200, options={"local_window_size": (9, None)} | BOTTOM),
    "window behind all keys": Call("i-window", 200, 70, options={"local_window_size": (20, 3)}),
    "lengths": Call("i-lengths", 150, options=CAUSAL | BOTTOM).on(
        query_seq_lengths=np.int32([130, 0]), key_value_seq_lengths=np.int32([66, 140])),
    "sink tokens": Call("i-tokens", 70, 300, options={
        "local_window_size": (9, 0), "num_sink_tokens": 5} | BOTTOM),
    "spans": Call("i-spans", 70, 250, options=CAUSAL).on(
        bidirectional_spans=np.int32([[[50, 90], [69, 140]], [[3, 9], [200, 220]]])),
    "prefix": Call("i-prefix", 70, 150, options=CAUSAL).on(prefix_lengths=np.int32([100, 0])),
    "other segments": Call("i-segments", 150).on(**segments((50, 100), (20, 130))).on(
        key_value_segment_ids=np.stack([np.arange(150) // 50 % 2 * 7, np.arange(150) % 3])),
    "scores": Call("i-scores", 70, 150, alibi=(2,), bias=(2, 2, 70, 150), options={
        "is_causal": True, "logits_soft_cap": 3.0, "dropout_rate": 0.2}),
    "mask": Call("i-mask", 70, 150, bias=(1, 1, 70, 150)).on(
        mask=np.random.default_rng(0).random((1, 1, 70, 150)) < 0.5),
}  # fmt: skip
CALLS["other segments"] = CALLS["other segments"].on(
    key_value_segment_ids=CALLS["other segments"].given["key_value_segment_ids"].astype(np.int32)
)


def hopper(call, gradients=True):
    return kernels.run(call, DTYPE, gradients=gradients, deterministic=True, family="sm90")


RUNS = WAYS | {"emulator, sm90": hopper}
MARKED = {param.values[0]: param.marks for param in way_params(*WAYS)}
MARKED["emulator, sm90"] = MARKED["emulator"]
ON_THE_REFERENCE = ("sink tokens", "other segments", "scores")  # compiling them takes seconds
PAIRS = [
    pytest.param(way, name, marks=MARKED[way])
    for way in RUNS
    for name in (ON_THE_REFERENCE if way == "reference" else CALLS)
]


def poisoned(call):
    """The call with NaN wherever nobody looks."""
    sees = visible(call)  # [B, N, T, S]
    arrays = {name: np.array(x) for name, x in call.all_arrays().items()}
    rows, keys = ~sees.any(axis=(1, 3)), ~sees.any(axis=(1, 2))
    count = rows.sum() + keys.sum()
    if "mask" not in arrays:  # kernels read it score by score, and keep no list of unseen keys
        for name in ("query", "d_out"):
            arrays[name][rows] = np.nan
        for name in ("key", "value"):
            arrays[name][keys] = np.nan
        arrays["d_lse"].swapaxes(1, 2)[rows] = np.nan
    if "bias" in arrays:
        batch, heads = arrays["bias"].shape[:2]
        hidden = ~sees[:batch, :heads] if batch > 1 else ~sees.any(axis=(0, 1), keepdims=True)
        arrays["bias"][hidden] = np.nan
        count += hidden.sum()
    assert count > 0
    names = [name for name in arrays if name not in call.given]
    return call.on(**{name: arrays[name] for name in names})


def check(run, name):
    call = CALLS[name]
    names = ("out", "lse", "query", "key", "value", "bias")
    clean, dirty = (parts(run(x), names=names) for x in (call, poisoned(call)))
    assert_same_bits(dirty, clean)


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_what_nobody_looks_at_may_be_nan(way, name):
    check(RUNS[way], name)


@pytest.mark.parametrize("name", CALLS)
def test_nan_is_noticed(name):
    """By attention that multiplies what is hidden by zero: the oracle, or one that masks less."""

    def careless(call, gradients=True):
        results = oracle(call, gradients)
        arrays = call.all_arrays()
        leak = sum(
            0 * np.float32(x).sum() for n, x in arrays.items() if n in ("query", "key", "bias")
        )
        return results | {"lse": results["lse"] + leak}

    with pytest.raises(AssertionError):
        check(careless, name)
