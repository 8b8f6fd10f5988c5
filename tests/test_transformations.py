"""jit, vmap, grad, scan, remat, export and the debugging modes, each equal to plain calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, EVERYTHING
from compare import DIFFERENTIABLE, assert_same_bits, needs_kernels
from jax.ad_checkpoint import print_saved_residuals

from jax_flashattn import attention, export_disabled_checks


def close(actual, desired):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), actual, desired
    )


def loss(query, key, value, bias=None, mask=None, scale=None, q_lengths=None, k_lengths=None):
    """A scalar that depends on out and lse."""
    out, lse = attention(
        query, key, value, bias, mask, scale=scale, is_causal=True, local_window_size=(6, 6),
        query_seq_lengths=q_lengths, key_value_seq_lengths=k_lengths, return_lse=True,
    )  # fmt: skip
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + jnp.where(
        jnp.isfinite(lse), lse, 0
    ).sum()


AXES = {  # of query, key, value, bias, mask, scale, q_lengths, k_lengths; "-" where absent
    "all leading": (0, 0, 0, "-", "-", "-", "-", "-"),
    "other axes": (1, 4, -2, "-", "-", "-", "-", "-"),
    "query only": (0, None, None, "-", "-", "-", "-", "-"),
    "key only": (None, 2, None, "-", "-", "-", "-", "-"),
    "value only": (None, None, 0, "-", "-", "-", "-", "-"),
    "bias only": (None, None, None, 1, "-", "-", "-", "-"),
    "bias shared": (0, 0, 0, None, "-", "-", "-", "-"),
    "bias mapped": (0, 0, 0, 4, "-", "-", "-", "-"),
    "mask only": (None, None, None, "-", 0, "-", "-", "-"),
    "mask shared": (0, 0, 0, "-", None, "-", "-", "-"),
    "scale only": (None, None, None, "-", "-", 0, "-", "-"),
    "scale shared": (0, 0, 0, "-", "-", None, "-", "-"),
    "lengths only": (None, None, None, "-", "-", "-", 1, 0),
    "lengths shared": (0, 0, 0, "-", "-", "-", None, None),
    "key lengths mapped": (0, 0, 0, "-", "-", "-", None, 0),
    "everything mapped": (0, 0, 0, 0, 0, 0, 0, 0),
}
SIZE = 3


def _operands(axes, bias_shape=(1, 4, 7, 9)):
    """Operands with an axis of SIZE where `axes` maps one, and the axes without the absent."""
    rng = np.random.default_rng(0)
    shapes = [(2, 7, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), bias_shape, (2, 1, 7, 9), (), (2,), (2,)]
    operands = []
    for position, (shape, axis) in enumerate(zip(shapes, axes, strict=True)):
        if axis == "-":
            operands.append(None)
            continue
        if axis is not None:
            rank = len(shape) + 1
            shape = (*shape[: axis % rank], SIZE, *shape[axis % rank :])
        x = rng.standard_normal(shape).astype(np.float32)
        x = x > -0.5 if position == 4 else x
        x = rng.integers(0, 10, shape, np.int32) if position >= 6 else x
        operands.append(jnp.asarray(x))
    return operands, tuple(None if axis == "-" else axis for axis in axes)


def _loop(function, operands, axes):
    """What vmap means."""

    def one(i, x, axis):
        return x if axis is None else jnp.take(x, i, axis)

    results = [
        function(*(one(i, x, axis) for x, axis in zip(operands, axes, strict=True)))
        for i in range(SIZE)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_vmap_of_values_and_gradients(axes):
    operands, axes = _operands(axes)
    inexact = [i for i, x in enumerate(operands) if x is not None and x.dtype == jnp.float32]
    function = jax.value_and_grad(loss, inexact)
    close(jax.jit(jax.vmap(function, axes))(*operands), _loop(jax.jit(function), operands, axes))


@pytest.mark.parametrize("name", ["bias shared", "query only", "scale shared", "everything mapped"])
def test_gradient_of_vmap(name):
    """Unmapped operands get the sum over the mapped axis."""
    operands, axes = _operands(AXES[name])
    inexact = [i for i, x in enumerate(operands) if x is not None and x.dtype == jnp.float32]
    mapped = jax.jit(jax.grad(lambda *a: jax.vmap(loss, axes)(*a).sum(), inexact))
    looped = jax.jit(jax.grad(lambda *a: _loop(loss, a, axes).sum(), inexact))
    close(mapped(*operands), looped(*operands))


@pytest.mark.parametrize("bias_shape", [(9,), (7, 9), (4, 1, 1), (2, 1, 7, 1), ()], ids=str)
def test_vmap_over_a_broadcast_bias(bias_shape):
    operands, axes = _operands((0, 0, 0, 0, "-", "-", "-", "-"), bias_shape)
    function = jax.grad(loss, (0, 3))
    close(jax.jit(jax.vmap(function, axes))(*operands), _loop(function, operands, axes))


def test_nested_vmap():
    operands, axes = _operands((0, None, 0, "-", "-", "-", "-", "-"))
    query, key, value = operands[:3]
    keys = jnp.stack([key, key * 2])
    nested = jax.vmap(jax.vmap(loss, axes[:3]), (None, 0, None))(query, keys, value)
    assert nested.shape == (2, SIZE)
    for i in range(2):
        close(nested[i], _loop(loss, (query, keys[i], value), axes[:3]))


def test_vmap_of_unbatched_equals_batched():
    arrays = CASES["gqa-bias-lengths"].arrays("float32")
    bias = arrays.pop("bias")
    mapped = jax.vmap(lambda a: attention(**a, bias=bias, return_lse=True))(arrays)
    close(mapped, attention(**arrays, bias=bias, return_lse=True))


def test_eager_equals_jit():
    arrays, static = EVERYTHING.arrays("float32"), EVERYTHING.static()

    def call(arrays):
        return attention(**arrays, **static, return_lse=True)

    close(call(arrays), jax.jit(call)(arrays))


def test_scan_and_while_loop():
    query, key, value = _inputs()

    def step(x, _):
        return attention(x, key, value, is_causal=True), None

    desired = query
    for _ in range(4):
        desired = step(desired, None)[0]
    close(jax.lax.scan(step, query, length=4)[0], desired)
    looped = jax.lax.while_loop(
        lambda c: c[0] < 4, lambda c: (c[0] + 1, step(c[1], None)[0]), (0, query)
    )
    close(looped[1], desired)

    def through(body):
        return jax.grad(lambda q: jnp.sin(body(q)).sum())(query)

    def unrolled(q):
        for _ in range(4):
            q = step(q, None)[0]
        return q

    close(through(lambda q: jax.lax.scan(step, q, length=4)[0]), through(unrolled))


RESIDUALS = ("flash_attention_out", "flash_attention_lse")


def _count(jaxpr, name):
    return str(jaxpr).count(f"{name}[")


def test_remat_keeps_the_named_residuals(capsys):
    """With out and lse saved by name, the backward pass does not run the forward kernel again."""
    query, key, value = _inputs()
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUALS)
    nothing = jax.checkpoint_policies.nothing_saveable
    gradients, forwards = [], []
    for chosen in (policy, nothing):
        saved = jax.checkpoint(lambda *a: attention(*a, is_causal=True).sum(), policy=chosen)
        gradient = jax.grad(saved, (0, 1, 2))
        gradients.append(gradient(query, key, value))
        jaxpr = jax.make_jaxpr(gradient)(query, key, value)
        assert _count(jaxpr, "flash_attention_bwd") == 1
        forwards.append(_count(jaxpr, "flash_attention_fwd"))
        print_saved_residuals(saved, query, key, value)
        listed = capsys.readouterr().out
        assert [name in listed for name in RESIDUALS] == [chosen is policy] * 2, listed
    assert forwards == [1, 2]
    close(gradients[0], gradients[1])
    plain = jax.grad(lambda *a: attention(*a, is_causal=True).sum(), (0, 1, 2))
    close(gradients[0], plain(query, key, value))


def test_backward_computes_only_what_is_asked():
    """No bias gradient, and no d_lse operand, unless they are used."""
    query, key, value = _inputs()
    bias = jnp.zeros((1, 2, 7, 9))

    def backward(argnums, use_lse):
        def function(*a):
            out, lse = attention(*a, return_lse=True)
            return out.sum() + (lse.sum() if use_lse else 0)

        return jax.make_jaxpr(jax.grad(function, argnums))(query, key, value, bias)

    assert "bias_gradient=True" in str(backward((0, 3), False))
    assert "bias_gradient=True" not in str(backward(0, False))


def test_donation():
    query, key, value = _inputs()
    key, value = key[:, :7], value[:, :7]
    desired = attention(query, key, value)
    call = jax.jit(attention, donate_argnums=0)
    donated = query + 0
    close(call(donated, key, value), desired)
    assert donated.is_deleted()


def test_one_array_as_all_three():
    query = _inputs()[0]
    close(attention(query, query, query), attention(query, query + 0, query + 0))
    numpy = np.asarray(query)
    close(attention(numpy, numpy, numpy), attention(query, query, query))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_x64_mode_changes_nothing(dtype):
    arrays, static = EVERYTHING.arrays(dtype), EVERYTHING.static()

    def results():
        def total(query):
            return attention(**arrays | {"query": query}, **static).astype(jnp.float32).sum()

        return jax.jit(jax.value_and_grad(total))(arrays["query"])

    desired = results()
    with jax.enable_x64(True):
        assert_same_bits(results(), desired)
        out, lse = attention(**arrays, **static, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == jnp.float32


@pytest.mark.parametrize("mode", [jax.debug_nans, jax.debug_infs])
def test_debugging_modes_accept_masked_rows(mode):
    """Masked rows and their gradients go through no NaN or infinity that reaches the user."""
    case = CASES["lengths-causal-bottom-right"]
    arrays, static = case.arrays("float32"), case.static()
    call = jax.jit(jax.value_and_grad(lambda q: attention(**arrays | {"query": q}, **static).sum()))
    with mode(True):
        value, gradient = call(arrays["query"])
        if mode is jax.debug_nans:
            attention(**arrays, **static, return_lse=True)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("serialised", [False, True])
def test_export_round_trip(serialised):
    query, key, value = _inputs()
    call = jax.jit(lambda *a: attention(*a, is_causal=True, return_lse=True))
    exported = jax.export.export(call)(query, key, value)
    if serialised:
        pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
        exported = jax.export.deserialize(exported.serialize())
    assert_same_bits(exported.call(query, key, value), call(query, key, value))


def test_an_exported_program_takes_its_shapes_only():
    query, key, value = _inputs()
    exported = jax.export.export(jax.jit(attention))(query, key, value)
    with pytest.raises(ValueError, match="Shape mismatch"):
        exported.call(query[:, :-1], key, value)
    with pytest.raises(ValueError, match="Dtype mismatch"):
        exported.call(*(x.astype(jnp.bfloat16) for x in (query, key, value)))
    assert_same_bits(exported.call(query, key, value), jax.jit(attention)(query, key, value))


@pytest.mark.gpu
def test_export_of_the_kernels():
    """Through bytes, as another process would get it."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    arrays = CASES["gqa-6-3-causal"].arrays("bfloat16")
    arrays = [arrays[name] for name in ("query", "key", "value")]
    call = jax.jit(lambda *a: attention(*a, is_causal=True, implementation="cuda"))
    exported = jax.export.export(call, disabled_checks=export_disabled_checks())(*arrays)
    exported = jax.export.deserialize(exported.serialize())
    assert_same_bits(exported.call(*arrays), call(*arrays))


