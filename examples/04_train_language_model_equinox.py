"""The language model of example 03 in Equinox: layers of one sequence, batched by vmap.

It takes a minute or two on two CPU cores, and writes the loss curve to loss_equinox.png. With
--compare it trains again with Equinox's own attention, from the same weights on the same text.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from training import HEADS, LAYERS, LEARNING_RATE, LENGTH, OURS, WIDTH, main

from jax_flashattn.equinox import MultiheadAttention


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: MultiheadAttention | eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    widen: eqx.nn.Linear
    narrow: eqx.nn.Linear

    def __init__(self, ours, key):
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        # The same key draws the same weights in both.
        if ours:
            self.attention = MultiheadAttention(HEADS, WIDTH, is_causal=True, key=keys[0])
        else:
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.widen = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
        self.narrow = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])

    def __call__(self, x, mask):  # [T, WIDTH]
        y = jax.vmap(self.norm1)(x)
        x = x + self.attention(y, y, y, mask=mask)
        return x + jax.vmap(lambda y: self.narrow(jax.nn.gelu(self.widen(self.norm2(y)))))(x)


class LanguageModel(eqx.Module):
    embed: eqx.nn.Embedding
    position: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, ours, key):
        keys = jax.random.split(key, LAYERS + 3)
        self.embed = eqx.nn.Embedding(256, WIDTH, key=keys[0])
        self.position = 0.02 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.head = eqx.nn.Linear(WIDTH, 256, key=keys[2])
        self.blocks = [Block(ours, key) for key in keys[3:]]
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, text, mask):  # [T] -> logits [T, 256]
        x = jax.vmap(self.embed)(text) + self.position
        for block in self.blocks:
            x = block(x, mask)
        return jax.vmap(lambda y: self.head(self.norm(y)))(x).astype(jnp.float32)


def build(attention, dtype):
    ours = attention == OURS
    # Equinox's own layer has no causal option: it takes a mask.
    mask = None if ours else jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    arrays, static = eqx.partition(LanguageModel(ours, jax.random.key(0)), eqx.is_array)
    optimizer = optax.adamw(LEARNING_RATE)

    def loss_of(arrays, text):
        # Weights stay in float32 for the optimizer; the model computes in dtype.
        model = eqx.combine(jax.tree.map(lambda w: w.astype(dtype), arrays), static)
        logits = jax.vmap(lambda text: model(text, mask))(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    def step(state, text):
        arrays, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(arrays, text)
        updates, moments = optimizer.update(gradients, moments, arrays)
        return (optax.apply_updates(arrays, updates), moments), loss

    return (arrays, optimizer.init(arrays)), step


if __name__ == "__main__":
    main(build, "Equinox language model", "equinox", "loss_equinox.png")
