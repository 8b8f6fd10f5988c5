"""Sharded over eight CPU devices: right values, and no operand gathered where none needs to be."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashattn import attention

HEADS = {"MHA": (8, 8), "GQA": (8, 4), "MQA": (8, 1)}
heads = pytest.mark.parametrize(("heads", "kv_heads"), HEADS.values(), ids=HEADS.keys())
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\b")


def collectives(compiled):
    return set(COLLECTIVE.findall(compiled.as_text()))


def inputs(heads, kv_heads, batch=8, length=16, head_dim=8):
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, head_dim)] + [(batch, length, kv_heads, head_dim)] * 2
    return [jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def results(query, key, value, bias=None, **options):
    """(out, lse) and the gradients, with cotangents of the outputs' sharding."""
    primal = [x for x in (query, key, value, bias) if x is not None]
    (out, lse), pullback = jax.vjp(
        lambda *a: attention(*a, is_causal=True, return_lse=True, **options), *primal
    )
    return (out, lse), pullback((jnp.cos(out), jnp.sin(lse)))


def close(actual, desired):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), actual, desired
    )


def check(mesh, specs, arrays, allowed=(), **options):
    """Compiles `results` for sharded operands, compares, and returns the compiled results."""
    function = jax.jit(functools.partial(results, **options))
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]
    compiled = function.lower(*placed).compile()
    assert collectives(compiled) <= set(allowed)
    actual = compiled(*placed)
    close(actual, function(*arrays))
    return actual


def test_collectives_are_seen(cpu_mesh):
    """Positive control: attention written in jnp over a sharded sequence gathers."""
    mesh = cpu_mesh((8,), ("data",))
    placed = jax.device_put(inputs(8, 8), NamedSharding(mesh, P(None, "data")))
    plain = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="xla"))
    assert "all-gather" in collectives(plain.lower(*placed).compile())


@heads
def test_batch(cpu_mesh, heads, kv_heads):
    mesh = cpu_mesh((8,), ("data",))
    (out, _), gradients = check(mesh, [P("data")] * 3, inputs(heads, kv_heads))
    for x in (out, *gradients):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), x.ndim)


@heads
def test_batch_and_heads(cpu_mesh, heads, kv_heads):
    """Heads over four devices; with one key/value head its gradient is a sum over them."""
    mesh = cpu_mesh((2, 4), ("data", "model"))
    query = P("data", None, "model")
    key = P("data") if kv_heads == 1 else query
    allowed = ("all-reduce",) if kv_heads == 1 else ()
    (out, lse), gradients = check(mesh, [query, key, key], inputs(heads, kv_heads), allowed)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, query), 4)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 3)
    for x, spec in zip(gradients, (query, key, key), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


def test_more_devices_than_key_heads_is_right(cpu_mesh):
    mesh = cpu_mesh((8,), ("model",))
    query = P(None, None, "model")
    every = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    check(mesh, [query, P(), P()], inputs(8, 2), every)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1, 8, 16, 16), P(None, "model")),
        ((8, 8, 16, 16), P("data", "model")),
        ((8, 1, 1, 16), P("data")),
        ((1, 1, 16, 16), P()),
    ],
    ids=str,
)
def test_bias_and_its_gradient(cpu_mesh, shape, spec):
    """A bias shared along a sharded axis gets the sum of every shard's gradient."""
    mesh = cpu_mesh((2, 4), ("data", "model"))
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    specs = [P("data", None, "model")] * 3 + [spec]
    check(mesh, specs, [*inputs(8, 4), bias], allowed=("all-reduce",))


def test_lengths_mask_and_scale(cpu_mesh):
    mesh = cpu_mesh((2, 4), ("data", "model"))
    arrays = inputs(8, 4)
    rng = np.random.default_rng(1)
    sharded = {
        "mask": (rng.random((8, 1, 16, 16)) < 0.7, P("data")),
        "query_seq_lengths": (rng.integers(0, 17, 8, np.int32), P("data")),
        "key_value_seq_lengths": (rng.integers(0, 17, 8, np.int32), P("data")),
        "scale": (np.float32(0.3), P()),
    }

    def call(arrays, options):
        return results(*arrays, **options)

    options = {name: x for name, (x, _) in sharded.items()}
    placed = {n: jax.device_put(x, NamedSharding(mesh, spec)) for n, (x, spec) in sharded.items()}
    placed_arrays = jax.device_put(arrays, NamedSharding(mesh, P("data", None, "model")))
    compiled = jax.jit(call).lower(placed_arrays, placed).compile()
    assert not collectives(compiled)
    close(compiled(placed_arrays, placed), jax.jit(call)(arrays, options))


