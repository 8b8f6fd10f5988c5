"""Differentiation: the backward primitive as the custom VJP of the forward one."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_flashattn import _primitives, _reference
from jax_flashattn._options import Operands, Options


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which gradients beside dq, dk and dv the caller differentiates."""

    bias: bool
    scale: bool
    sinks: bool


class Saved(NamedTuple):
    """What the forward keeps for the backward."""

    operands: Operands
    out: Any
    lse: Any
    wanted: Wanted


@jax.custom_vjp
def flash_attention(operands: Operands, options: Options) -> tuple:
    """(out [B, T, N, Hv] in query's dtype, lse float32 [B, N, T])."""
    return _primitives.forward(operands, options)


def flash_attention_forward(operands: Operands, options: Options):
    if operands.alibi_slopes is not None and operands.alibi_slopes.perturbed:
        raise NotImplementedError(
            "alibi_slopes has no gradient; wrap it in jax.lax.stop_gradient, or pass the ALiBi "
            "term as bias, which has one."
        )
    learnt = (operands.bias, operands.scale, operands.sinks)
    wanted = Wanted(*(x is not None and x.perturbed for x in learnt))
    operands = Operands(*(None if x is None else x.value for x in operands))
    out, lse = _primitives.forward(operands, options)
    # Names for jax.checkpoint policies: saving these two is what spares the forward its second run.
    out = checkpoint_name(out, "flash_attention_out")
    lse = checkpoint_name(lse, "flash_attention_lse")
    return (out, lse), (Saved(operands, out, lse, wanted), options)


def flash_attention_backward(saved, cotangents):
    (operands, out, lse, wanted), options = saved
    d_out, d_lse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    d_out = jnp.zeros_like(out) if d_out is None else d_out
    residuals = _primitives.Residuals(operands, out, lse, d_out, d_lse)
    options = dataclasses.replace(options, bias_gradient=wanted.bias)
    dq, dk, dv, *dbias = _primitives.backward(residuals, options)
    grads = Operands(dq, dk, dv)
    if wanted.bias:
        grads = grads._replace(bias=dbias[0].astype(operands.bias.dtype))
    if wanted.scale:
        grads = grads._replace(scale=scale_gradient(operands, dq))
    if wanted.sinks:
        grads = grads._replace(sinks=sink_gradient(operands, out, lse, d_out, d_lse))
    return grads, None


def scale_gradient(operands: Operands, dq):
    """sum(ds * q.k), which is sum(q * dq) / scale because dq = scale * ds k. NaN at scale 0."""
    per_batch = jnp.sum(operands.query.astype(jnp.float32) * dq.astype(jnp.float32), axis=(1, 2, 3))
    shared = operands.scale.shape[0] != per_batch.shape[0]
    total = jnp.sum(per_batch, keepdims=True) if shared else per_batch
    return total / operands.scale


def sink_gradient(operands: Operands, out, lse, d_out, d_lse):
    """ds = p (dp - delta) of a key whose value is 0, and so its dp: -sum exp(sink - lse) delta."""
    product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(product, axis=-1), 1, 2)
    delta = delta if d_lse is None else delta - d_lse
    sinks = operands.sinks[..., None]
    p = jnp.where(lse == jnp.inf, 1, jnp.exp(sinks - lse))
    # Padding, whose d_out may be NaN; a row that has a sink sees at least that.
    by_head = -jnp.sum(jnp.where(lse <= _reference.LOWEST, 0, p * delta), axis=2)
    if operands.sinks.shape[0] == 1:
        by_head = jnp.sum(by_head, axis=0, keepdims=True)
    # Under explicit mesh axes by_head is sharded as lse is, and sinks may not be.
    wanted = jax.typeof(operands.sinks).sharding
    same = jax.typeof(by_head).sharding == wanted
    return by_head if same else jax.sharding.reshard(by_head, wanted)


flash_attention.defvjp(flash_attention_forward, flash_attention_backward, symbolic_zeros=True)
