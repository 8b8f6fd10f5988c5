"""Attention over a sequence whose score matrix would not fit: the memory it takes, and a check."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import attention, explain

on_gpu = jax.default_backend() == "gpu"
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--length", type=int, default=262144 if on_gpu else 16384)
length = parser.parse_args().length
heads, head_dim = (16, 128) if on_gpu else (2, 32)
dtype = jnp.bfloat16 if on_gpu else jnp.float32

shape = (1, length, heads, head_dim)
query, key, value = (
    jax.random.normal(k, shape, dtype) for k in jax.random.split(jax.random.key(0), 3)
)
print(explain(query, key, value, is_causal=True))


def megabytes(count):
    return f"{count / 1e6:,.0f} MB"


forward = jax.jit(lambda q, k, v: attention(q, k, v, is_causal=True))
compiled = forward.lower(query, key, value).compile()
memory = compiled.memory_analysis()
scores = heads * length * length * query.dtype.itemsize
print(f"{length} tokens, {heads} heads of {head_dim}, {query.dtype}")
print(f"query, key, value:  {megabytes(memory.argument_size_in_bytes)}")
print(f"output:             {megabytes(memory.output_size_in_bytes)}")
print(f"temporary memory:   {megabytes(memory.temp_size_in_bytes)}")
print(f"the score matrix:   {megabytes(scores)}, if anything held it")
if not on_gpu:  # XLA's attention holds it; for a GPU it would not even compile at this length
    plain = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    plain_memory = plain.lower(query, key, value).compile().memory_analysis()  # never run
    print(f"temporary in jax.nn: {megabytes(plain_memory.temp_size_in_bytes)}")

out = compiled(query, key, value)

# A few rows computed directly, in float64; the last one reads every key.
for row in (0, length // 2, length - 1):
    q, k, v = (np.asarray(x[0, :, 0], np.float64) for x in (query, key[:, : row + 1], value))
    s = k @ q[row] / np.sqrt(head_dim)
    p = np.exp(s - s.max())
    exact = p @ v[: row + 1] / p.sum()
    error = np.linalg.norm(np.asarray(out[0, row, 0], np.float64) - exact) / np.linalg.norm(exact)
    print(f"row {row}: relative error {error:.1e}")
    assert error < (1e-2 if on_gpu else 1e-4)
