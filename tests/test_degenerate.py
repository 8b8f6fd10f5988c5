"""Degenerate but legal calls: empty axes, lengths of zero and out of range, rows without keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import some_cases
from compare import expected, run

from jax_flashattn import attention

H = 16


@pytest.mark.parametrize(
    ("batch", "q_len", "k_len", "heads"),
    [(0, 5, 8, 2), (2, 0, 8, 2), (2, 5, 0, 2), (0, 0, 0, 2), (2, 0, 0, 2), (1, 1, 1, 1)],
)
@pytest.mark.parametrize("general", [False, True], ids=["plain", "bias-mask"])
def test_empty_axes(batch, q_len, k_len, heads, general):
    """Empty results, or 0 and -inf where there are rows but no keys; gradients 0."""
    some = {
        "query": jnp.ones((batch, q_len, heads, H)),
        "key": jnp.ones((batch, k_len, heads, H)),
        "value": jnp.ones((batch, k_len, heads, H)),
    }
    if general:
        some["bias"] = jnp.zeros((1, heads, q_len, k_len))
    extra = {"mask": jnp.ones((batch, 1, q_len, k_len), bool)} if general else {}

    def call(some):
        return attention(**some, **extra, return_lse=True, is_causal=True)

    (out, lse), pullback = jax.vjp(call, some)
    assert out.shape == some["query"].shape
    assert lse.shape == (batch, heads, q_len)
    assert k_len or not out.any()
    assert k_len or not lse.size or np.isneginf(lse).all()
    gradients = pullback((out, lse * 0 + 1 if k_len else jnp.ones_like(lse)))[0]
    for name, x in some.items():
        assert gradients[name].shape == x.shape
        assert k_len or not gradients[name].any()


def test_rows_above_the_diagonal_see_nothing():
    """Bottom-right causal with T > S: the first T - S rows are empty."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 8, 1, H), np.float32)
    key = rng.standard_normal((1, 5, 1, H), np.float32)
    out, lse = attention(
        query, key, key, is_causal=True, causal_alignment="bottom_right", return_lse=True
    )
    assert not out[:, :3].any()
    assert np.isneginf(lse[..., :3]).all()
    assert np.isfinite(lse[..., 3:]).all()
    np.testing.assert_array_equal(out[0, 3], key[0, 0])


@some_cases("lengths-all-zero")
def test_lengths_of_zero_leave_nothing(case):
    """Not even where cotangents of out and lse are not zero."""
    results = run(case, "float32")
    lse = results.pop("lse")
    assert np.isneginf(lse).all()
    assert not any(np.asarray(x).any() for x in results.values())


@some_cases("lengths-clamp")
def test_lengths_out_of_range_are_clamped(case):
    """The oracle clamps them to [0, T] and [0, S]: at least one row is empty and one is full."""
    lse = np.asarray(run(case, "float32", gradients=False)["lse"])
    empty = np.isneginf(expected(case, "float32")["lse"])
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert empty.any()
    assert not empty.all()


def test_a_mask_of_nothing():
    query = jnp.ones((1, 3, 2, H))
    mask = jnp.zeros((1, 1, 3, 3), bool)
    out, lse = attention(query, query, query, None, mask, return_lse=True)
    gradient = jax.grad(lambda q: attention(q, q, q, None, mask, return_lse=True)[0].sum())(query)
    assert not out.any()
    assert np.isneginf(lse).all()
    assert not gradient.any()
