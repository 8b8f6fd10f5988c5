"""Random calls, 200 on a CPU and 2000 on a GPU: fuzz.py, and proof that it would find something."""

import concurrent.futures
import itertools
import os
import subprocess
import sys

import draws
import fuzz
import jax
import numpy as np
import pytest
from cases import LENGTHS, PACKED, Case
from compare import assert_same_bits, expected, run, with_seeds
from oracle import attend
from ways import NO_EMULATOR

# Compiling the reference for a shape takes a second, a run on the emulator a tenth of it.
REFERENCE_SEEDS, EMULATOR_SEEDS = range(40), range(40, 200)
GPU_CALLS, GPU_PROCESSES, GPU_CALLS_EACH = 2000, 8, 8  # the last: in one program


@pytest.mark.parametrize("seed", REFERENCE_SEEDS)
def test_reference(seed):
    fuzz.check(seed, "reference")


@NO_EMULATOR
@pytest.mark.parametrize("seed", EMULATOR_SEEDS)
def test_emulator(seed):
    fuzz.check(seed, "emulator")


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_gpu(request):
    """In processes of their own: most of the time is tracing, and a fault ends one process only."""
    each = GPU_CALLS // GPU_PROCESSES
    threads = max(1, (os.cpu_count() or 1) // GPU_PROCESSES)

    def run(first):
        command = [sys.executable, fuzz.__file__, "--way", "gpu", "--threads", str(threads),
                   "--each", str(GPU_CALLS_EACH)]  # fmt: skip
        command += ["--family", request.config.getoption("--cuda-family")]
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONFAULTHANDLER": "1",
        }  # fmt: skip
        return subprocess.run(
            [*command, "--seed", str(first), "--count", str(each)],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(GPU_PROCESSES) as pool:
        done = list(pool.map(run, range(0, GPU_CALLS, each)))
    reports = [f"{x.args}: exit status {x.returncode}\n{x.stdout}{x.stderr[-4000:]}" for x in done]
    assert not any(x.returncode for x in done), "\n".join(reports)


NOT_PACKED = ("bias", "mask", "query lengths", "key lengths", "prefix", "spans", "sink tokens",
              "segments in runs", "segments, mixed")  # fmt: skip
PACKINGS = ("packed", "packed, no queries", "packed, no keys", "packed, unequal lengths",
            "packed, rows outside", "packed, keys outside", "packed, long")  # fmt: skip


def test_every_pair_of_features_is_called():
    """Among the seeds of the emulator, but for pairs that exclude each other."""
    found = [draws.features(draws.draw(seed)) for seed in EMULATOR_SEEDS]
    excluded = [{"bfloat16", "float16"}, {"more keys", "more queries"},
                {"static scale", "traced scale"}, {"segments in runs", "segments, mixed"},
                {"segments in runs", "sink tokens"},
                {"segments, mixed", "sink tokens"}]  # fmt: skip
    excluded += map(set, itertools.product(PACKINGS, NOT_PACKED))
    assert set.union(*found) >= {*PACKINGS, *NOT_PACKED}
    pairs = map(set, itertools.combinations(sorted(set.union(*found)), 2))
    missing = [pair for pair in pairs if not any(pair <= one for one in found)]
    assert sorted(map(sorted, missing)) == sorted(map(sorted, excluded))


def test_packed_sequences_are_long_in_a_third_of_their_calls():
    """Then the Hopper family may have tiles for each: csrc/sm90/sequence_tiles.h."""
    found = [draws.features(draws.draw(seed)) for seed in range(2000)]
    lengths = ["packed, long" in one for one in found if "packed" in one]
    assert 1 / 3 <= np.mean(lengths) < 1 / 2


def test_a_seed_is_one_call():
    assert draws.draw(5) == draws.draw(5)
    assert draws.draw(5).case.options == draws.draw(5).case.options
    assert draws.draw(5) != draws.draw(6)


def _without(name):
    return lambda operands: {key: x for key, x in operands.items() if key != name}


def _change(name, change):
    return lambda operands: operands | ({name: change(operands[name])} if name in operands else {})


def _later(bounds):
    """The second sequence begins one row later, where there is room for that."""
    return np.maximum.accumulate(
        np.minimum(bounds + (np.arange(bounds.shape[1]) == 1), bounds[:, -1:]), axis=1
    )


def _one_sequence(operands):
    return operands | {name: operands[name][:, [0, -1]] for name in PACKED if name in operands}


def _widen(window):
    left, right = window if isinstance(window, tuple) else (window, window)
    return left, right if right is None else right + 1


MUTANTS = {  # what is done to a call's options and arrays before it is run
    "causality ignored": _without("is_causal"),
    "alignment ignored": _without("causal_alignment"),
    "window ignored": _without("local_window_size"),
    "window one key wider": _change("local_window_size", _widen),
    "query lengths ignored": _without(LENGTHS[0]),
    "key lengths ignored": _without(LENGTHS[1]),
    "query lengths one longer": _change(LENGTHS[0], lambda x: x + 1),
    "key lengths one longer": _change(LENGTHS[1], lambda x: x + 1),
    "mask ignored": _without("mask"),
    "bias ignored": _change("bias", np.zeros_like),
    "static or traced scale ignored": _without("scale"),
    "cap ignored": _without("logits_soft_cap"),
    "cap one percent off": _change("logits_soft_cap", lambda x: 1.01 * x),
    "slopes ignored": _without("alibi_slopes"),
    "slopes of the next head": _change("alibi_slopes", lambda x: np.roll(x, 1, axis=-1)),
    "sinks ignored": _change("sinks", lambda x: x - np.inf),
    "sinks of the next head": _change("sinks", lambda x: np.roll(x, 1, axis=-1)),
    "dropout ignored": _without("dropout_rate"),
    "dropout by another key": _change("dropout_key", lambda x: x + np.uint32(1)),
    "sink tokens ignored": _without("num_sink_tokens"),
    "one sink token more": _change("num_sink_tokens", lambda x: x + 1),
    "prefix ignored": _without("prefix_lengths"),
    "prefix one longer": _change("prefix_lengths", lambda x: x + 1),
    "spans ignored": _without("bidirectional_spans"),
    "spans one longer": _change("bidirectional_spans", lambda x: x + np.int32([0, 1])),
    "ids merged": _change("query_segment_ids", lambda x: x // 2),
    "ids of the keys shifted": _change("key_value_segment_ids", lambda x: np.roll(x, 1, axis=1)),
    "sequences of queries one longer": _change("cu_seqlens_q", _later),
    "sequences of keys one longer": _change("cu_seqlens_k", _later),
    "sequences merged": _one_sequence,
    "key heads rotated": _change("key", lambda x: np.roll(x, 1, axis=2)),
    "batch rotated": _change("value", lambda x: np.roll(x, 1, axis=0)),
    "last value lost": _change("value", lambda x: np.concatenate([x[:, :-1], 0 * x[:, -1:]], 1)),
}


def _passes(call, mutate=lambda operands: operands):
    """Whether the oracle, run on what `mutate` makes of a call, passes for the call."""
    case, dtype = call.case, call.dtype
    arrays, (d_out, d_lse) = case.arrays(dtype), case.cotangents(dtype)
    operands = with_seeds(mutate(arrays | case.static()))
    results = attend(**operands, d_out=d_out, d_lse=d_lse, precision="float32")
    dtypes = {name: x.dtype for name, x in arrays.items()} | {"out": d_out.dtype, "lse": "float32"}
    results = {name: np.asarray(x).astype(dtypes[name]) for name, x in results.items()
               if name in dtypes}  # fmt: skip
    try:
        fuzz.judge_call(case, dtype, results)
    except AssertionError:
        return False
    return True


def _does_something(mutant, call):
    """Whether a mutation changes a call's operands at all: most of the time is the oracle's."""
    operands = call.case.arrays(call.dtype) | call.case.static()
    mutated = MUTANTS[mutant](operands)
    return mutated.keys() != operands.keys() or any(
        mutated[name] is not x for name, x in operands.items()
    )


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_found(mutant):
    """By at least three of the seeds; without the mutation they pass."""
    calls = (call for call in map(draws.draw, EMULATOR_SEEDS) if _does_something(mutant, call))
    found = (call for call in calls if not _passes(call, MUTANTS[mutant]))
    found = list(itertools.islice(found, 3))
    assert len(found) == 3
    assert all(map(_passes, found))


@pytest.mark.parametrize("dead", [False, True], ids=["device lives", "device is dead"])
def test_failures_are_shown_and_the_device_is_asked(dead, monkeypatch):
    """Seed 2 fails: the line that repeats it, then the canary, whose failure ends the run."""
    tried, shown = [], []

    def results(call, dtype, way, seed=0, family="auto"):
        tried.append(call.case.name)
        broken = call.case.name == "fuzz-2" or (dead and not call.case.name.startswith("fuzz"))
        if broken:
            raise RuntimeError("illegal address")
        return expected(call.case, dtype, precision="float32") | {"out": None}

    monkeypatch.setattr(fuzz, "results", results)
    monkeypatch.setattr(fuzz, "judge_call", lambda case, dtype, actual: None)
    status = fuzz.fuzz(range(5), "reference", show=shown.append)
    assert status == (2 if dead else 1)
    assert "python tests/fuzz.py --seed 2 --way reference\n" in shown[0]
    assert "illegal address" in shown[0]
    assert "dense-64x64" in tried
    assert any("canary failed" in text for text in shown) == dead


def test_calls_of_one_program_equal_those_alone(monkeypatch):
    """In their order; one that raises is named, and so is a program that raises alone."""
    monkeypatch.setattr(fuzz, "implementation", lambda family: "xla")
    cases = Case("three", 3, batch=1, heads=1), Case("four", 4, 5, batch=1, heads=1)
    calls = [draws.Call(case, "bfloat16", False) for case in cases]
    made = jax.tree.map(np.asarray, fuzz.together(calls))
    for call, results in zip(calls, made, strict=True):
        assert_same_bits(results, dict(run(call.case, call.dtype, implementation="xla")))

    def results(call, *_):
        return None if call.case.name == "fuzz-2" else call.case.name

    def judge(case, dtype, made):
        assert made is not None, "nothing came back"

    monkeypatch.setattr(fuzz, "results", results)
    monkeypatch.setattr(fuzz, "judge_call", judge)
    monkeypatch.setattr(fuzz, "together", lambda calls, family: [x.case.name for x in calls])
    assert fuzz.check_some(range(4), "gpu") == []
    monkeypatch.setattr(fuzz, "together", lambda calls, family: 1 / 0)
    program, alone = map(str, fuzz.check_some(range(4), "gpu"))
    assert "range(0, 4) in one program" in program
    assert "ZeroDivisionError" in program
    assert "--seed 2 --way gpu" in alone
    assert "nothing came back" in alone


def test_command_line_repeats_a_seed():
    command = [sys.executable, fuzz.__file__, "--seed", "3", "--count", "2", "--threads", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 calls through reference: all right" in done.stdout
