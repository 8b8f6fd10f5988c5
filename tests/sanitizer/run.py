"""Builds the driver, runs it alone and under compute-sanitizer, and shows that each check can fail.

    python tests/sanitizer/run.py [--build DIR] [--head-dims 64,128] [--jobs N] [--minutes 5]

Exits with 0 only if everything passed: the kernels are clean, and each planted bug was noticed.
Needs an NVIDIA GPU, nvcc and compute-sanitizer of the CUDA toolkit; no package.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
PASSES = {
    "forward": "const Problem&, cudaStream_t",
    "backward": "const Problem&, const Gradients&, cudaStream_t",
}
TOOLS = {  # the tool: the bug planted for it, and what it says when it sees that
    "memcheck": ("oob_write", r"Invalid __global__ write"),
    "racecheck": ("race", r"(Error|Warning): Race reported"),
    "synccheck": ("bad_barrier", r"Barrier error detected"),
    "initcheck": ("uninitialised_read", r"Uninitialized __global__ memory read"),
}
OWN_CHECKS = {  # the driver's own: what is planted, and what it says
    "oob_write": r"guard band changed",
    "unwritten": r"was not written",
    "wrong_scale": r"expected .* \+- ",
}
OPTIONS = {
    "memcheck": ["--padding", "256", "--report-api-errors", "no"],  # the driver reads return codes
    "racecheck": ["--racecheck-report", "analysis"],
}
CLEAN = r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards"
FOUND = 99  # the exit status by which a tool says that it found something


@dataclasses.dataclass
class Done:
    """A command that has run: `status` is None where it ran out of time."""

    status: int | None
    text: str
    seconds: float


@dataclasses.dataclass
class Row:
    """A line of the table. `problem` is empty where all is well."""

    name: str
    problem: str
    seconds: float
    text: str = ""


class Runner:
    """Runs commands until a common deadline, each in a process group that ends with it."""

    def __init__(self, minutes):
        self.end = time.monotonic() + 60 * minutes

    def run(self, command, limit):
        start = time.monotonic()
        limit = max(1.0, min(limit, self.end - start))
        try:
            process = subprocess.Popen(
                [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Done(127, str(error), 0.0)
        try:
            text, status = process.communicate(timeout=limit)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, status = process.communicate()[0] + f"\nkilled after {limit:.0f} s", None
        return Done(status, text, time.monotonic() - start)


def find(name, given):
    """The path of a program of the CUDA toolkit, or an exit that says how to give it."""
    folders = [os.environ.get("PATH", "")]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            folders += [f"{home}/bin", f"{home}/compute-sanitizer"]
    path = shutil.which(given or name, path=os.pathsep.join(folders))
    if path is None:
        sys.exit(f"no {given or name}: set PATH or CUDA_HOME, or pass --{name}")
    return path


def compute_capability():
    """Of the first GPU, without its dot; that of an H200 where nobody can tell."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        text = ""
    found = re.match(r"(\d+)\.(\d+)", text.strip())
    return "".join(found.groups()) if found else "90"


def build(runner, pool, nvcc, folder, head_dims):
    """The driver's path (None where it does not compile) and rows for the table."""
    header = folder / "head_dims.h"  # nvcc would split -DJFA_HEAD_DIMS=64,96 at the comma
    header.write_text(f"#define JFA_HEAD_DIMS {', '.join(map(str, head_dims))}\n")
    sources = [HERE / "driver.cu", CSRC / "attention.cc"]
    template = (CSRC / "kernel.cu.in").read_text()
    for dim in sorted(head_dims, reverse=True):  # the slowest first
        for which in ("backward", "forward"):
            values = {
                "FAMILY": "sm80", "PASS": which, "HEAD_DIM": dim, "ARGUMENTS": PASSES[which],
            }  # fmt: skip
            text = re.sub(r"@JFA_(\w+)@", lambda found, v=values: str(v[found[1]]), template)
            sources.append(folder / f"sm80_{which}_{dim}.cu")
            sources[-1].write_text(text)
    arch = compute_capability()
    code = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    flags = ["-std=c++17", "-O2", "-lineinfo", *code, "-include", header, "-I", CSRC]
    objects = [folder / f"{source.stem}.o" for source in sources]

    start = time.monotonic()
    commands = [[nvcc, *flags, "-c", s, "-o", o] for s, o in zip(sources, objects)]
    compiled = list(pool.map(lambda command: runner.run(command, 240), commands))
    failed = [done for done in compiled if done.status != 0]
    if not failed:
        linked = runner.run([nvcc, *code, *objects, "-o", folder / "driver"], 60)
        failed = [linked] if linked.status != 0 else []
    problem = f"{len(failed)} of {len(commands)} commands failed" if failed else ""
    text = failed[0].text if failed else ""
    row = Row(f"build, {len(commands)} objects", problem, time.monotonic() - start, text)
    return (None if failed else folder / "driver"), row


