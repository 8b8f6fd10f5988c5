"""Trains on documents of many lengths, packed into full rows by segment ids, and padded one a row.

Both see the same documents in each step and have the same loss; the packed rows hold less padding,
and take less time for each byte of text. The documents are functions of Python's standard library.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from training import stdlib_text

from jax_flashattn import attention

on_gpu = jax.default_backend() == "gpu"
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=100 if on_gpu else 20)
parser.add_argument("--length", type=int, default=2048 if on_gpu else 256, help="of a row")
parser.add_argument("--documents", type=int, default=512 if on_gpu else 24, help="in a step")
options = parser.parse_args()
LENGTH, HEADS, WIDTH = options.length, 4, 256 if on_gpu else 64
DTYPE = jnp.bfloat16 if on_gpu else jnp.float32


def rows_of(documents, packed):
    """int32 [3, LENGTH] rows: bytes, number of the document (0: padding), position within it."""
    rows, number, filled = [], 0, LENGTH
    for document in documents:
        if not packed or filled + len(document) > LENGTH:
            rows.append(np.zeros((3, LENGTH), np.int32))
            filled, number = 0, 0
        number += 1
        place = slice(filled, filled + len(document))
        rows[-1][:, place] = document, np.full(len(document), number), np.arange(len(document))
        filled += len(document)
    return rows


def init(key):
    shapes = {"embed": (256, WIDTH), "position": (LENGTH, WIDTH), "qkv": (WIDTH, 3 * WIDTH)}
    shapes |= {"out": (WIDTH, WIDTH), "widen": (WIDTH, 4 * WIDTH), "narrow": (4 * WIDTH, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) * 0.5 * shape[0] ** -0.5
        for (name, shape), k in zip(shapes.items(), keys)
    }


def loss_of(weights, text, document, position):
    w = jax.tree.map(lambda x: x.astype(DTYPE), weights)
    x = w["embed"][text] + w["position"][position]
    q, k, v = jnp.split((x @ w["qkv"]).reshape(*text.shape, 3 * HEADS, -1), 3, axis=2)
    # A row sees the keys of its own document. Padding keys get a number that no query has.
    keys = jnp.where(document == 0, -1, document)
    y = attention(q, k, v, is_causal=True, query_segment_ids=document, key_value_segment_ids=keys)
    x = x + y.reshape(x.shape) @ w["out"]
    x = x + jax.nn.gelu(x @ w["widen"]) @ w["narrow"]
    logits = (x @ w["embed"].T).astype(jnp.float32)[:, :-1]
    # The next byte, where that belongs to the same document.
    counts = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] > 0)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), text[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(nll, where=counts) / jnp.sum(counts)


optimizer = optax.adam(3e-3)


@jax.jit
def step(state, rows):
    weights, moments = state
    loss, gradient = jax.value_and_grad(loss_of)(weights, *rows)
    updates, moments = optimizer.update(gradient, moments)
    return (optax.apply_updates(weights, updates), moments), loss


source = stdlib_text().tobytes()
starts = [b"\ndef " + piece for piece in source.split(b"\ndef ")[1:]]
documents = [np.frombuffer(d, np.uint8) for d in starts if 16 <= len(d) <= LENGTH // 2]
rng = np.random.default_rng(0)
batches = [
    [documents[i] for i in rng.integers(len(documents), size=options.documents)]
    for _ in range(options.steps)
]
text_bytes = sum(len(d) for batch in batches for d in batch)

curves = {}
for name, packed in (("padded", False), ("packed", True)):
    lists = [rows_of(batch, packed) for batch in batches]
    most = max(map(len, lists))  # every step has the shapes of the fullest
    padding = np.zeros((3, LENGTH), np.int32)
    data = [np.stack(rows + [padding] * (most - len(rows)), axis=1) for rows in lists]
    data = jax.device_put(data)
    weights = init(jax.random.key(0))
    state = weights, optimizer.init(weights)
    jax.block_until_ready(step(state, data[0]))  # compiles
    losses, start = [], time.perf_counter()
    for rows in data:
        state, loss = step(state, rows)
        losses.append(loss)
    curves[name] = np.array(jax.block_until_ready(losses))
    seconds = time.perf_counter() - start
    full = text_bytes / (len(data) * data[0][0].size)
    print(f"{name}: {most} rows of {LENGTH} a step, {full:.0%} of them text")
    print(f"  loss {curves[name][0]:.4f} -> {curves[name][-1]:.4f} nats per byte")
    print(f"  {1e9 * seconds / text_bytes:.0f} ns per byte of text")

difference = np.abs(curves["packed"] - curves["padded"]).max()
print(f"largest difference between the losses: {difference:.1e}")
assert difference < (0.05 if on_gpu else 1e-3)  # bfloat16 rounds; one wrong mask gave 0.02 on a CPU
