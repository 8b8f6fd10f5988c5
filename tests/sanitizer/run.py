"""Builds the driver, runs it alone and under compute-sanitizer, and shows that each check can fail.

    python tests/sanitizer/run.py [--build DIR] [--head-dims 64,128] [--jobs N] [--minutes 5]
    python tests/sanitizer/run.py --soak SECONDS [--seed N]

Exits with 0 only if everything passed: the kernels are clean, and each planted bug was noticed.
Needs an NVIDIA GPU, nvcc and compute-sanitizer of the CUDA toolkit, on an H100 or H200 also cmake;
no package.
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
PASSES = {  # of a family, and their arguments; the slowest to compile first
    "sm80": {
        "backward": "const Problem&, const Gradients&, cudaStream_t",
        "bias": "const Problem&, const Gradients&, cudaStream_t",
        "forward": "const Problem&, cudaStream_t",
    },
    "sm90": {
        "backward": "const Problem&, const Gradients&, int, cudaStream_t",
        "bias": "const Problem&, const Gradients&, int, cudaStream_t",
        "forward": "const Problem&, uint32_t*, int, cudaStream_t",
    },
}
UNDER_TOOLS = {  # globs of the cases of one head dim
    "sm80": ["*-{}-bf16-sm80", "plain-{}-f16-sm80"],
    "sm90": [
        "tile_*-{}-bf16-sm90",
        "grad_*-{}-bf16-sm90",
        "odd_dim-{}-bf16-sm90",
        "one_*-{}-bf16-sm90",
        "plain-{}-f16-sm90",
    ],
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
SOAK_CHECKS = {  # the same of a soak
    "hang": r"no end after",
    "flip": r"lse of a second run differs",
    "flip_gradient": r"dv of a second run differs",
    "wrong_scale": r"(out|lse) is .* expected .* \+- ",
    "wrong_gradient": r"d[qk] is .* expected .* \+- ",
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


def wgmma_table(runner, cmake, folder):
    """Writes the header of sm90's kernels that is not in the repository."""
    script = folder / "wgmma_table.cmake"
    written = (folder / "wgmma_table.cuh").resolve().as_posix()
    included = (CSRC.parent / "cmake" / "wgmma.cmake").as_posix()
    script.write_text(f'include("{included}")\njfa_write_wgmma_table("{written}")\n')
    return runner.run([*cmake, "-P", script], 60)


def build(runner, pool, nvcc, cmake, folder, head_dims, families, arch):
    """The driver's path (None where it does not compile) and a row for the table."""
    header = folder / "head_dims.h"  # nvcc would split -DJFA_HEAD_DIMS=64,96 at the comma
    header.write_text(f"#define JFA_HEAD_DIMS {', '.join(map(str, head_dims))}\n")
    portable = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    code = {"sm80": portable, "sm90": ["-gencode", "arch=compute_90a,code=sm_90a"]}
    flags = ["-std=c++17", "-O2", "-lineinfo", "-include", header, "-I", CSRC, "-I", folder]
    if "sm90" in families:
        flags += ["-DJFA_SM90"]
    template = (CSRC / "kernel.cu.in").read_text()
    sources = []
    for dim in sorted(head_dims, reverse=True):  # the slowest first
        for family in families:
            for which, arguments in PASSES[family].items():
                values = {
                    "FAMILY": family, "PASS": which, "HEAD_DIM": dim, "ARGUMENTS": arguments,
                }  # fmt: skip
                text = re.sub(r"@JFA_(\w+)@", lambda found, v=values: str(v[found[1]]), template)
                source = folder / f"{family}_{which}_{dim}.cu"
                source.write_text(text)
                sources.append((source, code[family]))
    others = [HERE / "driver.cu", HERE / "soak.cu", CSRC / "attention.cc"]
    others += [CSRC / "sm90" / "tensor_map.cc"] if "sm90" in families else []
    sources += [(source, portable) for source in others]
    objects = [folder / f"{source.stem}.o" for source, _ in sources]

    start = time.monotonic()
    commands = [
        [nvcc, *flags, *code, "-c", source, "-o", object_]
        for (source, code), object_ in zip(sources, objects)
    ]
    failed = []
    if "sm90" in families:
        failed = [done for done in [wgmma_table(runner, cmake, folder)] if done.status != 0]
    if not failed:
        compiled = list(pool.map(lambda command: runner.run(command, 240), commands))
        failed = [done for done in compiled if done.status != 0]
    if not failed:
        link = [nvcc, *portable, *objects, "-Xcompiler", "-pthread", "-o", folder / "driver"]
        linked = runner.run(link, 60)
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