def passed(name, done, pattern=None):
    """A row for what must succeed, and say `pattern` where there is one."""
    problem = ""
    if done.status != 0:
        problem = "ran out of time" if done.status is None else f"exit status {done.status}"
    elif pattern and not re.search(pattern, done.text):
        problem = "no clean summary"
    return Row(name, problem, done.seconds, done.text)


def caught(name, done, pattern):
    """A row for what must fail, and say so."""
    problem = ""
    if done.status == 0:
        problem = "not noticed"
    elif not re.search(pattern, done.text):
        problem = f"failed otherwise (exit status {done.status})"
    return Row(name, problem, done.seconds, done.text)


def bare_jobs(runner, driver, head_dims):
    """The driver alone: every case, and the bugs that its own checks see."""
    for dim in head_dims:
        command = [driver, "--case", f"*-{dim}-*"]
        yield lambda d=dim, c=command: passed(f"driver, head dim {d}", runner.run(c, 120))
    dim = head_dims[0]
    for bug, pattern in OWN_CHECKS.items():
        command = [driver, "--small", "--case", f"plain-{dim}-f16", "--plant", bug]
        yield lambda b=bug, c=command, p=pattern: caught(f"planted {b}", runner.run(c, 60), p)


def tool_command(sanitizer, tool, driver, arguments):
    options = ["--tool", tool, "--error-exitcode", FOUND, "--print-limit", 20]
    return [sanitizer, *options, *OPTIONS.get(tool, []), driver, "--unguarded", *arguments]


def tool_jobs(runner, sanitizer, driver, head_dims, tools):
    """Each tool on each head dim: all cases in bfloat16 and the first in float16; then its bug."""
    for tool in tools:
        bug, pattern = TOOLS[tool]
        for dim in sorted(head_dims, reverse=True):
            globs = ["--small", "--case", f"*-{dim}-bf16", "--case", f"plain-{dim}-f16"]
            command = tool_command(sanitizer, tool, driver, globs)
            yield lambda t=tool, d=dim, c=command: passed(
                f"{t}, head dim {d}", runner.run(c, 200), CLEAN
            )
        command = tool_command(sanitizer, tool, driver, ["--plant", bug])
        yield lambda t=tool, b=bug, c=command, p=pattern: caught(
            f"{t}, planted {b}", runner.run(c, 90), p
        )


def probe_jobs(runner, sanitizer, driver):
    """The planted kernel without a bug, under each tool: does the tool work on this machine?"""
    for tool in TOOLS:
        command = tool_command(sanitizer, tool, driver, ["--plant", "none"])
        yield lambda t=tool, c=command: passed(f"{t}, nothing planted", runner.run(c, 90), CLEAN)


def show(rows, shown_lines=25):
    width = max(len(row.name) for row in rows)
    for row in rows:
        verdict = f"FAIL: {row.problem}" if row.problem else "PASS"
        print(f"{row.name:{width}}  {row.seconds:6.1f} s  {verdict}")
    for row in rows:
        if row.problem:
            print(f"\n---- {row.name}: {row.problem}")
            print("\n".join(row.text.strip().splitlines()[:shown_lines]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc")
    parser.add_argument("--compute-sanitizer")
    parser.add_argument("--build", type=pathlib.Path, help="keep the objects in this folder")
    parser.add_argument("--head-dims", default="64,96,128,192,256")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--gpu-jobs", type=int, default=8, help="processes on the GPU at a time")
    parser.add_argument("--minutes", type=float, default=5, help="for everything together")
    arguments = parser.parse_args()
    head_dims = sorted(int(dim) for dim in arguments.head_dims.split(","))
    nvcc = find("nvcc", arguments.nvcc)
    sanitizer = find("compute-sanitizer", arguments.compute_sanitizer)
    runner = Runner(arguments.minutes)
    start = time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.build or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            driver, row = build(runner, pool, nvcc, folder, head_dims)
        rows = [row]
        with concurrent.futures.ThreadPoolExecutor(arguments.gpu_jobs) as pool:

            def together(jobs):
                rows.extend(pool.map(lambda job: job(), jobs))

            if driver:
                together(bare_jobs(runner, driver, head_dims))
                together(probe_jobs(runner, sanitizer, driver))
                # What a tool that does not work here says of the kernels is nothing.
                tools = [t for t, row in zip(TOOLS, rows[-len(TOOLS) :]) if not row.problem]
                together(tool_jobs(runner, sanitizer, driver, head_dims, tools))
    show(rows)
    failed = sum(bool(row.problem) for row in rows)
    print(f"\n{len(rows)} steps, {failed} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
