"""Sharding: every device computes whole (batch, head) pairs, so batch and heads shard freely.

Forward and backward need no collective, with two exceptions in the backward: the gradient of a bias
that the sharded batch or heads share, and of keys whose heads are not sharded with the query's, are
summed over the devices. Heads are sharded over m devices

    m divides K             query and key/value heads alike
    K divides m, m | N      query heads, so that each device reads one key/value head (multi-query
                            attention, or more devices than key/value heads); key/value heads over
                            those leading mesh axes that divide K, copied over the rest
    otherwise               over the leading mesh axes that do fit, or not at all

Sequence and head dim are never split: an operand sharded there is an error with advice, since the
silent answer is an all-gather. The rule reaches XLA by custom_partitioning, for Shardy and GSPMD;
on one device and where shard_map has made all axes manual, jax lowers the plain primitive instead.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_flashattn._options import Operands, Options

# Names of the dims of each operand and result. Only b, h and k (key/value heads) may be sharded.
OPERAND_DIMS = Operands(
    "b i h d", "b j k d", "b j k d", "b h i j", "b h i j", "b", "b", "b",
    "b h", "b h", "b h x", "b i", "b j", "b x x", "b x", "b x",
)  # fmt: skip
OUT_DIMS, LSE_DIMS = "b i h d", "b h i"


class Sizes(NamedTuple):
    """The full extents behind the dim names that may be sharded."""

    b: int
    h: int
    k: int


class Split(NamedTuple):
    """The mesh axes over which each of these dims is sharded."""

    b: tuple = ()
    h: tuple = ()
    k: tuple = ()


def parts(tree):
    """(operands, the backward's other operands) of either primitive's tree."""
    return (tree, ()) if isinstance(tree, Operands) else (tree.operands, tuple(tree[1:]))


def dims_of_leaves(tree) -> list:
    """The dim names of each leaf, in the order in which jax flattens the tree."""
    operands, rest = parts(tree)
    dims = [d for x, d in zip(operands, OPERAND_DIMS) if x is not None]
    rest_dims = (OUT_DIMS, LSE_DIMS, OUT_DIMS, LSE_DIMS)
    return dims + [d for x, d in zip(rest, rest_dims) if x is not None]


def dims_of_results(tree, options: Options) -> list:
    if isinstance(tree, Operands):
        return [OUT_DIMS, LSE_DIMS]
    return list(OPERAND_DIMS[: 4 if options.bias_gradient else 3])


def sizes(tree) -> Sizes:
    query, key = parts(tree)[0][:2]
    return Sizes(query.shape[0], query.shape[2], key.shape[2])


def axes_of(entry) -> tuple:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def entries(x, mesh_shape) -> list:
    """The mesh axes over which each dim of an array is sharded."""
    if x.sharding is None:
        return [()] * len(x.shape)
    if hasattr(x.sharding, "spec"):
        named = [axes_of(entry) for entry in x.sharding.spec]
        named += [()] * (len(x.shape) - len(named))
        return [tuple(a for a in axes if mesh_shape[a] > 1) for axes in named]
    # Inside a partly manual shard_map XLA only tells into how many parts each dim is cut. A wrong
    # guess among axes of one size costs a collective and stays right: XLA reshards as we ask.
    left, found = [a for a in mesh_shape if mesh_shape[a] > 1], []
    for size, part in zip(x.shape, x.sharding.shard_shape(tuple(x.shape))):
        ways = size // part if part else 1
        fits = (
            axes
            for n in range(len(left) + 1)
            for axes in itertools.combinations(left, n)
            if math.prod(mesh_shape[a] for a in axes) == ways
        )
        found.append(next(fits, ()))
        left = [a for a in left if a not in found[-1]]
    return found


def check_whole_rows(operands: Operands, mesh_shape) -> None:
    """Refuses an operand that is sharded along its sequence or head dim."""
    for (name, x), dims in zip(operands._asdict().items(), OPERAND_DIMS):
        for position, dim in enumerate(dims.split()):
            axes = () if x is None or dim in "bhk" else entries(x, mesh_shape)[position]
            if x is not None and axes:
                along = "head dim" if dim == "d" else "sequence"
                raise ValueError(
                    f"jax_flashattn.attention: {name} {list(x.shape)} is sharded along its {along} "
                    f"(dimension {position}, mesh axes {', '.join(map(str, axes))}), which is not "
                    f"supported. Shard the batch or the heads instead, or gather this dimension "
                    f"first with jax.lax.with_sharding_constraint (jax.sharding.reshard under "
                    f"explicit axes)."
                )


def choose(tree, mesh_shape) -> Split:
    """Over which mesh axes batch and heads are sharded, given where the operands are."""
    operands, extent = parts(tree)[0], sizes(tree)
    query, *keys = (entries(x, mesh_shape) for x in operands[:3])

    def devices(axes) -> int:
        return math.prod(mesh_shape[a] for a in axes)

    def longest(candidates, fits) -> tuple:
        prefixes = (axes[:n] for axes in candidates for n in range(len(axes), 0, -1))
        return next((axes for axes in prefixes if fits(devices(axes))), ())

    batch = longest([x[0] for x in (query, *keys)], lambda m: extent.b % m == 0)

    def unused(axes) -> tuple:
        return tuple(a for a in axes if a not in batch)

    def heads_fit(m: int) -> bool:
        return extent.k % m == 0 or (m % extent.k == 0 and extent.h % m == 0)

    heads = longest([unused(x[2]) for x in (query, *keys)], heads_fit)
    return Split(batch, heads, longest([heads], lambda m: extent.k % m == 0))


class Shard(NamedTuple):
    """What one device does besides its own attention. Static; the default is nothing."""

    copied: tuple = ()  # the mesh axes over which a key/value head has several readers
    group: int = 1  # query heads for each key/value head
    dbias: tuple = ()  # the mesh axes over which a bias is shared


def make_shard(tree, split: Split, options: Options) -> Shard:
    extent, bias = sizes(tree), parts(tree)[0].bias
    dbias: tuple = ()
    if options.bias_gradient:
        dbias += split.b if bias.shape[0] == 1 else ()
        dbias += split.h if bias.shape[1] == 1 else ()
    return Shard(split.h[len(split.k) :], extent.h // extent.k, dbias)


def run_shard(attend, tree, options: Options, shard: Shard) -> list:
    """attend(tree, options) on the arrays of one device, as its Shard wants it."""
    operands, rest = parts(tree)
    key, value = operands.key, operands.value
    if shard.copied:  # all query heads here read one of the key/value heads here
        first = jax.lax.axis_index(shard.copied) * operands.query.shape[2]
        head = first // shard.group
        key, value = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (key, value))
    local = operands._replace(key=key, value=value)
    results = attend(type(tree)(local, *rest) if rest else local, options)
    if not rest:
        return results

    def total(dx, x):
        if not shard.copied:
            return dx
        zeros = jnp.zeros(x.shape, jnp.float32)
        dx = jax.lax.dynamic_update_slice_in_dim(zeros, dx.astype(jnp.float32), head, axis=2)
        return jax.lax.psum(dx, shard.copied).astype(x.dtype)

    dq, dk, dv, *dbias = results
    if shard.dbias:
        dbias = [jax.lax.psum(dbias[0], shard.dbias)]
    return [dq, total(dk, operands.key), total(dv, operands.value), *dbias]


def spec(x, dims: str, split: Split, extent: Sizes) -> PartitionSpec:
    """How an array with these dims is sharded; a dim that broadcasts stays whole."""

    def entry(dim: str, size: int):
        sharded = dim in "bhk" and size == getattr(extent, dim)
        return (getattr(split, dim) or None) if sharded else None

    return PartitionSpec(*map(entry, dims.split(), x.shape))


def sharding_rule(structure, options: Options, mesh, operand_types, result_types) -> str:
    """Shardy's rule: dims with one name are sharded alike, all others have a name of their own.

    Query and key/value heads share theirs only where they are the same in number.
    """
    tree = structure.unflatten(operand_types)
    extent, fresh = sizes(tree), iter(range(10**6))

    def names(x, dims: str) -> str:
        made = []
        for dim, size in zip(dims.split(), x.shape):
            shared = dim in "bhk" and size == getattr(extent, dim)
            dim = "h" if dim == "k" and extent.h == extent.k else dim
            made.append(dim if shared else f"x{next(fresh)}")
        return " ".join(made)

    left = ", ".join(map(names, operand_types, dims_of_leaves(tree)))
    right = ", ".join(map(names, result_types, dims_of_results(tree, options)))
    return f"{left} -> {right}"


def result_types(operands: Operands) -> tuple:
    """The sharding field of the types of out and lse. Explicit mesh axes are part of a type."""
    sharding = operands.query.sharding
    check_whole_rows(operands, sharding.mesh.shape)
    batch, _, heads, _ = (*sharding.spec, *[None] * (4 - len(sharding.spec)))
    out = NamedSharding(sharding.mesh, PartitionSpec(batch, None, heads, None))
    lse = NamedSharding(sharding.mesh, PartitionSpec(batch, heads, None))
    return dict(sharding=out), dict(sharding=lse)


class PartlyManual(NamedTuple):
    """The inside of a shard_map over some of the mesh axes: XLA partitions over the others."""

    mesh: Mesh  # whole, what collectives need
    rest: Mesh  # the axes that are not manual, what shardings refer to


def partly_manual(axis_context) -> PartlyManual | None:
    """Which such region is being lowered, if any, from what jax's lowering context says."""
    mesh = getattr(axis_context, "mesh", None)
    manual = getattr(axis_context, "manual_axes", frozenset())
    if mesh is None or not manual or set(manual) == set(mesh.axis_names):
        return None
    devices = mesh.devices[tuple(0 if a in manual else slice(None) for a in mesh.axis_names)]
    return PartlyManual(mesh, Mesh(devices, [a for a in mesh.axis_names if a not in manual]))


@functools.cache
def partitioned(primitive, structure, options: Options, region: PartlyManual | None):
    """`primitive` as a function of its leaves that the SPMD partitioner can split."""

    bind = functools.partial(primitive.bind, structure=structure, options=options)

    @custom_partitioning
    def whole(*leaves):
        return bind(*leaves, shard=Shard())

    def shardings(mesh, leaves, results):
        mesh = mesh if region is None else region.rest
        tree = structure.unflatten(leaves)
        split, extent = choose(tree, mesh.shape), sizes(tree)

        def of(arrays, dims):
            return [NamedSharding(mesh, spec(x, d, split, extent)) for x, d in zip(arrays, dims)]

        result = of(results, dims_of_results(tree, options))
        return tree, split, tuple(of(leaves, dims_of_leaves(tree))), result

    def partition(mesh, leaves, results):
        tree, split, operand_shardings, result_shardings = shardings(mesh, leaves, results)
        check_whole_rows(parts(tree)[0], mesh.shape if region is None else region.rest.shape)
        mesh = mesh if region is None else region.mesh
        shard = functools.partial(bind, shard=make_shard(tree, split, options))
        return mesh, shard, result_shardings, operand_shardings

    def infer(mesh, leaves, results):
        return shardings(mesh, leaves, results)[3]

    whole.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=functools.partial(sharding_rule, structure, options),
    )
    return whole