def bare_jobs(runner, driver, head_dims, families):
    """The driver alone: every case, and the bugs that its own checks see."""
    for family in reversed(families):
        for dim in sorted(head_dims, reverse=True):
            command = [driver, "--case", f"*-{dim}-*-{family}"]
            yield lambda f=family, d=dim, c=command: passed(
                f"driver, {f}, head dim {d}", runner.run(c, 120)
            )
    yield lambda: passed("driver, auto", runner.run([driver, "--case", "*-auto"], 60))
    for bug, pattern in OWN_CHECKS.items():
        command = [driver, "--small", "--case", f"plain-{head_dims[0]}-f16-sm80", "--plant", bug]
        yield lambda b=bug, c=command, p=pattern: caught(f"planted {b}", runner.run(c, 60), p)


def soak_rows(runner, driver, seconds, seed):
    """A soak whose text is shown, after short ones with something planted."""
    rows = []
    for bug, pattern in SOAK_CHECKS.items():
        command = [driver, "--plant", bug, "soak", 10, seed]
        rows.append(caught(f"soak, planted {bug}", runner.run(command, 60), pattern))
    done = runner.run([driver, "soak", seconds, seed], seconds + 120)
    print(done.text)
    return [*rows, passed("soak", done, r"soak, seed \d+: .*, 0 failed")]


def tool_command(sanitizer, tool, driver, arguments):
    options = ["--tool", tool, "--error-exitcode", FOUND, "--print-limit", 20]
    return [sanitizer, *options, *OPTIONS.get(tool, []), driver, "--unguarded", *arguments]


def tool_jobs(runner, sanitizer, driver, head_dims, families, tools):
    """Each tool on each family and head dim; then its bug."""
    for tool in tools:
        bug, pattern = TOOLS[tool]
        for dim in sorted(head_dims, reverse=True):
            for family in families:
                globs = [glob.format(dim) for glob in UNDER_TOOLS[family]]
                cases = [part for glob in globs for part in ("--case", glob)]
                command = tool_command(sanitizer, tool, driver, ["--small", *cases])
                yield lambda t=tool, f=family, d=dim, c=command: passed(
                    f"{t}, {f}, head dim {d}", runner.run(c, 150), CLEAN
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
    parser.add_argument("--cmake")
    parser.add_argument("--build", type=pathlib.Path, help="keep the objects in this folder")
    parser.add_argument("--head-dims", default="64,96,128,192,256")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--gpu-jobs", type=int, default=8, help="processes on the GPU at a time")
    parser.add_argument("--minutes", type=float, default=5, help="for all but the soak")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="only random calls")
    parser.add_argument("--seed", type=int, default=1, help="of the soak")
    arguments = parser.parse_args()
    head_dims = sorted(int(dim) for dim in arguments.head_dims.split(","))
    nvcc = find("nvcc", arguments.nvcc)
    sanitizer = None if arguments.soak else find("compute-sanitizer", arguments.compute_sanitizer)
    arch = compute_capability()
    families = ["sm80", "sm90"] if arch == "90" else ["sm80"]
    cmake = []
    if "sm90" in families:  # pip's cmake may be a module alone
        as_module = not arguments.cmake and not shutil.which("cmake")
        cmake = [sys.executable, "-m", "cmake"] if as_module else [find("cmake", arguments.cmake)]
    runner = Runner(arguments.minutes + (arguments.soak or 0) / 60)
    start = time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.build or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            driver, row = build(runner, pool, nvcc, cmake, folder, head_dims, families, arch)
        rows = [row]
        with concurrent.futures.ThreadPoolExecutor(arguments.gpu_jobs) as pool:

            def together(jobs):
                rows.extend(pool.map(lambda job: job(), jobs))

            if driver and arguments.soak:
                rows += soak_rows(runner, driver, arguments.soak, arguments.seed)
            elif driver:
                together(bare_jobs(runner, driver, head_dims, families))
                together(probe_jobs(runner, sanitizer, driver))
                # What a tool that does not work here says of the kernels is nothing.
                tools = [t for t, row in zip(TOOLS, rows[-len(TOOLS) :]) if not row.problem]
                together(tool_jobs(runner, sanitizer, driver, head_dims, families, tools))
    show(rows)
    failed = sum(bool(row.problem) for row in rows)
    print(f"\n{len(rows)} steps, {failed} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
