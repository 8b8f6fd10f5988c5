"""Sequences of many lengths without padding: varlen_attention, one program for all lengths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import attention, varlen_attention

heads, kv_heads, head_dim = 8, 2, 64
dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
tokens = 1024  # room for all sequences together

keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (tokens, heads, head_dim), dtype)
key = jax.random.normal(keys[1], (tokens, kv_heads, head_dim), dtype)
value = jax.random.normal(keys[2], (tokens, kv_heads, head_dim), dtype)


@jax.jit
def attend(query, key, value, bounds):
    print("compiling")  # while tracing only: once, whatever the lengths
    return varlen_attention(query, key, value, bounds, bounds, is_causal=True, return_lse=True)


for lengths in ([300, 1, 700], [10, 20, 30], [0, 1024, 0]):
    # Sequence n is tokens bounds[n] to bounds[n + 1]. What lies behind the last one gives zeros.
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    out, lse = attend(query, key, value, bounds)
    largest = 0.0
    for begin, end in itertools.pairwise(bounds):
        if begin < end:
            piece = [x[begin:end] for x in (query, key, value)]
            alone = attention(*piece, is_causal=True)
            difference = jnp.abs(out[begin:end].astype(jnp.float32) - alone.astype(jnp.float32))
            largest = max(largest, float(difference.max()))
    rest = float(jnp.abs(out[bounds[-1] :]).sum())
    print(f"lengths {lengths}: each as alone within {largest:.1e}; behind them {rest}")
    assert largest < (0.02 if dtype == jnp.bfloat16 else 1e-5)
    assert rest == 0

# Decoding: one query for each sequence, against the keys that it has so far.
q_bounds = np.arange(4, dtype=np.int32)
k_bounds = np.array([0, 300, 301, 1001], np.int32)
out = varlen_attention(
    query[:3], key, value, q_bounds, k_bounds, is_causal=True, causal_alignment="bottom_right"
)
print("decoded", out.shape, out.dtype)


# Gradients are packed as the arrays are.
def loss(query):
    bounds = np.array([0, 300, 301, 1001], np.int32)
    out = varlen_attention(query, key, value, bounds, bounds, is_causal=True)
    return jnp.sum(out.astype(jnp.float32) ** 2)


print("gradient", jax.grad(loss)(query).shape)
