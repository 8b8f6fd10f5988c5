"""vmap, sharding and export of the arrays of score and mask features: slopes, sinks, ids, spans."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_partitioning import collectives
from test_transformations import close

from jax_flashattn import attention, varlen_attention

B, T, S, N, K, H = 8, 16, 20, 4, 4, 8
RNG = np.random.default_rng(0)
IDS = ("query_segment_ids", "key_value_segment_ids")
LANES = 3


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), "float32")


def integers(limit, *shape):
    return jnp.asarray(RNG.integers(0, limit, shape), "int32")


def inputs(batch=B):
    shapes = [(batch, T, N, H), (batch, S, K, H), (batch, S, K, H)]
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes]


def results(arrays, options, **static):
    """out, lse and the gradients of query, key, value and, where it is there, of sinks."""
    sinks = {name: x for name, x in options.items() if name == "sinks"}
    others = {name: x for name, x in options.items() if name != "sinks"}

    def call(arrays, sinks):
        return attention(*arrays, **sinks, **others, is_causal=True, return_lse=True, **static)

    (out, lse), pullback = jax.vjp(call, arrays, sinks)
    return (out, lse), pullback((jnp.cos(out), jnp.sin(jnp.where(jnp.isfinite(lse), lse, 0))))


# What is mapped, with its axis of lanes, or shared (axis None); batch is 2.
MAPPED = {
    "slopes": {"alibi_slopes": (normal(LANES, N), 0)},
    "slopes by entry": {"alibi_slopes": (normal(2, LANES, N), 1)},
    "slopes shared": {"alibi_slopes": (normal(N), None)},
    "sinks": {"sinks": (normal(N, LANES), 1)},
    "sinks by entry": {"sinks": (normal(LANES, 2, N), 0)},
    "sinks shared": {"sinks": (normal(2, N), None)},
    "ids": {IDS[0]: (integers(2, 2, T, LANES), 2), IDS[1]: (integers(2, LANES, 2, S), 0)},
    "ids of keys": {IDS[0]: (integers(2, 2, T), None), IDS[1]: (integers(2, LANES, 2, S), 0)},
    "prefix": {"prefix_lengths": (integers(S, LANES, 2), 0)},
    "spans": {"bidirectional_spans": (integers(S, 2, 3, LANES, 2), 2)},
    "all": {"alibi_slopes": (normal(N), None), "sinks": (normal(LANES, N), 0),
            IDS[0]: (integers(2, LANES, 2, T), 0), IDS[1]: (integers(2, 2, S), None),
            "prefix_lengths": (integers(S, 2), None),
            "bidirectional_spans": (integers(S, LANES, 2, 1, 2), 0)},
}  # fmt: skip


@pytest.mark.parametrize("also_arrays", [False, True], ids=["", "and query, key, value"])
@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name, also_arrays):
    if not also_arrays and all(axis is None for _, axis in MAPPED[name].values()):
        pytest.skip("nothing is mapped")
    options = {n: x for n, (x, _) in MAPPED[name].items()}
    axes = {n: axis for n, (_, axis) in MAPPED[name].items()}
    arrays = inputs(2)
    if also_arrays:
        arrays = [jnp.stack([x, 2 * x, -x]) for x in arrays]
    array_axis = 0 if also_arrays else None
    actual = jax.jit(jax.vmap(results, (array_axis, axes)))(arrays, options)
    one = jax.jit(results)
    each = []
    for i in range(LANES):
        lane = {n: x if axes[n] is None else jnp.take(x, i, axes[n]) for n, x in options.items()}
        each.append(one([x[i] for x in arrays] if also_arrays else arrays, lane))
    close(actual, jax.tree.map(lambda *x: jnp.stack(x), *each))


def test_vmap_of_packed_sequences():
    """Bounds of their own for each lane, or the same for all."""
    query, key, value = ([x, x + 1, 2 * x] for x in (x[0] for x in inputs(1)))
    arrays = [jnp.stack(x) for x in (query, key, value)]
    bounds = jnp.asarray([[0, 3, 16], [2, 9, 9], [0, 0, 12]], "int32")
    for axis, cu in ((0, bounds), (None, bounds[0])):
        call = functools.partial(varlen_attention, sinks=normal(N), is_causal=True)
        mapped = jax.jit(jax.vmap(call, (0, 0, 0, axis, axis)))(*arrays, cu, cu + 1)
        for i in range(LANES):
            own = cu if axis is None else cu[i]
            close(mapped[i], call(*(x[i] for x in arrays), own, own + 1))


# Operands by how they are sharded: heads over "model", the batch over "data".
SHARDED = {
    "slopes": {"alibi_slopes": (normal(N), P("model"))},
    "slopes by entry": {"alibi_slopes": (normal(B, N), P("data", "model"))},
    "sinks": {"sinks": (normal(N), P("model"))},
    "sinks, whole": {"sinks": (normal(N), P())},
    "sinks by entry": {"sinks": (normal(B, N), P("data", "model"))},
    "sinks by entry, whole": {"sinks": (normal(B, N), P())},
    "ids": {IDS[0]: (integers(2, B, T), P("data")), IDS[1]: (integers(2, B, S), P("data"))},
    "prefix": {"prefix_lengths": (integers(S, B), P("data"))},
    "spans": {"bidirectional_spans": (integers(S, B, 3, 2), P("data"))},
}


def place(mesh, name):
    """The options on one device, and sharded."""
    whole = {n: x for n, (x, _) in SHARDED[name].items()}
    shardings = {n: NamedSharding(mesh, spec) for n, (_, spec) in SHARDED[name].items()}
    return whole, jax.device_put(whole, shardings)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded(cpu_mesh, name):
    """The values of one device, nothing gathered; a gradient of shared sinks is one sum."""
    mesh = cpu_mesh((2, 4), ("data", "model"))
    options, placed = place(mesh, name)
    arrays = jax.device_put(inputs(), NamedSharding(mesh, P("data", None, "model")))
    compiled = jax.jit(results).lower(arrays, placed).compile()
    shared = name.startswith("sinks") and name != "sinks by entry"
    # Where the result shall be whole, pieces of a few floats are put together.
    assert collectives(compiled) <= ({"all-reduce", "all-gather"} if shared else set())
    assert ("all-reduce" in collectives(compiled)) == (name in ("sinks", "sinks, whole"))
    close(compiled(arrays, placed), jax.jit(results)(inputs(), options))


@pytest.mark.parametrize("name", SHARDED)
def test_explicit_axes(cpu_mesh, name):
    mesh = cpu_mesh((2, 4), ("data", "model"), jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        options, placed = place(mesh, name)
        arrays = jax.device_put(inputs(), NamedSharding(mesh, P("data", None, "model", None)))
        actual = jax.jit(results)(arrays, placed)
    close(actual, jax.jit(results)(inputs(), options))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_sums_the_gradient_of_sinks(cpu_mesh, check_vma):
    """Sinks whole along the batch's axis: every shard's part is added."""
    mesh = cpu_mesh((2, 4), ("data", "model"))
    arrays, sinks = inputs(), normal(N)
    spec = P("data", None, "model")
    mapped = jax.shard_map(
        lambda *a: attention(*a[:3], sinks=a[3], is_causal=True),
        mesh=mesh, in_specs=(spec, spec, spec, P("model")), out_specs=spec, check_vma=check_vma,
    )  # fmt: skip

    def total(function, *arrays):
        out = function(*arrays)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    gradient = jax.jit(jax.grad(functools.partial(total, mapped), (0, 1, 2, 3)))
    plain = functools.partial(total, lambda *a: attention(*a[:3], sinks=a[3], is_causal=True))
    close(gradient(*arrays, sinks), jax.grad(plain, (0, 1, 2, 3))(*arrays, sinks))


def test_packed_sequences_shard_their_heads(cpu_mesh):
    """The tokens are one dimension of sequences and stay whole; heads need no collective."""
    mesh = cpu_mesh((8,), ("model",))
    shapes = [(T, 8, H), (S, 8, H), (S, 8, H)]
    arrays = [normal(*shape) for shape in shapes]
    bounds = jnp.asarray([0, 7, 16], "int32")

    def gradient(*arrays):
        return jax.grad(lambda *a: jnp.sin(varlen_attention(*a, bounds, bounds)).sum(), (0, 1, 2))(
            *arrays
        )

    placed = [jax.device_put(x, NamedSharding(mesh, P(None, "model"))) for x in arrays]
    compiled = jax.jit(gradient).lower(*placed).compile()
    assert not collectives(compiled)
    close(compiled(*placed), jax.jit(gradient)(*arrays))
    by_token = [jax.device_put(arrays[0], NamedSharding(mesh, P("model"))), *placed[1:]]
    with pytest.raises(Exception, match=r"(?s)sharded along its sequence"):
        jax.jit(gradient).lower(*by_token).compile()


def test_export_of_all_features():
    options = {n: x for features in SHARDED.values() for n, (x, _) in features.items()}
    static = {"logits_soft_cap": 3.0, "dropout_rate": 0.25, "dropout_key": jax.random.key(1)}
    call = jax.jit(lambda arrays, options: results(arrays, options, **static))
    exported = jax.export.export(call)(inputs(), options)
    close(exported.call(inputs(), options), call(inputs(), options))


def test_slopes_have_no_gradient_and_say_so():
    arrays = inputs()
    with pytest.raises(NotImplementedError, match=r"alibi_slopes has no gradient.*bias"):
        jax.grad(lambda x: attention(*arrays, alibi_slopes=x).sum())(normal(N))
    stopped = jax.grad(lambda x: attention(*arrays, alibi_slopes=jax.lax.stop_gradient(x)).sum())
    assert not stopped(normal(N)).any()
