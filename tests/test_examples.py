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
    tested = {"01_quickstart.py", "02_drop_in_for_jax_nn.py", *TRAINING, "training.py"}
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
    assert "the compiled training step calls jax_flashattn_fwd_v1" in output
    assert "the compiled training step calls jax_flashattn_bwd_v1" in output
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

    with pytest.raises(AssertionError, match="jax_flashattn_fwd_v1 is not in the compiled step"):
        training.train(training.OURS, build, 1, "bfloat16")
