"""Random calls (draws.py) judged by compare.py; the seed alone says what is called.

    python tests/fuzz.py --seed 17 --way emulator              one call again
    python tests/fuzz.py --seed 0 --count 1000 --way gpu       many

Ways: "reference" (the package on the CPU), "emulator" (the CUDA kernels on a CPU), "gpu".
Exit status 1: some calls failed; 2: after a failure, a call known to be right failed as well.
"""

import argparse
import concurrent.futures
import os
import sys
import traceback

import jax
import numpy as np
from cases import CASES
from compare import GRADIENT_FACTOR, expected, judge_all, run, traceable
from draws import Call, draw
from emulator import kernels
from test_emulator import judge_bias_along_keys

WAYS = ("reference", "emulator", "gpu")


def judge_call(case, dtype, actual):
    """Judges what was returned for a case; AssertionError says what is wrong."""
    reference = expected(case, dtype)
    low = expected(case, dtype, precision=dtype)
    one_per_row = case.bias is not None and (not case.bias or case.bias[-1] == 1)
    if one_per_row and "bias" in actual:
        actual = dict(actual)
        judge_bias_along_keys(np.asarray(actual.pop("bias")), reference, case, dtype)
    # Dropout leaves few terms, and the largest error of `low` is then that of a small sample. Over
    # one key it has none: there the unfused gradient of the softmax is exactly 0, the fused is not.
    factor = GRADIENT_FACTOR + ("dropout_rate" in case.options) + (case.k_len == 1)
    judge_all(actual, reference, low, case.arrays(dtype), factor)


def check(seed, way, family="auto", made=None):
    """Judges the call of a seed; AssertionError with the line that does it again.

    It is run here, unless its results were made before.
    """
    call = draw(seed)
    dtype = "float32" if way == "reference" and seed % 3 == 0 else call.dtype
    try:
        judge_call(call.case, dtype, made or results(call, dtype, way, seed, family))
    except Exception as error:
        again = f"python tests/fuzz.py --seed {seed} --way {way}"
        again += f" --family {family}" if family != "auto" else ""
        raise AssertionError(f"{again}\n{dtype} {call}\n{type(error).__name__}: {error}") from error


def check_some(seeds, way, family="auto"):
    """What check() raises for these seeds, whose calls are one program on a GPU.

    Compiling is most of the time, and takes less for one program than for many. If that program
    raises, each call is made alone, to see which one it was.
    """
    made, found = [None] * len(seeds), []
    if way == "gpu" and len(seeds) > 1:
        try:
            made = together(map(draw, seeds), family)
        except Exception:
            found = [AssertionError(f"seeds {seeds} in one program: {traceback.format_exc()}")]
    for seed, results_of_seed in zip(seeds, made, strict=True):
        try:
            check(seed, way, family, results_of_seed)
        except AssertionError as error:
            found.append(error)
    return found


def together(calls, family="auto"):
    """Results of calls on a GPU that are compiled as one program."""
    parts = [
        traceable(call.case, call.dtype, deterministic=call.deterministic,
                  implementation=implementation(family))
        for call in calls
    ]  # fmt: skip
    functions, primals = zip(*parts, strict=True)
    return jax.jit(lambda primals: [f(x) for f, x in zip(functions, primals, strict=True)])(primals)


def implementation(family):
    return "cuda" if family == "auto" else f"cuda:{family}"


def results(call, dtype, way, seed=0, family="auto"):
    """out, lse and the gradients of a call; the emulator's family is the seed's, if not given."""
    case, deterministic = call.case, call.deterministic
    if way == "emulator":
        family = ("sm80", "sm90")[seed % 2] if family == "auto" else family
        return kernels.run(case, dtype, deterministic=deterministic, seed=seed, family=family)
    if way == "gpu":
        return run(case, dtype, deterministic=deterministic, implementation=implementation(family))
    with jax.default_device(jax.devices("cpu")[0]):
        return run(case, dtype, deterministic=deterministic, implementation="xla")


def canary(way):
    """Runs and judges a call that is known to be right: does the device still work?"""
    call = Call(CASES["dense-64x64"], "bfloat16", True)
    judge_call(call.case, call.dtype, results(call, call.dtype, way))


def fuzz(seeds, way, threads=1, show=print, family="auto", each=1):
    """Checks seeds, `each` in one program, shows failures; the exit status is the docstring's."""
    status = 0
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    some = [seeds[n : n + each] for n in range(0, len(seeds), each)]
    checks = [pool.submit(check_some, few, way, family) for few in some]
    for done in concurrent.futures.as_completed(checks):
        if not done.result():
            continue
        status = 1
        for failure in done.result():
            show(f"FAILED {failure}")
        try:
            canary(way)
        except Exception:
            show(f"The canary failed too, no more calls are made:\n{traceback.format_exc()}")
            status = 2
            break
    pool.shutdown(cancel_futures=True)
    return status


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds from there")
    parser.add_argument("--way", choices=WAYS, default="reference")
    parser.add_argument("--family", default="auto", help="of kernels: auto, sm80 or sm90")
    parser.add_argument("--threads", type=int, help="calls at once, all cores by default on a GPU")
    parser.add_argument("--each", type=int, default=1, help="calls in one program, on a GPU")
    given = parser.parse_args(arguments)
    threads = given.threads or (os.cpu_count() if given.way == "gpu" else 1)
    seeds = range(given.seed, given.seed + given.count)
    status = fuzz(seeds, given.way, threads, family=given.family, each=given.each)
    if status == 0:
        print(f"{given.count} calls through {given.way}: all right")
    return status


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main())
