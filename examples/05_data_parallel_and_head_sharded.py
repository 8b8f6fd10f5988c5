"""Trains a small attention layer with its batch over one mesh axis and its heads over another.

On every GPU there is, or on eight CPU devices that jax makes up. Each device attends to its own
sequences and heads: jit inserts no all-gather for attention, in neither direction.
"""

import os
import re
from collections import Counter

# Read when jax starts its CPU backend; it changes nothing on GPUs.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jax_flashattn import attention

count = jax.device_count()
sizes = (count // 2, 2) if count % 2 == 0 else (count, 1)
mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
print("mesh:", dict(mesh.shape), "of", jax.devices()[0].device_kind)

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 16, 64, 4, 2, 16
BATCH, LENGTH, STEPS = max(4, 16 // sizes[0]) * sizes[0], 32, 30
on_gpu = jax.default_backend() == "gpu"
dtype, tolerance = (jnp.bfloat16, 0.1) if on_gpu else (jnp.float32, 1e-3)

layout = {  # the shape of each weight, and which of its axes the mesh divides
    "embed": ((VOCABULARY, WIDTH), P()),
    "position": ((LENGTH, WIDTH), P()),
    "q": ((WIDTH, HEADS, HEAD_DIM), P(None, "model")),
    "k": ((WIDTH, KV_HEADS, HEAD_DIM), P(None, "model")),
    "v": ((WIDTH, KV_HEADS, HEAD_DIM), P(None, "model")),
    "out": ((HEADS, HEAD_DIM, WIDTH), P("model")),
    "readout": ((WIDTH, VOCABULARY), P()),
}
keys = jax.random.split(jax.random.key(0), len(layout))
weights = {n: 0.2 * jax.random.normal(k, layout[n][0]) for n, k in zip(layout, keys, strict=True)}
# At every position the answer is the sequence's first token: only attention can bring it there.
tokens = jax.random.randint(jax.random.key(1), (STEPS, BATCH, LENGTH), 0, VOCABULARY)
optimizer = optax.adam(1e-2)


def loss_of(weights, tokens):
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    x = weights["embed"][tokens] + weights["position"]
    q, k, v = (jnp.einsum("btw,wnh->btnh", x, weights[name]) for name in "qkv")
    x = x + jnp.einsum("btnh,nhw->btw", attention(q, k, v, is_causal=True), weights["out"])
    logits = (x @ weights["readout"]).astype(jnp.float32)
    answers = jnp.broadcast_to(tokens[:, :1], tokens.shape)
    return optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()


@jax.jit
def step(weights, moments, tokens):
    loss, gradients = jax.value_and_grad(loss_of)(weights, tokens)
    updates, moments = optimizer.update(gradients, moments, weights)
    return optax.apply_updates(weights, updates), moments, loss


def train(weights_sharding, tokens_sharding):
    """The loss of each step, and the compiled step."""
    placed = jax.device_put(weights, weights_sharding)
    state, losses = (placed, optimizer.init(placed)), []
    compiled = step.lower(*state, jax.device_put(tokens[0], tokens_sharding)).compile()
    for batch in tokens:
        *state, loss = compiled(*state, jax.device_put(batch, tokens_sharding))
        losses.append(float(loss))
    return losses, compiled


one = SingleDeviceSharding(jax.devices()[0])
alone, _ = train(one, one)
specs = {name: NamedSharding(mesh, spec) for name, (_, spec) in layout.items()}
losses, compiled = train(specs, NamedSharding(mesh, P("data")))

hlo = str(compiled.as_text())
kinds = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
found = Counter(re.findall(rf" ({kinds})(?:-start)?\(", hlo))
print("collectives of the compiled step:", dict(found))
if on_gpu:
    print("the kernels in it:", set(re.findall(r"jax_flashattn_\w+_v2", hlo)))
assert not found.keys() - {"all-reduce"}, "something was gathered; gradients need all-reduce only"

for where, curve in {"sharded": losses, "on one device": alone}.items():
    print(f"loss, {where}: {curve[0]:.4f} -> {curve[-1]:.4f}")
difference = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
print(f"largest difference: {difference:.1e}")
assert difference < tolerance
