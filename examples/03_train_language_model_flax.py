"""Trains a small causal language model on real text, byte by byte, with Flax NNX.

It takes a minute or two on two CPU cores and writes the loss curve to loss_flax.png. With --compare
it trains again with jax.nn's attention, from the same weights on the same text.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from training import HEADS, LAYERS, LEARNING_RATE, LENGTH, OURS, WIDTH, main

from jax_flashattn.flax import attention_fn


class Block(nnx.Module):
    def __init__(self, dtype, attention, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, dtype=dtype, decode=False, attention_fn=attention, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.widen = nnx.Linear(WIDTH, 4 * WIDTH, dtype=dtype, rngs=rngs)
        self.narrow = nnx.Linear(4 * WIDTH, WIDTH, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x), is_causal=True)
        return x + self.narrow(jax.nn.gelu(self.widen(self.norm2(x))))


class LanguageModel(nnx.Module):
    def __init__(self, dtype, attention, rngs):
        self.embed = nnx.Embed(256, WIDTH, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.blocks = nnx.List([Block(dtype, attention, rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 256, dtype=dtype, rngs=rngs)

    def __call__(self, text):  # [B, T] -> logits [B, T, 256]
        x = self.embed(text)
        x = x + self.position[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).astype(jnp.float32)


def build(attention, dtype):
    # NNX's own attention function is jax.nn.dot_product_attention.
    function = attention_fn if attention == OURS else nnx.dot_product_attention
    model = LanguageModel(dtype, function, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(LEARNING_RATE), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def loss_of(model, text):
        logits = model(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    def step(state, text):
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(loss_of)(model, text)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    return state, step


if __name__ == "__main__":
    main(build, "Flax language model", "jax.nn", "loss_flax.png")