@pytest.mark.parametrize("transform", [
    lambda f: lambda x: jax.jvp(f, (x,), (x,)), jax.jacfwd, lambda f: jax.grad(jax.grad(f)),
    jax.hessian, lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,)),
], ids=["jvp", "jacfwd", "grad of grad", "hessian", "forward over reverse"])  # fmt: skip
def test_forward_mode_and_second_order_say_that_they_are_not_there(transform):
    """An error, never a wrong derivative."""
    query, key, value = _inputs()

    def total(x):
        return attention(x * query, key, value).sum()

    with pytest.raises((TypeError, NotImplementedError), match=r"custom_vjp|second order"):
        transform(total)(jnp.float32(1))


def _half_gradient(*arrays):
    return jax.grad(lambda *a: attention(*a).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)


@needs_kernels
def test_cuda_lowering_calls_the_kernels():
    shapes = [jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)] * 3
    lowered = jax.jit(_half_gradient).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "@jax_flashattn_fwd_v2" in lowered
    assert "@jax_flashattn_bwd_v2" in lowered
    assert "dot_general" not in lowered
    on_cpu = jax.jit(_half_gradient).lower(*shapes).as_text()
    assert "jax_flashattn_fwd_v2" not in on_cpu


@needs_kernels
def test_cuda_export():
    shapes = [jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)] * 3
    exported = jax.export.export(
        jax.jit(_half_gradient), platforms=["cuda"], disabled_checks=export_disabled_checks()
    )(*shapes)
    assert "jax_flashattn_bwd_v2" in exported.mlir_module()
    with pytest.raises(ValueError, match="jax_flashattn"):
        jax.export.export(jax.jit(_half_gradient), platforms=["cuda"])(*shapes)


def _inputs():
    operands, _ = _operands((None, None, None, "-", "-", "-", "-", "-"))
    query, key, value = operands[: len(DIFFERENTIABLE[:3])]
    return query[:, :, :2], key, value
