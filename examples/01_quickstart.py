"""Attention, its gradients, its log-sum-exp, and what would run: on a GPU or on any CPU."""

import jax
import jax.numpy as jnp

from jax_flashattn import attention, explain

batch, queries, heads, head_dim = 2, 256, 8, 64
kv_heads = 2  # grouped queries: four query heads read each key and value head
keys = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(keys[0], (batch, queries, heads, head_dim), jnp.bfloat16)
key = jax.random.normal(keys[1], (batch, queries, kv_heads, head_dim), jnp.bfloat16)
value = jax.random.normal(keys[2], (batch, queries, kv_heads, head_dim), jnp.bfloat16)

print(explain(query, key, value, is_causal=True))

out = attention(query, key, value, is_causal=True)
print("out", out.shape, out.dtype)

# The second sequence has 100 tokens only; the rest of it is padding, and gives zeros.
lengths = jnp.array([256, 100], jnp.int32)
out = attention(
    query, key, value, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths
)
print("largest value in the padding:", float(jnp.abs(out[1, 100:]).max()))

# A row may look 32 keys back and none ahead; the log-sum-exp of its scores comes in float32.
out, lse = attention(query, key, value, local_window_size=(32, 0), return_lse=True)
print("lse", lse.shape, lse.dtype)


@jax.jit
def loss(query, key, value):
    return jnp.sum(attention(query, key, value, is_causal=True).astype(jnp.float32) ** 2)


gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
print("gradients", [(g.shape, str(g.dtype)) for g in gradients])
