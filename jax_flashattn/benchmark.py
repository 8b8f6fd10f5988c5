"""`python -m jax_flashattn.benchmark`: how fast attention is here, beside what jax comes with.

Times each kernel family of this package, jax.nn.dot_product_attention by XLA and by cuDNN, and
jax's Pallas kernel, on N(0, 1) data. Every program first runs for at least 150 ms; its time is the
median of five rounds, each of them many calls behind one block_until_ready. "forward" is one jitted
call; "both" is one jitted vjp that returns the output and the gradients of query, key and value;
"backward" is the difference of these two times. A variant that cannot run a row says why, once, and
leaves its cell empty. Without a GPU it compares the reference with jax.nn on small shapes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jax_flashattn import _options
from jax_flashattn._benchmark_machine import environment, megahertz, query
from jax_flashattn._benchmark_report import (
    PASSES,
    Measured,
    Report,
    Shape,
    aligned,
    cells,
    markdown,
    write_csv,
    write_plots,
)
from jax_flashattn._benchmark_variants import (
    Attention,
    chained,
    families,
    features,
    inputs,
    variants,
)

WARM_UP_SECONDS = 0.15
ROUNDS, ROUND_SECONDS = 5, 0.05
BURST_SECONDS = 0.02  # calls between two looks at the clock during the warm-up
CLOCK_SECONDS = 2.0  # how long a warm-up waits for nvidia-smi at most

# head dim: its (batch, length, heads, key heads), each of them full and causal.
DENSE = {
    64: [(16, 1024, 32, 32), (4, 4096, 32, 32), (1, 16384, 32, 32)],
    128: [(32, 512, 16, 4), (16, 1024, 16, 16), (8, 2048, 16, 4), (4, 4096, 16, 16),
          (2, 8192, 16, 4), (1, 16384, 16, 16)],
    256: [(16, 1024, 8, 8), (4, 4096, 8, 8), (1, 16384, 8, 8)],
}  # fmt: skip
SMALL = {32: [(2, 128, 4, 2), (1, 256, 4, 2)]}
FEATURE_ROWS = (128, 4096)  # head dim and length of the rows where options are timed
QUICK_LENGTHS = (4096, 128)  # the rows of these lengths, on a GPU and elsewhere


def default_shapes(*, on_gpu: bool, quick: bool) -> list[Shape]:
    """The rows that run unless others are asked for."""
    table = DENSE if on_gpu else SMALL
    rows = [Shape(d, *row, causal) for d in table for row in table[d] for causal in (False, True)]
    return [row for row in rows if not quick or row.length in QUICK_LENGTHS]


def shape(text: str) -> Shape:
    """Parses "d,b,s,h,hk,causal", where causal is yes or no."""
    *numbers, causal = text.split(",")
    spelled = {"yes": True, "1": True, "true": True, "no": False, "0": False, "false": False}
    if len(numbers) != 5 or not all(x.isdigit() and int(x) for x in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not d,b,s,h,hk (positive) and causal")
    if causal.lower() not in spelled:
        raise argparse.ArgumentTypeError(f"{text!r}: causal is yes or no, not {causal!r}")
    made = Shape(*map(int, numbers), causal=spelled[causal.lower()])
    if made.heads % made.kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: {made.kv_heads} does not divide {made.heads}")
    return made


def count(text: str) -> int:
    """Parses a positive number."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def program(attention: Attention, which: str, causal: bool) -> Callable:
    """What is timed for "forward" or "both": jitted, of (query, key, value, cotangent)."""

    def forward(q, k, v):
        return attention(q, k, v, causal)

    def both(q, k, v, do):
        out, pullback = jax.vjp(forward, q, k, v)
        return out, *pullback(do)  # with out: a forward that nobody reads might be skipped

    return jax.jit(both) if which == "both" else jax.jit(lambda q, k, v, do: forward(q, k, v))


def run(function: Callable, arrays, calls: int) -> float:
    """Seconds of that many calls behind one block_until_ready."""
    start = time.perf_counter()
    for _ in range(calls):
        result = function(*arrays)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def timed(function: Callable, arrays) -> Measured:
    """One call: compiled, warmed up while nvidia-smi reads the clock, then timed."""
    run(function, arrays, 1)
    clock, calls, total, spent = query("clocks.sm"), 1, 0, 0.0
    while spent < WARM_UP_SECONDS or (
        clock is not None and clock.poll() is None and spent < CLOCK_SECONDS
    ):
        spent += run(function, arrays, calls)
        total += calls
        calls = min(2 * calls, math.ceil(BURST_SECONDS * total / spent))
    calls = math.ceil(ROUND_SECONDS * total / spent)
    rounds = [run(function, arrays, calls) / calls for _ in range(ROUNDS)]
    return Measured(statistics.median(rounds), megahertz(clock))


def difference(both: Measured, forward: Measured) -> Measured:
    """The backward alone."""
    if both.seconds <= forward.seconds:
        raise ValueError("forward and backward took no longer than the forward: too noisy to tell")
    clocks = [x.sm_clock_mhz for x in (both, forward) if x.sm_clock_mhz is not None]
    return Measured(both.seconds - forward.seconds, min(clocks, default=None))


