"""Which probabilities dropout drops: a function of the seeds, the query row and the key alone.

Philox2x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, who
find that it passes BigCrush), keyed for each batch entry and head. Rows and keys are counted in
blocks of 16 x 32; the counter names the eight scores (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8)
and the same 16 keys further on, which one thread of a GPU holds. Each gets 16 bits: a byte of the
64 that is its own, and below it one that all eight share. So every score is dropped with exactly
the rate; and because what is shared decides only where a score's own byte equals the rate's, two
of the eight are correlated by less than 2^-18 / (rate (1 - rate)).
"""

from __future__ import annotations

import jax.numpy as jnp

from jax_flashattn._options import DROPOUT_STEPS, Options

ROUNDS = 7
MULTIPLIER, KEY_STEP = 0xD256D193, 0x9E3779B9
SHARE = 0x9E3779B9  # odd: its multiples are uniform


def keep(seeds, row, key, options: Options):
    """0 where dropped, 1 / (1 - rate) elsewhere, float32.

    Args:
      seeds: uint32 [..., 2].
      row, key: int32, positions; with seeds[..., 0] they broadcast.
    """
    bits = random_bits(seeds, jnp.asarray(row, jnp.uint32), jnp.asarray(key, jnp.uint32))
    kept = 1 / (1 - options.dropout_steps / DROPOUT_STEPS)
    return jnp.where(bits >= options.dropout_steps, jnp.float32(kept), 0)


def random_bits(seeds, row, key):
    """16 uniform bits for each score, as uint32."""
    first, second = philox2x32(
        row // 16 * 8 + row % 8, (key // 32 * 8 + key % 8) ^ seeds[..., 1], seeds[..., 0]
    )
    word = jnp.where(key % 32 < 16, first, second)
    own = word >> (row // 8 % 2 * 8 + key // 8 % 2 * 16) & 0xFF
    shared = (first * jnp.uint32(SHARE) + second) >> 24
    return own << 8 | shared


def philox2x32(first, second, key, rounds: int = ROUNDS):
    for _ in range(rounds):
        high, low = multiply_wide(MULTIPLIER, first)
        first, second = high ^ key ^ second, low
        key = key + jnp.uint32(KEY_STEP)
    return first, second


def multiply_wide(a: int, x):
    """The high and the low half of a 32 x 32 bit product."""
    x_low, x_high = x & 0xFFFF, x >> 16
    a_low, a_high = jnp.uint32(a & 0xFFFF), jnp.uint32(a >> 16)
    low = a_low * x_low
    middle = a_high * x_low + (low >> 16)
    carry = a_low * x_high + (middle & 0xFFFF)
    return a_high * x_high + (middle >> 16) + (carry >> 16), jnp.uint32(a) * x
