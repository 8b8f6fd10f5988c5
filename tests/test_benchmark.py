"""The benchmark runs on a CPU, counts work as the field does, and divides the right way round."""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from jax_flashattn import _benchmark_machine, _benchmark_variants, benchmark
from jax_flashattn._benchmark_report import (
    Measured,
    Report,
    Shape,
    aligned,
    cells,
    flop,
    markdown,
    number,
    write_csv,
    write_plots,
)

FULL = Shape(128, 4, 4096, 16, 16, False)
CAUSAL = FULL._replace(causal=True)


def command(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "jax_flashattn.benchmark", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def wrong_ratios(rows, baseline):
    """The rows whose ratio is not the baseline's time in units of the row's."""
    key = [*Shape._fields, "pass"]
    base = {tuple(r[k] for k in key): r for r in rows if r["variant"] == baseline}

    def right(row):
        theirs = base[tuple(row[k] for k in key)]["milliseconds"]
        if not (theirs and row["milliseconds"]):
            return row["ratio"] == ""
        return np.isclose(float(row["ratio"]), float(theirs) / float(row["milliseconds"]))

    return [row for row in rows if not right(row)]


def has_colour(path, colour):
    image = matplotlib.image.imread(path)[..., :3]
    return (np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.1).sum() > 100


@pytest.mark.slow
def test_on_a_cpu(tmp_path):
    arguments = ("--quick", "--shapes", "16,1,64,2,1,no", "16,1,128,2,1,no", "16,1,64,2,2,yes")
    done = command(*arguments, "--against", "xla", "pallas", "--markdown", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"timing: 100%.*18/18", done.stderr)  # three rows, variants, programs
    assert done.stdout.count("\n| 16 | 1 |") == 3  # the Markdown table
    assert re.search(r"\n16 +1 +64 +2/1 +no +\S+ +\S+ +\d+\.\d\d\n", done.stdout)
    for reason in ("no grouped queries", "Only interpret mode is supported on CPU"):
        assert (done.stdout + done.stderr).count(reason) == 1, reason  # once, not in each row

    rows = read(tmp_path / "results.csv")
    assert len(rows) == 3 * 3 * 3  # rows, passes, variants
    for row in rows:
        ran = row["variant"] != "Pallas"
        assert bool(row["milliseconds"]) == ran or row["pass"] == "backward"  # it may be noise
        if row["milliseconds"]:
            work = flop(Shape(*(int(row[k]) for k in Shape._fields)), row["pass"])
            assert 1e-3 < float(row["milliseconds"]) < 1e4
            speed = work / float(row["milliseconds"]) / 1e9
            assert float(row["tflops"]) == pytest.approx(speed)
    assert wrong_ratios(rows, "jax.nn xla") == []
    assert {row["pass"] for row in rows} == {"forward", "backward", "both"}

    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["jax"] == jax.__version__
    assert environment["device"] == "cpu"
    for name in ("tflops_forward", "tflops_both", "ratio"):
        assert has_colour(tmp_path / f"{name}.png", "C0"), name
    assert has_colour(tmp_path / "tflops_forward.png", "C1")
    assert not has_colour(tmp_path / "tflops_forward.png", "C2")  # Pallas never ran


def test_flop_by_hand():
    assert flop(FULL, "forward") == 549_755_813_888  # 4 · 4 · 16 · 4096² · 128 = 2^39
    assert flop(CAUSAL, "forward") == 274_877_906_944
    assert flop(FULL, "backward") == 1_374_389_534_720
    assert flop(CAUSAL, "both") == 962_072_674_304
    grouped = FULL._replace(kv_heads=4)
    assert flop(grouped, "forward") == flop(FULL, "forward")  # scores of each query head


@pytest.fixture
def report():
    """Ours takes twice cuDNN's time forward and half of it backward; Pallas ran one row."""
    made = Report(
        ["ours"], ["jax.nn cudnn", "Pallas"], "jax.nn cudnn", ["forward", "backward"], "bf16", "X"
    )
    for row in (FULL, CAUSAL):
        made.measured[row, "forward", "ours"] = Measured(2e-3, 1755)
        made.measured[row, "forward", "jax.nn cudnn"] = Measured(1e-3, 1980)
        made.measured[row, "backward", "ours"] = Measured(2e-3, None)
        made.measured[row, "backward", "jax.nn cudnn"] = Measured(4e-3, 1830)
    made.measured[FULL, "forward", "Pallas"] = Measured(1e-3, 1900)
    return made


def test_ratio_and_its_check(report, tmp_path, monkeypatch):
    assert report.ratio(FULL, "forward", "ours") == pytest.approx(0.5)
    assert report.ratio(CAUSAL, "backward", "ours") == pytest.approx(2)
    assert report.ratio(FULL, "backward", "Pallas") is None
    write_csv(report, tmp_path / "right.csv")
    assert wrong_ratios(read(tmp_path / "right.csv"), "jax.nn cudnn") == []
    # Positive control: the check above notices a ratio that is upside down.
    right = Report.ratio
    monkeypatch.setattr(Report, "ratio", lambda *a: (x := right(*a)) and 1 / x)
    write_csv(report, tmp_path / "wrong.csv")
    assert len(wrong_ratios(read(tmp_path / "wrong.csv"), "jax.nn cudnn")) == 4


def test_tables(report):
    header, full, causal = cells(report, ["forward"])
    assert header[5:] == ["ours", "jax.nn cudnn", "Pallas", "ours / jax.nn cudnn", "SM MHz"]
    assert full == ["128", "4", "4096", "16/16", "no", "275", "550", "550", "0.50", "1755-1980"]
    assert causal[5:9] == ["137", "275", "", "0.50"]
    lines = aligned([header, full, causal]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].endswith("0.50  1755-1980")
    both = markdown(cells(report, ["forward", "backward"], "{} ")).splitlines()
    assert "| backward ours / jax.nn cudnn |" in both[0]
    assert {line.count("|") for line in both} == {5 + 4 + 4 + 1 + 1}
    assert [number(x) for x in (None, 1234.5, 99.96, 0.01234)] == ["", "1234", "100", "0.0123"]


def test_plots_leave_out_what_did_not_run(report, tmp_path):
    names = ["tflops_forward.png", "tflops_backward.png", "ratio.png"]
    assert [path.name for path in write_plots(report, tmp_path)] == names
    assert has_colour(tmp_path / names[0], "C2")  # Pallas, one point
    assert not has_colour(tmp_path / names[1], "C2")
    assert has_colour(tmp_path / names[2], "C0")
    for key in [key for key in report.measured if key[2] == report.baseline]:
        del report.measured[key]
    assert [path.name for path in write_plots(report, tmp_path)] == names[:2]


class Clock:
    """A time that passes only in calls: ten milliseconds each, and one second in call 40."""

    def __init__(self):
        self.now, self.calls, self.waits = 0.0, 0, []

    def call(self):
        self.calls += 1
        self.now += 1.0 if self.calls == 40 else 0.01

    def wait(self, result):
        self.waits.append(self.calls)


def test_timing(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(jax, "block_until_ready", clock.wait)
    found = benchmark.timed(clock.call, ())
    assert found.seconds == pytest.approx(0.01)  # the median does not see the slow call
    assert clock.calls >= 40
    rounds = np.diff(clock.waits[-6:])
    assert list(rounds) == [5] * 5  # five rounds of 50 ms, one wait each
    assert (clock.waits[-6] - 1) * 0.01 >= 0.15 - 1e-9  # warm-up, after the call that compiles


def test_timing_of_a_real_call():
    slept = benchmark.timed(lambda: time.sleep(0.02), ())
    assert 0.02 <= slept.seconds < 0.2
    assert slept.sm_clock_mhz is None


def test_backward_is_a_difference():
    forward, both = Measured(1e-3, 1900), Measured(3.5e-3, 1800)
    assert benchmark.difference(both, forward) == Measured(pytest.approx(2.5e-3), 1800)
    with pytest.raises(ValueError, match="too noisy"):
        benchmark.difference(forward, both)


@pytest.mark.parametrize(
    ("passes", "timed"),
    [(["forward"], 1), (["both"], 1), (["backward"], 2), (["forward", "backward", "both"], 2)],
)
def test_passes_and_complaints(monkeypatch, passes, timed):
    """A variant that fails in its gradient keeps its forward, and says why the rest is missing."""
    times = {"forward": 1.0, "both": 4.0}
    monkeypatch.setattr(benchmark, "program", lambda attention, which, causal: which)
    monkeypatch.setattr(benchmark, "timed", lambda which, arrays: Measured(times[which], None))
    complaints, advanced = [], []

    def measure():
        return benchmark.measure(
            lambda: None, FULL, (), passes,
            lambda *a: complaints.append(a), lambda: advanced.append(1),
        )  # fmt: skip

    found = measure()
    assert {which: x.seconds for which, x in found.items()} == {
        which: {**times, "backward": 3.0}[which] for which in passes
    }
    assert len(advanced) == timed
    assert complaints == []
    del times["both"]
    assert set(measure()) == set(passes) & {"forward"}
    assert [which for which, _ in complaints] == ([] if passes == ["forward"] else ["both"])


def test_programs_compute_what_they_say():
    row = Shape(8, 1, 16, 2, 1, True)
    q, k, v, do = inputs = _benchmark_variants.inputs(row, "float32")
    assert all(0.8 < float(jnp.std(x)) < 1.2 for x in inputs)
    mine, theirs = _benchmark_variants.variants(["auto"], ["xla"])
    for attention in (mine | theirs).values():
        out, *grads = benchmark.program(attention, "both", True)(*inputs)
        wanted, pullback = jax.vjp(
            lambda *a: jax.nn.dot_product_attention(*a, is_causal=True), q, k, v
        )
        forward = benchmark.program(attention, "forward", True)(*inputs)
        pairs = zip((forward, out, *grads), (wanted, wanted, *pullback(do)), strict=True)
        for ours, exact in pairs:
            np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)


def test_chained_calls(monkeypatch, tmp_path):
    """Each takes the outputs of the one before, and the time that is reported is one's."""
    q, k, v, _ = _benchmark_variants.inputs(Shape(8, 1, 16, 2, 1, True), "float32")
    (attention,) = _benchmark_variants.variants(["auto"], [])[0].values()
    q2 = attention(q, k, v, True)
    chain = _benchmark_variants.chained(attention, 2)
    np.testing.assert_array_equal(chain(q, k, v, True), attention(q2, k, v, True))
    assert not np.allclose(q2, chain(q, k, v, True))

    monkeypatch.setattr(benchmark, "timed", lambda function, arrays: Measured(0.6, None))
    row = ["--shapes", "8,1,16,2,1,yes", "--passes", "forward", "--output", str(tmp_path)]
    for calls in (1, 3):
        assert benchmark.main([*row, "--chain", str(calls)]) == 0
        times = [float(x["milliseconds"]) for x in read(tmp_path / "results.csv")]
        assert times == [pytest.approx(600 / calls)] * len(times)
        assert times
    with pytest.raises(SystemExit):
        benchmark.parse(["--chain", "0"])


def test_features_are_what_they_are_called():
    row = Shape(8, 2, 16, 2, 1, True)
    q, k, v, _ = _benchmark_variants.inputs(row, "float32")
    results = {
        name: attention(q, k, v, True) for name, attention in _benchmark_variants.features().items()
    }
    plain = results.pop("plain")
    np.testing.assert_array_equal(plain, _benchmark_variants.ours("auto")(q, k, v, True))
    for name, result in results.items():
        if name in ("traced scale", "deterministic"):
            np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            assert not np.allclose(result, plain, atol=1e-4), name


def test_features_take_no_other_variants(capsys):
    for other in (["--ours", "xla"], ["--against"]):
        with pytest.raises(SystemExit):
            benchmark.parse(["--features", *other])
        assert "leave out --ours and --against" in capsys.readouterr().err
    assert benchmark.parse(["--features"]).features


@pytest.mark.slow
def test_features_on_a_cpu():
    done = command("--features", "--shapes", "16,1,64,2,1,no", "--passes", "forward")
    assert done.returncode == 0, done.stderr
    header, _, row = done.stdout.split("\n\n")[-1].splitlines()[-3:]
    assert "ALiBi / plain" in header
    assert "plain / plain" not in header
    assert len(row.split()) == 5 + 9 + 8  # the shape, speeds, and what they are of plain


def test_default_shapes_are_all_different():
    rows = benchmark.default_shapes(on_gpu=True, quick=False)
    assert len(set(rows)) == len(rows) == 24
    quick = benchmark.default_shapes(on_gpu=True, quick=True)
    assert {row.head_dim for row in quick} == {64, 128, 256}
    assert {row.length for row in benchmark.default_shapes(on_gpu=False, quick=True)} == {128}


def test_shapes_from_the_command_line():
    assert benchmark.shape("128,4,4096,16,16,no") == FULL
    assert benchmark.shape("128,4,4096,16,16,Yes") == CAUSAL
    for text in ("128,4,4096,16,no", "128,4,0,16,16,no", "128,4,8,16,3,no", "1,1,1,1,1,maybe"):
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
            benchmark.shape(text)


def test_peers_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.gpu.attention", None)
    _, theirs = _benchmark_variants.variants(["auto"], ["xla", "pallas"])
    assert list(theirs) == ["jax.nn xla"]
    assert capsys.readouterr().out.startswith("pallas is left out: ")


def test_clock_from_nvidia_smi(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def answers(line):
        program.write_text(f'#!/bin/sh\n[ "$3" = --id=3 ] && {line}\n')
        program.chmod(0o755)
        return _benchmark_machine.megahertz(_benchmark_machine.query("clocks.sm"))

    assert answers("echo 1755 MHz") == 1755
    assert answers("echo '[N/A]'") is None
    assert answers("exit 9") is None
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert _benchmark_machine.query("clocks.sm") is None