def measure(attention: Attention, row: Shape, arrays, passes, complain, advance):
    """{pass: Measured} of one variant in one row; complain(pass, error) says what does not run."""
    found: dict[str, Measured] = {}
    for which in programs(passes):
        try:
            found[which] = timed(program(attention, which, row.causal), arrays)
        except Exception as error:  # whatever a peer raises: its cell stays empty
            complain(which, error)
        advance()
    if "backward" in passes and len(found) == 2:
        try:
            found["backward"] = difference(found["both"], found["forward"])
        except ValueError as error:
            complain("backward", error)
    return {which: found[which] for which in passes if which in found}


def programs(passes) -> list[str]:
    """What must be timed for these passes."""
    return ["forward", "both"] if "backward" in passes else [x for x in PASSES if x in passes]


def parse(arguments) -> argparse.Namespace:
    """The command line; its defaults are those of the machine."""
    on_gpu = jax.default_backend() == "gpu"
    peers, dtypes = ["xla", "cudnn", "pallas"], ["bfloat16", "float16", "float32"]
    implementations = ["auto", *filter(None, _options.IMPLEMENTATIONS)]
    parser = argparse.ArgumentParser(
        prog="python -m jax_flashattn.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", type=shape, nargs="+", metavar="d,b,s,h,hk,causal", help="these rows")
    add("--head-dims", type=int, nargs="+", metavar="D", help="only the rows of these")
    add("--dtype", choices=dtypes, default="bfloat16" if on_gpu else "float32")
    add("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    text = "attention's implementation, auto is None (default: each compiled kernel family)"
    against = peers if on_gpu else ["xla"]
    add("--ours", nargs="+", choices=implementations, default=families(), help=text)
    add("--against", nargs="*", choices=peers, default=against)
    text = "instead of --ours and --against: what each option leaves of plain attention's speed"
    add("--features", action="store_true", help=text)
    text = "so many calls in each program, for those too short to be called from Python one by one"
    add("--chain", type=count, default=1, metavar="CALLS", help=text)
    add("--quick", action="store_true", help="a few rows only")
    add("--markdown", action="store_true", help="also print one table for a README")
    add("--output", type=Path, metavar="DIR", help="write results.csv, environment.json and plots")
    options = parser.parse_args(arguments)
    if options.features and (options.ours != families() or options.against != against):
        parser.error("--features times attention's own choice only: leave out --ours and --against")
    table = default_shapes(on_gpu=on_gpu, quick=options.quick)
    if options.features and on_gpu and not options.head_dims:
        table = [row for row in table if (row.head_dim, row.length) == FEATURE_ROWS]
    rows = options.shapes or table
    options.shapes = [x for x in rows if x.head_dim in (options.head_dims or [x.head_dim])]
    if not options.shapes:
        parser.error(f"no row has one of the head dims {options.head_dims}")
    options.passes = [x for x in PASSES if x in options.passes]
    return options


def needed(module: str):
    """Imports what only the benchmark needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"{error}. The benchmark needs it: pip install 'jax_flashattn[benchmark]'")


def main(arguments=None) -> int:
    """Runs the command line; 1 where no variant ran any row."""
    options = parse(arguments)
    tqdm = needed("tqdm").tqdm
    machine = environment()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    if options.features:
        mine = features()
        others = {"plain": mine.pop("plain")}
    else:
        mine, others = variants(options.ours, options.against)
    baseline = "jax.nn cudnn" if "jax.nn cudnn" in others else next(iter(others), "")
    report = Report(
        list(mine), list(others), baseline, options.passes, options.dtype, machine["device"]
    )
    if options.output:
        needed("matplotlib.figure")
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "environment.json").write_text(json.dumps(machine, indent=2) + "\n")

    said = set()
    total = len(options.shapes) * len(mine | others) * len(programs(options.passes))
    with tqdm(total=total, desc="timing", unit="program") as bar:
        for row in options.shapes:
            arrays = inputs(row, options.dtype)
            for name, attention in (mine | others).items():
                bar.set_postfix_str(f"{name}, {row}")

                def complain(which, error, name=name, row=row):
                    text = (str(error) or repr(error)).strip().splitlines()[0][:300]
                    kind = (name, re.sub(r"\d+", "", text))  # sizes aside, the same reason
                    if kind not in said:
                        said.add(kind)
                        bar.write(f"{name} cannot run {which} of {row}: {text}")

                chain = chained(attention, options.chain)
                found = measure(chain, row, arrays, options.passes, complain, bar.update)
                for which, result in found.items():
                    of_one = result._replace(seconds=result.seconds / options.chain)
                    report.measured[row, which, name] = of_one
            if options.output:  # after each row: a run that is cut short leaves what it has
                write_csv(report, options.output / "results.csv")

    for which in options.passes:
        print(f"\n{which}, TFLOP/s, {options.dtype}\n{aligned(cells(report, [which]))}")
    if options.chain > 1:
        print(
            f"\nof one of {options.chain} calls, each with the outputs of the last as its queries"
        )
    if "backward" in options.passes:
        print("\nbackward: the time of both, measured as its own program, less the forward's")
    if options.markdown:
        print(f"\n{markdown(cells(report, options.passes, '{} '))}")
    if options.output:
        for path in [options.output / "results.csv", *write_plots(report, options.output)]:
            print(f"wrote {path}")
    return 0 if report.measured else 1


if __name__ == "__main__":
    sys.exit(main())
