"""vmap: the mapped axis is folded into the batch, lane by lane, so that B becomes lanes * B.

A bias or mask with batch extent 1 that all lanes share goes on being shared, and so do a scale,
slopes and sinks.
The exception is the backward where dbias is wanted: every lane has a dbias of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_flashattn._options import Operands, Options


def rule(primitive, args, axes, *, structure, options: Options):
    """The batching rule of both primitives; `primitive` is bound to the folded arrays."""
    lanes = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    # [1, ...] where unmapped, [lanes, ...] where mapped
    moved = [x[None] if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes)]
    tree = structure.unflatten(moved)
    operands = tree if isinstance(tree, Operands) else tree.operands
    batch = operands.query.shape[1]

    folded = fold_operands(operands, lanes, own_bias=options.bias_gradient)
    if tree is not operands:
        rest = [None if x is None else fold(x, lanes, batch) for x in tree[1:]]
        folded = type(tree)(folded, *rest)
    results = primitive.bind(*jax.tree.leaves(folded), structure=structure, options=options)
    results = [x.reshape(lanes, batch, *x.shape[1:]) for x in results]
    if options.bias_gradient and operands.bias.shape[1] != batch:  # one bias for a lane's batch
        results[3] = jnp.sum(results[3], axis=1, keepdims=True)
    return results, [0] * len(results)


def fold_operands(operands: Operands, lanes: int, *, own_bias: bool) -> Operands:
    """Operands [lanes|1, B|1, ...] with the batch lanes * B; own_bias: one bias for each lane."""
    batch = operands.query.shape[1]
    shareable = {"mask", "scale", "alibi_slopes", "sinks"} | (set() if own_bias else {"bias"})

    def one(name: str, x):
        if x is None or (name in shareable and x.shape[:2] == (1, 1)):
            return x if x is None else x[0]
        return fold(x, lanes, batch)

    return Operands(**{name: one(name, x) for name, x in operands._asdict().items()})


def fold(x, lanes: int, batch: int):
    """[lanes|1, B|1, ...] -> [lanes * B, ...]."""
    x = jnp.broadcast_to(x, (lanes, batch, *x.shape[2:]))
    return x.reshape(lanes * batch, *x.shape[2:])
