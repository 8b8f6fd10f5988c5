"""jax.checkpoint that keeps attention's output and log-sum-exp, so that attention runs once.

Rematerialisation saves memory by computing activations again in the backward pass. Attention is the
dear part of that, and these two small arrays are all that its backward needs beside its inputs.
"""

import contextlib
import io

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import print_saved_residuals

from jax_flashattn import attention

jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would round float32 to TF32
on_gpu = jax.default_backend() == "gpu"
BATCH, LENGTH, WIDTH, HEADS, LAYERS = 2, 256, 64, 4, 2
key = jax.random.key(0)
shapes = {
    "qkv": (WIDTH, 3, HEADS, WIDTH // HEADS),
    "out": (HEADS, WIDTH // HEADS, WIDTH),
    "mlp": (WIDTH, WIDTH),
}
weights = [
    {name: jax.random.normal(jax.random.fold_in(key, i), shapes[name]) / 8 for name in shapes}
    for i in range(LAYERS)
]
x = jax.random.normal(key, (BATCH, LENGTH, WIDTH))


def layer(x, weights):
    qkv = jnp.einsum("btw,wcnh->cbtnh", x, weights["qkv"])
    x = x + jnp.einsum("btnh,nhw->btw", attention(*qkv, is_causal=True), weights["out"])
    return x + jnp.tanh(x @ weights["mlp"])


names = ("flash_attention_out", "flash_attention_lse")
policy = jax.checkpoint_policies.save_only_these_names(*names)
layers = {
    "everything saved": layer,
    "nothing saved": jax.checkpoint(layer),
    "out and lse saved": jax.checkpoint(layer, policy=policy),
}


def loss(layer):
    def of(weights, x):
        for one in weights:
            x = layer(x, one)
        return jnp.sum(x**2)

    return of


def saved(function):
    """One line for each array that waits for the backward pass, arguments left out."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print_saved_residuals(function, weights, x)
    return [line for line in text.getvalue().splitlines() if "from the argument" not in line]


gradients = {}
for name, chosen in layers.items():
    gradient = jax.grad(loss(chosen))
    residuals = saved(loss(chosen))
    runs = str(jax.make_jaxpr(gradient)(weights, x)).count("flash_attention_fwd[")
    print(f"{name}: {len(residuals)} arrays, attention's forward runs {runs} times")
    gradients[name] = jax.jit(gradient)(weights, x)
print("\nsaved with the policy:", *residuals, sep="\n  ")

wanted = gradients.pop("everything saved")
for name, found in gradients.items():
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    difference = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
    print(f"{name}: largest relative difference of a gradient {difference:.1e}")
    assert difference < (1e-3 if on_gpu else 1e-5)  # XLA may sum in another order
