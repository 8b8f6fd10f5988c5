"""What the two training examples share: the text, the loop, the loss curve, the comparison.

A model comes as a function `build(attention, dtype)` that gives `(state, step)`: a pytree, and a
pure function `step(state, text) -> (state, loss)` of text [BATCH, LENGTH + 1].
"""

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import jax_flashattn

BATCH, LENGTH = 16, 128
LAYERS, WIDTH, HEADS = 2, 128, 4
LEARNING_RATE = 2e-3
OURS = "jax_flashattn"
# Two right attentions differ by rounding, which training amplifies: up to 6e-4 nats over 300 steps
# in float32, 5e-3 over 150 in bfloat16 (both on a CPU). Without causality it is 0.09 in 40 steps.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}


def stdlib_text() -> np.ndarray:
    """The sources of Python's standard library, uint8 [n]: real text that is always at hand."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def windows(text: np.ndarray, step: int) -> jax.Array:
    """int32 [BATCH, LENGTH + 1]: pieces of the text at random places, the same for a same step."""
    starts = np.random.default_rng(step).integers(0, len(text) - LENGTH, (BATCH, 1))
    return jnp.asarray(text[starts + np.arange(LENGTH + 1)], jnp.int32)


def train(attention: str, build: Callable, steps: int, dtype: str) -> np.ndarray:
    """The loss of each step [steps], in nats per byte."""
    text = stdlib_text()
    state, step = build(attention, jnp.dtype(dtype))
    program = jax.jit(step).lower(state, windows(text, 0)).compile()
    if attention == OURS and jax.default_backend() == "gpu" and dtype != "float32":
        for kernel in ("jax_flashattn_fwd_v2", "jax_flashattn_bwd_v2"):
            assert kernel in str(program.as_text()), f"{kernel} is not in the compiled step"
            print(f"the compiled training step calls {kernel}")
    losses, start = [], time.perf_counter()
    for i in (progress := tqdm(range(steps), desc=attention)):
        state, loss = program(state, windows(text, i))
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    seconds = time.perf_counter() - start
    last = np.mean(losses[-10:])
    print(f"{attention}: loss {losses[0]:.3f} -> {last:.3f} nats per byte (mean of the last ten),")
    print(f"  {steps} steps in {seconds:.1f} s, {steps * BATCH * LENGTH / seconds:.0f} bytes/s")
    return np.array(losses)


def plot(curves: dict[str, np.ndarray], title: str, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5))
    for i, (attention, losses) in enumerate(curves.items()):  # the second one thin, on the first
        steps = np.arange(1, len(losses) + 1)
        axes.plot(steps, losses, "--" if i else "-", linewidth=1 if i else 3, label=attention)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
    print(f"wrote {output}")


def main(build: Callable, title: str, theirs: str, output: str) -> None:
    """The command line; `theirs` names the framework's own attention."""
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path(output), help="the loss curve, a PNG")
    default = "bfloat16" if on_gpu else "float32"
    parser.add_argument("--dtype", choices=list(TOLERANCE), default=default)
    parser.add_argument("--attention", choices=[OURS, theirs], default=OURS)
    parser.add_argument("--compare", action="store_true", help="train with both, compare curves")
    options = parser.parse_args()
    plt.switch_backend("Agg")

    if options.compare or options.attention == OURS:
        heads = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, WIDTH // HEADS), options.dtype)
        print(jax_flashattn.explain(heads, heads, heads, is_causal=True))
    chosen = (OURS, theirs) if options.compare else (options.attention,)
    curves = {name: train(name, build, options.steps, options.dtype) for name in chosen}
    plot(curves, f"{title}, {options.dtype}, {jax.devices()[0].device_kind}", options.output)
    if options.compare:
        difference = np.abs(curves[OURS] - curves[theirs]).max()
        tolerance = TOLERANCE[options.dtype]
        print(f"largest difference between the curves: {difference:.2e} (tolerance {tolerance})")
        assert difference <= tolerance
