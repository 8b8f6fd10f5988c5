"""Every example runs, as a user starts it, and does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAINING = {
    "03_train_language_model_flax.py": "jax.nn",
    "04_train_language_model_equinox.py": "equinox",
}

SHARDED = "05_data_parallel_and_head_sharded.py"


def run(name, *arguments, platform="cpu"):
    """What the example prints, run in a process of its own."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": platform,
        "XLA_FLAGS": "",  # not the eight CPU devices of conftest.py
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # the package that is tested here
    }
    process = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout + process.stderr


def colour_count(image, colour):
    return (np.abs(image[..., :3] - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.1).sum()


def first_and_last(output, attention):
    losses = re.search(rf"^{re.escape(attention)}: loss ([\d.]+) -> ([\d.]+) nats", output, re.M)
    return float(losses[1]), float(losses[2])


def test_all_examples_are_here():
    tested = {"01_quickstart.py", "02_drop_in_for_jax_nn.py", *TRAINING, "training.py", SHARDED,
              "06_long_context.py", "07_rematerialise.py", "08_pack_documents.py",
              "09_variable_lengths.py"}  # fmt: skip
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart():
    output = run("01_quickstart.py")
    assert "out (2, 256, 8, 64) bfloat16\n" in output
    assert "largest value in the padding: 0.0\n" in output
    assert "lse (2, 8, 256) float32\n" in output
    assert output.count("(2, 256, 2, 64), 'bfloat16'") == 2  # dk, dv


def test_drop_in():
    output = run("02_drop_in_for_jax_nn.py")
    differences = [float(x) for x in re.findall(r"largest difference.*: (\S+)", output)]
    assert len(differences) == 5
    assert max(differences) < 1e-4
    assert re.search(r"masked row here: +\[0\. 0\. 0\.\]", output)
    assert not re.search(r"masked row in jax.nn: +\[0\. 0\. 0\.\]", output)


def sharded_run(output):
    """Largest difference of the losses, after checking that they fell."""
    for where in ("sharded", "on one device"):
        first, last = re.search(rf"loss, {where}: +(\S+) -> (\S+)", output).groups()
        assert float(last) < float(first) / 10
    return float(re.search(r"largest difference: (\S+)", output)[1])


@pytest.mark.slow
def test_sharded_training():
    output = run(SHARDED)
    assert "mesh: {'data': 4, 'model': 2} of cpu\n" in output
    assert re.search(r"collectives of the compiled step: \{'all-reduce': \d+\}\n", output)
    assert sharded_run(output) < 1e-4


@pytest.mark.slow
def test_sharded_training_notices_a_gather(tmp_path):
    """Positive control: the example fails where attention's query is gathered over the mesh."""
    text = (EXAMPLES / SHARDED).read_text()
    gathered = "attention(jax.lax.with_sharding_constraint(q, NamedSharding(mesh, P())), k"
    mutant = re.sub(r"(BATCH, LENGTH, STEPS = .*), \d+\n", r"\1, 1\n", text)
    mutant = mutant.replace("attention(q, k", gathered).replace("train(one, one)", "([], None)")
    assert mutant.count(gathered) == 1
    (tmp_path / "mutant.py").write_text(mutant)
    with pytest.raises(AssertionError, match="something was gathered"):
        run(tmp_path / "mutant.py")


@pytest.mark.slow
def test_long_context():
    output = run("06_long_context.py")
    sizes = re.findall(r"^(.+): +([\d,]+) MB", output, re.M)
    megabytes = {name: int(size.replace(",", "")) for name, size in sizes}
    assert megabytes["the score matrix"] == 2 * 16384**2 * 4 // 10**6
    assert megabytes["temporary memory"] < megabytes["the score matrix"] / 4
    # What the bound would catch: XLA's own attention holds the scores.
    assert megabytes["temporary in jax.nn"] > megabytes["the score matrix"] / 4
    assert output.count("relative error") == 3


def test_rematerialise():
    output = run("07_rematerialise.py")
    runs = dict(re.findall(r"^(.+ saved): .* attention's forward runs (\d) times", output, re.M))
    assert runs == {"everything saved": "2", "nothing saved": "4", "out and lse saved": "2"}
    counts = [int(x) for x in re.findall(r"saved: (\d+) arrays", output)]
    assert counts[0] > counts[2] > counts[1]
    saved = output.partition("saved with the policy:")[2]
    for name in ("flash_attention_out", "flash_attention_lse"):
        assert saved.count(f"named '{name}'") == 2  # one in each layer
    differences = [float(x) for x in re.findall(r"difference of a gradient (\S+)", output)]
    assert len(differences) == 2
    assert max(differences) < 1e-6


def packed_run(output):
    """Nanoseconds for each byte, padded and packed, after checking that both losses fell alike."""
    runs = dict(re.findall(r"^(padded|packed): \d+ rows .* (\d+)% of them text", output, re.M))
    assert int(runs["packed"]) > 1.5 * int(runs["padded"])
    losses = re.findall(r"loss (\S+) -> (\S+) nats", output)
    assert len(losses) == 2
    assert all(float(last) < float(first) - 1 for first, last in losses)
    assert "largest difference between the losses" in output
    return [int(x) for x in re.findall(r"(\d+) ns per byte", output)]


@pytest.mark.slow
def test_packed_documents():
    assert len(packed_run(run("08_pack_documents.py", "--steps", 12))) == 2


@pytest.mark.slow
def test_packed_documents_notice_a_leak(tmp_path):
    """Positive control: without segment ids the losses differ."""
    text = (EXAMPLES / "08_pack_documents.py").read_text()
    ids = "query_segment_ids=document, key_value_segment_ids=keys"
    assert text.count(ids) == 1
    (tmp_path / "mutant.py").write_text(text.replace(ids, ""))
    (tmp_path / "training.py").write_text((EXAMPLES / "training.py").read_text())
    with pytest.raises(AssertionError, match="assert difference"):
        run(tmp_path / "mutant.py", "--steps", 12)


def test_variable_lengths():
    output = run("09_variable_lengths.py")
    assert output.count("compiling\n") == 1
    differences = [float(x) for x in re.findall(r"each as alone within (\S+);", output)]
    assert len(differences) == 3
    assert max(differences) < 1e-5
    assert output.count("behind them 0.0\n") == 3
    assert "decoded (3, 8, 64)" in output
    assert "gradient (1024, 8, 64)" in output


@pytest.mark.gpu
def test_packing_on_the_gpu():
    padded, packed = packed_run(run("08_pack_documents.py", platform="cuda"))
    assert packed < padded
    assert run("09_variable_lengths.py", platform="cuda").count("compiling\n") == 1


@pytest.mark.gpu
def test_sharding_memory_and_rematerialisation_on_the_gpu():
    output = run(SHARDED, platform="cuda")
    assert "'jax_flashattn_bwd_v2'" in output
    sharded_run(output)
    output = run("06_long_context.py", platform="cuda")
    assert output.startswith("cuda:")
    assert output.count("relative error") == 3
    run("07_rematerialise.py", platform="cuda")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "theirs"), TRAINING.items())