@pytest.mark.parametrize("which", [(0,), (1, 2), (0, 1, 2)], ids=["query", "key-value", "all"])
def test_sharded_sequence_raises_with_advice(cpu_mesh, which):
    mesh = cpu_mesh((8,), ("data",))
    arrays = [
        jax.device_put(x, NamedSharding(mesh, P(None, "data") if i in which else P()))
        for i, x in enumerate(inputs(8, 8))
    ]
    with pytest.raises(
        Exception, match=r"(?s)sharded along its sequence.*Shard the batch or the heads"
    ):
        jax.jit(attention).lower(*arrays).compile()


@heads
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(cpu_mesh, heads, kv_heads, check_vma):
    mesh = cpu_mesh((2, 4), ("data", "model"))
    arrays = inputs(heads, kv_heads)
    query, lse = P("data", None, "model"), P("data", "model")
    key = P("data") if kv_heads == 1 else query
    forward = jax.shard_map(
        functools.partial(attention, is_causal=True, return_lse=True),
        mesh=mesh, in_specs=(query, key, key), out_specs=(query, lse), check_vma=check_vma,
    )  # fmt: skip

    def sharded(*arrays):
        (out, lse), pullback = jax.vjp(forward, *arrays)
        return (out, lse), pullback((jnp.cos(out), jnp.sin(lse)))

    close(jax.jit(sharded)(*arrays), jax.jit(results)(*arrays))


def test_gradient_inside_shard_map(cpu_mesh):
    """Parameters replicated over the mesh: their gradients are summed by the user's psum."""
    mesh = cpu_mesh((8,), ("data",))
    arrays = inputs(8, 4)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, 16, 16)), jnp.float32)

    def loss(bias, *arrays):
        return attention(*arrays, bias).sum()

    def local(bias, *arrays):
        bias = jax.lax.pcast(bias, "data", to="varying")
        return jax.lax.psum(jax.grad(loss)(bias, *arrays), "data")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), *[P("data")] * 3), out_specs=P(), check_vma=True
    )
    close(jax.jit(mapped)(bias, *arrays), jax.grad(loss)(bias, *arrays))


@heads
def test_explicit_mode(cpu_mesh, heads, kv_heads):
    """Types carry the sharding: outputs and gradients have the operands'."""
    mesh = cpu_mesh((2, 4), ("data", "model"), jax.sharding.AxisType.Explicit)
    arrays = inputs(heads, kv_heads)
    desired = jax.jit(results)(*arrays)
    query = P("data", None, "model", None)
    key = P("data", None, None, None) if kv_heads == 1 else query
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, (query, key, key), strict=True)
        ]

        @jax.jit
        def call(*arrays):
            out, lse = attention(*arrays, is_causal=True, return_lse=True)
            assert jax.typeof(out).sharding.spec == query
            assert jax.typeof(lse).sharding.spec == P("data", "model", None)
            return out, lse

        close(call(*placed), desired[0])
        (out, _), gradients = jax.jit(results)(*placed)
        close((out, gradients), (desired[0][0], desired[1]))
        for x, spec in zip(gradients, (query, key, key), strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_of_sharded_operands(cpu_mesh, axis):
    mesh = cpu_mesh((8,), ("data",))
    arrays = [jnp.stack([x, x + 1], axis) for x in inputs(4, 2)]
    spec = P("data") if axis else P(None, "data")
    placed = jax.device_put(arrays, NamedSharding(mesh, spec))
    mapped = jax.jit(jax.vmap(attention, in_axes=axis))
    close(mapped(*placed), mapped(*arrays))
