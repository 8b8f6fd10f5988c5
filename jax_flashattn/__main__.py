"""`python -m jax_flashattn`: what is installed here, does it compute right, how fast is it.

Runs attention and its gradient on this machine's default device, through whatever path `explain`
names, and compares with a direct evaluation in float64. Exits with status 1 on a mismatch.
"""

import os
import platform
import statistics
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

import jax_flashattn
from jax_flashattn import _ffi

# name: (dtype, batch, query length, key length, heads, key/value heads, head dim)
PROBLEMS = {
    "small": ("float16", 2, 70, 131, 4, 2, 40),
    "medium": ("bfloat16", 2, 1024, 1024, 8, 2, 128),
}
TIMED = {"gpu": ("bfloat16", 4, 4096, 4096, 16, 16, 128), "cpu": PROBLEMS["medium"]}


def inputs(dtype, batch, q_len, k_len, heads, kv_heads, head_dim):
    """query, key, value and the output's cotangent, N(0, 1) in dtype; key lengths [batch]."""
    random = np.random.default_rng(0)
    shapes = [(q_len, heads), (k_len, kv_heads), (k_len, kv_heads), (q_len, heads)]
    q, k, v, do = (
        jnp.asarray(random.standard_normal((batch, *shape, head_dim), np.float32), dtype)
        for shape in shapes
    )
    return q, k, v, do, jnp.asarray([k_len - 7 * b for b in range(batch)], jnp.int32)


def attention(q, k, v, lengths):
    return jax_flashattn.attention(q, k, v, is_causal=True, key_value_seq_lengths=lengths)


@jax.jit
def forward_and_backward(q, k, v, do, lengths):
    out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, lengths), q, k, v)
    return out, *vjp(do)


def direct(q, k, v, do, lengths):
    """The same four arrays in float64, one head at a time, every score in memory."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    i, j = np.ogrid[: q.shape[1], : k.shape[1]]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        head, kv_head = (b, slice(None), n), (b, slice(None), n // group)
        s = np.where((j <= i) & (j < lengths[b]), scale * q[head] @ k[kv_head].T, -np.inf)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        out[head] = p @ v[kv_head]
        delta = np.sum(do[head] * out[head], axis=1, keepdims=True)
        ds = p * (do[head] @ v[kv_head].T - delta)
        dq[head] = scale * ds @ k[kv_head]
        dk[kv_head] += scale * ds.T @ q[head]
        dv[kv_head] += p.T @ do[head]
    return out, dq, dk, dv


def check(problem) -> bool:
    """Compares the output and each gradient: at most one rounding of the dtype off, in norm.

    A norm and not the largest error: the first rows of a causal problem are so much larger than the
    last ones that a bound made for them would pass any nonsense there.
    """
    arrays = inputs(*problem)
    bound = float(jnp.finfo(problem[0]).eps)
    right = True
    results = zip(forward_and_backward(*arrays), direct(*arrays), strict=True)
    for name, (ours, exact) in zip(("out", "dq", "dk", "dv"), results, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact)
        fine = bool(error <= bound)  # false for NaN
        print(f"  {name:3}  relative error {error:.1e}, at most {bound:.1e}: "
              f"{'ok' if fine else 'WRONG'}")  # fmt: skip
        right = right and fine
    return right


def seconds(function, *arrays) -> float:
    """Of one call, median of three rounds; a round waits for the device once."""
    jax.block_until_ready(function(*arrays))
    calls = 20 if jax.default_backend() == "gpu" else 1
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arrays)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def describe() -> None:
    print(f"Python {platform.python_version()}, jax {version('jax')}, jaxlib {version('jaxlib')}")
    print(f"jax_flashattn {jax_flashattn.__version__}", end=", ")
    if _ffi.extension is None:
        print("built without CUDA kernels: the reference path runs everywhere")
    else:
        info = _ffi.extension.build_info()
        print(f"kernels built by CUDA {info['cuda']} for sm {info['architectures']}")
        families, head_dims = (", ".join(map(str, info[x])) for x in ("families", "head_dims"))
        print(f"kernel families: {families}; head dims: {head_dims}")
    print("devices:", ", ".join(f"{d.id}: {d.device_kind}" for d in jax.devices()))
    if jax.default_backend() == "cpu" and os.path.exists("/dev/nvidiactl"):
        print("There is an NVIDIA GPU that jax does not use: install jax_flashattn[cuda13].")


def main() -> int:
    describe()
    right = True
    for name, problem in PROBLEMS.items():
        dtype, batch, q_len, k_len, heads, kv_heads, head_dim = problem
        print(f"\n{name}: {dtype}, batch {batch}, {q_len} queries, {k_len} keys, {heads} heads on "
              f"{kv_heads}, head dim {head_dim}, causal, key lengths")  # fmt: skip
        q, k, v, _, lengths = inputs(*problem)
        print(" ", jax_flashattn.explain(q, k, v, is_causal=True, key_value_seq_lengths=lengths))
        right = check(problem) and right

    problem = TIMED.get(jax.default_backend(), TIMED["cpu"])
    dtype, batch, length, _, heads, _, head_dim = problem
    arrays = inputs(*problem)
    flop = 4 * batch * heads * head_dim * length * (length + 1) / 2  # causal: half the square
    print(f"\nspeed: {dtype}, batch {batch}, length {length}, {heads} heads, head dim {head_dim}")
    forward = jax.jit(lambda q, k, v, do, lengths: attention(q, k, v, lengths))
    for name, function, work in (
        ("forward", forward, flop),
        ("forward and backward", forward_and_backward, 3.5 * flop),
    ):
        taken = seconds(function, *arrays)
        print(f"  {name}: {1e3 * taken:.2f} ms, {work / taken / 1e9:,.0f} GFLOP/s")

    print("\nall right" if right else "\nWRONG RESULTS: see above")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
