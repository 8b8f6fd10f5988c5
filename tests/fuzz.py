"""Random calls of attention, judged by compare.py; the seed alone says what is called.

    python tests/fuzz.py --seed 17 --way emulator              one call again
    python tests/fuzz.py --seed 0 --count 1000 --way gpu       many

Ways: "reference" (the package on the CPU), "emulator" (the CUDA kernels on a CPU), "gpu".
Exit status 1: some calls failed; 2: after a failure, a call known to be right failed as well.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import sys
import traceback

import jax
import numpy as np
from cases import CASES, LENGTHS, Case
from compare import GRADIENT_FACTOR, expected, judge_all, run
from emulator import kernels
from test_emulator import judge_bias_along_keys

WAYS = ("reference", "emulator", "gpu")
SCORES_BY_DIM = 2**22  # at most this many batch x heads x T x S x head_dim: a fraction of a second
TILE_EDGES = (63, 64, 65, 127, 128, 129)


@dataclasses.dataclass(frozen=True)
class Call:
    """What one seed stands for."""

    case: Case
    dtype: str  # of the kernels; every third call of the reference is in float32
    deterministic: bool


def draw(seed):
    """The Call of a seed, the same for every way of running it."""
    rng = np.random.default_rng(seed)

    def chance(probability):
        return rng.random() < probability

    def pick(*values):
        return values[rng.integers(len(values))]

    def length():
        return int(pick(1, rng.integers(2, 40), pick(*TILE_EDGES), rng.integers(1, 220)))

    def dim():
        return 8 * int(rng.integers(1, pick(8, 16, 32) + 1))

    def side(limit):
        return pick(None, 0, int(rng.integers(0, 12)), int(rng.integers(0, limit + 1)))

    batch, kv_heads, group = pick(1, 2, 3), pick(1, 2, 3), pick(1, 1, 2, 3, 4)
    q_len, k_len = length(), length()
    k_len = q_len if chance(0.3) else k_len
    head_dim = dim()
    value_dim = dim() if chance(0.25) else None
    while batch * kv_heads * group * q_len * k_len * max(head_dim, value_dim or 0) > SCORES_BY_DIM:
        if group > 1:
            group -= 1
        elif kv_heads > 1:
            kv_heads -= 1
        elif batch > 1:
            batch -= 1
        else:
            q_len, k_len = q_len // 2, k_len // 2

    options = {}
    if chance(0.4):
        options["is_causal"] = True
    if chance(0.4):
        options["causal_alignment"] = "bottom_right"
    if chance(0.4):
        limit = max(q_len, k_len)
        options["local_window_size"] = pick(int(rng.integers(limit)), (side(limit), side(limit)))
    for name, extent in zip(LENGTHS, (q_len, k_len), strict=True):
        if chance(0.35):  # 0, the full extent, and outside of the range where it is clamped
            ends = (0, extent, extent + 3, -1)
            inside = [int(n) for n in rng.integers(0, extent + 1, batch)]
            options[name] = tuple(pick(*ends) if chance(0.3) else n for n in inside)

    def broadcast_shape():
        full = (batch, kv_heads * group, q_len, k_len)
        shape = tuple(extent if chance(0.6) else 1 for extent in full)
        return shape[rng.integers(0, 5) :] if chance(0.3) else shape

    bias = broadcast_shape() if chance(0.35) else None
    mask = broadcast_shape() if chance(0.25) else None
    bias_dtype = pick("float32", None)
    traced_scale = float(rng.normal()) * 0.3 if chance(0.15) else None
    if traced_scale is None and chance(0.2):
        options["scale"] = float(rng.uniform(0.01, 0.5))
    dtype, deterministic = pick("bfloat16", "float16"), chance(0.5)

    def by_head():
        return pick((kv_heads * group,), (batch, kv_heads * group)) if chance(0.25) else None

    alibi, sinks = by_head(), by_head()
    if chance(0.25):
        options["logits_soft_cap"] = float(rng.uniform(0.3, 5))
    if chance(0.25):
        options["dropout_rate"] = float(pick(0.1, 0.9, rng.uniform(0, 1)))
    options |= _visibility(rng, options, batch, q_len, k_len)
    case = Case(
        f"fuzz-{seed}", q_len, k_len, batch=batch, heads=kv_heads * group, kv_heads=kv_heads,
        head_dim=head_dim, value_dim=value_dim, bias=bias, bias_dtype=bias_dtype, mask=mask,
        traced_scale=traced_scale, alibi=alibi, sinks=sinks, options=options,
    )  # fmt: skip
    return Call(case, dtype, deterministic)


def _visibility(rng, options, batch, q_len, k_len):
    """Prefixes, spans, and either segment ids or sink tokens, with what each of them needs."""
    made = {}

    def positions(*shape):  # a few of them outside
        return rng.integers(-2, k_len + 3, shape)

    if rng.random() < 0.25:
        made |= {"is_causal": True, "prefix_lengths": tuple(positions(batch).tolist())}
    if rng.random() < 0.25:
        spans = positions(batch, rng.integers(1, 4), 2)
        spans = np.sort(spans, axis=-1) if rng.random() < 0.9 else spans
        spans = tuple(tuple(map(tuple, entry)) for entry in spans.tolist())
        made |= {"is_causal": True, "bidirectional_spans": spans}
    kind = rng.random()
    if kind < 0.25:
        left = int(rng.integers(0, 20))
        window = options.get("local_window_size", (left, None))
        window = window if isinstance(window, tuple) else (window, window)
        made["local_window_size"] = (left if window[0] is None else window[0], window[1])
        made["num_sink_tokens"] = int(rng.integers(1, rng.choice([6, k_len + 9])))
    elif kind < 0.5:
        count = int(rng.integers(1, 6))
        ids = [rng.integers(0, count, (batch, length)) for length in (q_len, k_len)]
        if rng.random() < 0.6:  # in runs
            ids = [np.sort(x, axis=1) for x in ids]
            if rng.random() < 0.5 and q_len == k_len:
                ids[1] = ids[0]
        for name, x in zip(("query_segment_ids", "key_value_segment_ids"), ids, strict=True):
            made[name] = tuple(map(tuple, x.tolist()))
    return made


def features(call):
    """What a call uses, as a set of names."""
    case, options = call.case, call.case.options
    window = options.get("local_window_size")
    left, right = window if isinstance(window, tuple) else (window, window)
    ids = options.get("query_segment_ids"), options.get("key_value_segment_ids")
    mixed = any((np.diff(x) < 0).any() for x in ids if x is not None)
    found = {
        call.dtype: True,
        "deterministic": call.deterministic,
        "causal": "is_causal" in options,
        "bottom_right": "causal_alignment" in options,
        "window on the left": left is not None,
        "window on the right": right is not None,
        "query lengths": LENGTHS[0] in options,
        "key lengths": LENGTHS[1] in options,
        "bias": case.bias is not None,
        "mask": case.mask is not None,
        "traced scale": case.traced_scale is not None,
        "static scale": "scale" in options,
        "cap": "logits_soft_cap" in options,
        "alibi": case.alibi is not None,
        "sinks": case.sinks is not None,
        "dropout": "dropout_rate" in options,
        "prefix": "prefix_lengths" in options,
        "spans": "bidirectional_spans" in options,
        "sink tokens": "num_sink_tokens" in options,
        "segments in runs": ids[0] is not None and not mixed,
        "segments, mixed": mixed,
        "grouped heads": case.heads > case.kv_heads,
        "value_dim": case.value_dim not in (None, case.head_dim),
        "more queries": case.q_len > case.k_len,
        "more keys": case.q_len < case.k_len,
        "several tiles of queries": case.q_len > 128,
        "several tiles of keys": case.k_len > 64,
    }
    return {name for name, is_used in found.items() if is_used}


def judge_call(case, dtype, actual):
    """Judges what was returned for a case; AssertionError says what is wrong."""
    reference = expected(case, dtype)
    low = expected(case, dtype, precision=dtype)
    one_per_row = case.bias is not None and (not case.bias or case.bias[-1] == 1)
    if one_per_row and dtype != "float32" and "bias" in actual:
        actual = dict(actual)
        judge_bias_along_keys(np.asarray(actual.pop("bias")), reference, case, dtype)
    # Dropout leaves few terms, and the largest error of `low` is then that of a small sample.
    factor = GRADIENT_FACTOR + ("dropout_rate" in case.options)
    judge_all(actual, reference, low, case.arrays(dtype), factor)


def check(seed, way, family="auto"):
    """Runs and judges the call of a seed; AssertionError with the line that does it again."""
    call = draw(seed)
    dtype = "float32" if way == "reference" and seed % 3 == 0 else call.dtype
    try:
        judge_call(call.case, dtype, results(call, dtype, way, seed, family))
    except Exception as error:
        again = f"python tests/fuzz.py --seed {seed} --way {way}"
        again += f" --family {family}" if family != "auto" else ""
        raise AssertionError(f"{again}\n{dtype} {call}\n{type(error).__name__}: {error}") from error


def results(call, dtype, way, seed=0, family="auto"):
    """out, lse and the gradients of a call; the emulator's family is the seed's, if not given."""
    case, deterministic = call.case, call.deterministic
    if way == "emulator":
        family = ("sm80", "sm90")[seed % 2] if family == "auto" else family
        return kernels.run(case, dtype, deterministic=deterministic, seed=seed, family=family)
    if way == "gpu":
        implementation = "cuda" if family == "auto" else f"cuda:{family}"
        return run(case, dtype, deterministic=deterministic, implementation=implementation)
    with jax.default_device(jax.devices("cpu")[0]):
        return run(case, dtype, deterministic=deterministic, implementation="xla")


def canary(way):
    """Runs and judges a call that is known to be right: does the device still work?"""
    call = Call(CASES["dense-64x64"], "bfloat16", True)
    judge_call(call.case, call.dtype, results(call, call.dtype, way))


def fuzz(seeds, way, threads=1, show=print, family="auto"):
    """Checks seeds, shows each failure; the exit status of the module's docstring."""
    status = 0
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    checks = [pool.submit(check, seed, way, family) for seed in seeds]
    for done in concurrent.futures.as_completed(checks):
        if done.exception() is None:
            continue
        status = 1
        show(f"FAILED {done.exception()}")
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
    given = parser.parse_args(arguments)
    threads = given.threads or (os.cpu_count() if given.way == "gpu" else 1)
    status = fuzz(
        range(given.seed, given.seed + given.count), given.way, threads, family=given.family
    )
    if status == 0:
        print(f"{given.count} calls through {given.way}: all right")
    return status


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main())
