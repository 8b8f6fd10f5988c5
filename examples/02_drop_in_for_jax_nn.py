"""The same call as `jax.nn.dot_product_attention`: equal values and gradients, one difference."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import attention

shape = (2, 96, 4, 32)  # [B, T, N, H]
keys = jax.random.split(jax.random.key(0), 5)
query, key, value, d_out = (jax.random.normal(k, shape) for k in keys[:4])
bias = jax.random.normal(keys[4], (1, 4, 96, 96))
mask = jnp.arange(96) < jnp.array([96, 70]).reshape(2, 1, 1, 1)  # [B, 1, 1, S]: padded keys

calls = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (16, 0)},
    "bias and mask": {"bias": bias, "mask": mask, "scale": 0.2},
    "lengths": {
        "query_seq_lengths": jnp.array([96, 50], jnp.int32),
        "key_value_seq_lengths": jnp.array([96, 50], jnp.int32),
    },
}


def value_and_gradients(function, options):
    def weighted(query, key, value):
        out = function(query, key, value, **options)
        return jnp.vdot(out, d_out), out

    gradients, out = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


# Single precision on both sides; a GPU would otherwise round jax.nn's products to TF32.
with jax.default_matmul_precision("highest"):
    for name, options in calls.items():
        ours = value_and_gradients(attention, options)
        theirs = value_and_gradients(jax.nn.dot_product_attention, options)
        difference = max(float(jnp.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
        print(f"{name:14s} largest difference in out, dq, dk, dv: {difference:.1e}")
        assert difference < 1e-4

# The difference: a row that may see no key. jax.nn gives it the mean of all values, attention
# gives 0 (and a log-sum-exp of -inf), so that nothing of a masked sequence leaks into a result.
nothing = jnp.zeros((2, 1, 1, 96), bool)
print("masked row here: ", np.asarray(attention(query, key, value, mask=nothing))[0, 0, 0, :3])
theirs = jax.nn.dot_product_attention(query, key, value, mask=nothing)
print("masked row in jax.nn:", np.asarray(theirs)[0, 0, 0, :3])
assert not attention(query, key, value, mask=nothing).any()