def test_training(tmp_path, name, theirs):
    png = tmp_path / "loss.png"
    output = run(name, "--steps", 20, "--compare", "--output", png)
    for attention in ("jax_flashattn", theirs):
        first, last = first_and_last(output, attention)
        assert 5 < first < 7
        assert last < first - 2
    assert "largest difference between the curves" in output
    assert re.search(r"20/20.*loss=\d", output)  # the progress bar
    image = matplotlib.image.imread(png)
    assert image.shape == (600, 960, 4)
    assert colour_count(image, "tab:blue") > 500
    assert colour_count(image, "tab:orange") > 100


@pytest.mark.slow
@pytest.mark.parametrize(("name", "theirs"), TRAINING.items())
def test_training_in_bfloat16_with_one_attention(tmp_path, name, theirs):
    png = tmp_path / "loss.png"
    arguments = ("--steps", 10, "--dtype", "bfloat16", "--attention", theirs, "--output", png)
    output = run(name, *arguments)
    assert first_and_last(output, theirs)[1] < 4.5
    assert "jax_flashattn" not in output
    image = matplotlib.image.imread(png)
    assert colour_count(image, "tab:blue") > 500
    assert colour_count(image, "tab:orange") == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "theirs"), TRAINING.items())
def test_training_on_the_gpu(tmp_path, name, theirs):
    output = run(
        name, "--steps", 50, "--compare", "--output", tmp_path / "loss.png", platform="cuda"
    )
    assert "the compiled training step calls jax_flashattn_fwd_v2" in output
    assert "the compiled training step calls jax_flashattn_bwd_v2" in output
    first, last = first_and_last(output, "jax_flashattn")
    assert last < first - 2.5


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "training", raising=False)
    import training

    yield training
    del sys.modules["training"]


def test_text_is_the_standard_library(training):
    text = training.stdlib_text()
    assert len(text) > 1_000_000
    assert b"def dataclass(" in text.tobytes()
    window = training.windows(text, 3)
    assert window.shape == (training.BATCH, training.LENGTH + 1)
    assert (window == training.windows(text, 3)).all()
    assert (window != training.windows(text, 4)).any()
    for row in np.asarray(window, np.uint8):
        assert row.tobytes() in text.tobytes()


@pytest.mark.parametrize(("slope", "agrees"), [(1.0, True), (1.01, False)])
def test_the_comparison_can_fail(training, monkeypatch, tmp_path, slope, agrees):
    """A run whose loss is one percent off is told from one that agrees."""

    def build(attention, dtype):
        factor = 1.0 if attention == training.OURS else slope

        def step(state, text):
            return state + 1, factor * (6.0 - 0.1 * state) + 0 * jnp.sum(text)

        return jnp.float32(0), step

    output = tmp_path / "loss.png"
    command = ["example", "--compare", "--steps", "5", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    if agrees:
        training.main(build, "test", "other", "unused.png")
    else:
        with pytest.raises(AssertionError):
            training.main(build, "test", "other", "unused.png")
    assert output.exists()


def test_a_step_without_kernels_is_found_out(training, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def build(attention, dtype):
        return jnp.float32(0), lambda state, text: (state, jnp.mean(text, dtype=dtype))

    with pytest.raises(AssertionError, match="jax_flashattn_fwd_v2 is not in the compiled step"):
        training.train(training.OURS, build, 1, "bfloat16")
