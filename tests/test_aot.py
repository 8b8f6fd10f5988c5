"""Compiled for an H200 that is not there: registration, CUDA graphs, sharding, memory. aot_h200.py
says how, and how to have these tests run.
"""

import functools
import math

import aot_h200
import jax
import jax.numpy as jnp
import jaxlib
import pytest
from aot_h200 import Operand, scratch_bytes

from jax_flashattn import _ffi, _primitives, attention
from jax_flashattn._options import Operands, Options

FORWARD, BACKWARD = _ffi.FORWARD_TARGET, _ffi.BACKWARD_TARGET
HEADS = {"MHA": (8, 8), "GQA": (8, 4), "MQA": (8, 1)}
heads = pytest.mark.parametrize(("heads", "kv_heads"), HEADS.values(), ids=HEADS.keys())
both_passes = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
BATCH, LENGTH, HEAD_DIM = 8, 128, 64
MIB = 2**20


@pytest.fixture(scope="module")
def compile_h200():
    if _ffi.extension is None:
        pytest.skip("this jax_flashattn was built without CUDA kernels")
    version = jaxlib.__version__
    folder = aot_h200.plugin_folder(version)
    if folder is None:
        wheels = " ".join(f"{wheel}=={version}" for wheel in aot_h200.WHEELS)
        pytest.skip(f"{aot_h200.VARIABLE} names no folder with jax's CUDA plugin; to make one: "
                    f"pip install --no-deps --target FOLDER {wheels}")  # fmt: skip
    with aot_h200.Compiler(folder) as compiler:
        yield compiler


def operands(heads=4, kv_heads=4, query=(), key=(), batch=BATCH, length=LENGTH, head_dim=HEAD_DIM):
    """query, key and value, sharded by the specs `query` and `key`."""
    keys = Operand((batch, length, kv_heads, head_dim), spec=key)
    return [Operand((batch, length, heads, head_dim), spec=query), keys, keys]


# ---- what is compiled: functions of a module, since another process does it ---------------------


def outputs(query, key, value, bias=None, **options):
    """(out, lse)."""
    return attention(query, key, value, bias, return_lse=True, **options)


def gradients(*arrays, **options):
    """The gradients of query, key, value and, if given, bias: one forward and one backward."""
    (out, lse), pullback = jax.vjp(functools.partial(outputs, **options), *arrays)
    return pullback((jnp.cos(out), jnp.sin(lse)))


def everything(query, key, value, bias, mask, q_lengths, k_lengths, scale, *, family):
    """The gradients, and every operand and attribute that a custom call may have."""
    options = dict(
        mask=mask, query_seq_lengths=q_lengths, key_value_seq_lengths=k_lengths,
        local_window_size=(64, 32), causal_alignment="bottom_right", deterministic=True,
        implementation=f"cuda:{family}",
    )  # fmt: skip

    def call(query, key, value, bias, scale):
        return outputs(query, key, value, bias, scale=scale, **options)

    (out, lse), pullback = jax.vjp(call, query, key, value, bias, scale)
    return pullback((jnp.cos(out), jnp.sin(lse)))


def layers(query, key, value, count):
    for _ in range(count):
        query = jnp.sin(attention(query, key, value))
    return query.astype(jnp.float32).sum()


def scanned(query, key, value, count):
    def layer(x, _):
        return jnp.sin(attention(x, key, value)), None

    return jax.lax.scan(layer, query, length=count)[0].astype(jnp.float32).sum()


def gradient_of(function, *arrays, **options):
    return jax.grad(functools.partial(function, **options), argnums=(0, 1, 2))(*arrays)


def forward_and_backward(query, key, value, d_out, **options):
    """Everything that attention leaves in memory is an output: what else there is, is scratch."""

    def call(*arrays):
        return outputs(*arrays, **options)

    out, pullback, lse = jax.vjp(call, query, key, value, has_aux=True)
    return out, lse, pullback(d_out)


def unpartitioned(query, key, value):
    """The custom call as XLA sees it without a partitioning rule."""
    return _primitives.forward_cuda(Operands(query, key, value), Options())


def unknown_target(x):
    return jax.ffi.ffi_call("jax_flashattn_no_such_target", x)(x)


# ---- registration and lowering ------------------------------------------------------------------


@both_passes
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_custom_calls_compile(compile_h200, backward, dtype):
    arrays = [x._replace(dtype=dtype) for x in operands()]
    compiled = compile_h200(gradients if backward else outputs, arrays)
    assert compiled.custom_calls() == ({FORWARD: 1, BACKWARD: 1} if backward else {FORWARD: 1})


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_every_operand_compiles(compile_h200, family):
    if family not in _ffi.extension.build_info()["families"]:
        pytest.skip(f"this build has no kernels of {family}")
    scores = (BATCH, 8, LENGTH, LENGTH)
    extra = [Operand(scores, "float32"), Operand(scores, "bool"), Operand((BATCH,), "int32"),
             Operand((BATCH,), "int32"), Operand((), "float32")]  # fmt: skip
    arrays = [*operands(8, 2), *extra]
    compiled = compile_h200(functools.partial(everything, family=family), arrays, **ANY_SIZE)
    assert compiled.custom_calls() == {FORWARD: 1, BACKWARD: 1}
    assert captured(compiled) == [True, True]


def test_an_unregistered_target_is_refused(compile_h200):
    """Positive control: compiling proves that the handlers were found."""
    with pytest.raises(Exception, match="jax_flashattn_no_such_target"):
        compile_h200(unknown_target, [Operand((8,), "float32")])


@pytest.mark.parametrize("function", [outputs, gradients])
@pytest.mark.parametrize(
    ("dtype", "implementation"), [("float32", None), ("float32", "xla"), ("bfloat16", "xla")]
)
def test_the_reference_has_no_custom_call(compile_h200, function, dtype, implementation):
    arrays = [x._replace(dtype=dtype) for x in operands()]
    compiled = compile_h200(functools.partial(function, implementation=implementation), arrays)
    assert not any("flashattn" in target for target in compiled.custom_calls())


# ---- CUDA graphs --------------------------------------------------------------------------------

GRAPH = "kCommandBuffer"
ANY_SIZE = {"xla_gpu_graph_min_graph_size": 1}
WITH_LOOPS = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE"}


def captured(compiled):
    """For each custom call, whether it lies in a CUDA graph."""
    assert set(compiled.custom_calls()) <= {FORWARD, BACKWARD}
    return [GRAPH in thunk.inside for thunk in compiled.thunks() if thunk.kind == "kCustomCall"]


def outermost(compiled):
    return [thunk.kind for thunk in compiled.thunks() if not thunk.inside]


def test_a_small_program_is_captured_on_demand(compile_h200):
    assert captured(compile_h200(outputs, operands(), **ANY_SIZE)) == [True]
    compiled = compile_h200(gradients, operands(), **ANY_SIZE)
    assert captured(compiled) == [True, True]
    assert outermost(compiled) == [GRAPH]


@pytest.mark.parametrize("count", [3, 6])
@both_passes
def test_enough_layers_are_captured_by_default(compile_h200, backward, count):
    function = functools.partial(gradient_of, layers) if backward else layers
    compiled = compile_h200(functools.partial(function, count=count), operands())
    assert captured(compiled) == [True] * (2 * count if backward else count)
    assert outermost(compiled) == [GRAPH]


def test_a_scan_is_one_graph(compile_h200):
    """With loops enabled; by default only what is inside its body."""
    scan = functools.partial(scanned, count=6)
    compiled = compile_h200(scan, operands(), **ANY_SIZE, **WITH_LOOPS)
    assert captured(compiled) == [True]
    assert outermost(compiled) == [GRAPH]
    assert "kWhile" in outermost(compile_h200(scan, operands(), **ANY_SIZE))


def test_every_custom_call_of_a_scan_is_captured(compile_h200):
    scan = functools.partial(gradient_of, scanned, count=6)
    for options in ({}, WITH_LOOPS):
        inside = captured(compile_h200(scan, operands(), **ANY_SIZE, **options))
        assert len(inside) >= 2
        assert all(inside)


def test_what_is_not_captured_is_seen(compile_h200):
    """Positive control: graphs of everything but custom calls."""
    fusions = {"xla_gpu_enable_command_buffer": "FUSION"}
    compiled = compile_h200(gradients, operands(), **ANY_SIZE, **fusions)
    assert GRAPH in outermost(compiled)
    assert captured(compiled) == [False, False]


# ---- layout -------------------------------------------------------------------------------------


def heads_first(query, key, value, d_out):
    """Forward and backward of [B, N, T, H] arrays, from and to which XLA transposes."""

    def call(*arrays):
        return attention(*(x.swapaxes(1, 2) for x in arrays)).swapaxes(1, 2)

    out, pullback = jax.vjp(call, query, key, value)
    return out, pullback(d_out)


def packed(qkv):
    return attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])


def sliced(*arrays):
    return attention(*(x[:, :LENGTH] for x in arrays))


LONGER = Operand((BATCH, LENGTH + 32, 4, HEAD_DIM))
HEADS_FIRST = Operand((BATCH, 4, LENGTH, HEAD_DIM))
COPIES = {  # the function, its operands, how many arrays XLA copies at most
    "row-major": (forward_and_backward, [operands()[0]] * 4, 0),
    "packed": (packed, [Operand((BATCH, LENGTH, 3, 4, HEAD_DIM))], 3),
    "sliced": (sliced, [LONGER] * 3, 3),
    "heads first": (heads_first, [HEADS_FIRST] * 4, 8),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_operands(compile_h200, name):
    """Each view of an operand or result costs one copy; row-major arrays none, in both passes."""
    function, arrays, most = COPIES[name]
    kinds = [thunk.kind for thunk in compile_h200(function, arrays).thunks()]
    copies = [kind for kind in kinds if kind not in (GRAPH, "kCustomCall")]
    assert bool(copies) == bool(most)
    assert len(copies) <= most


# ---- sharding -----------------------------------------------------------------------------------

FOUR = {"x": 4}
BY_BATCH, BY_HEADS = ("x",), (None, None, "x")


def check_local(compiled, out_shape, collectives=frozenset()):
    """The custom calls are one device's share, and need nothing from other devices but these."""
    _, (out, *_) = compiled.results(FORWARD)
    assert out == f"bf16[{','.join(map(str, out_shape))}]"
    assert compiled.collectives() == set(collectives)


@both_passes
@heads
def test_batch_over_four_devices(compile_h200, heads, kv_heads, backward):
    arrays = operands(heads, kv_heads, BY_BATCH, BY_BATCH)
    compiled = compile_h200(gradients if backward else outputs, arrays, FOUR)
    check_local(compiled, (BATCH // 4, LENGTH, heads, HEAD_DIM))


@both_passes
@heads
def test_heads_over_four_devices(compile_h200, heads, kv_heads, backward):
    """Of a key/value head that all devices share, the gradient is the sum of theirs."""
    shared = kv_heads == 1
    arrays = operands(heads, kv_heads, BY_HEADS, () if shared else BY_HEADS)
    compiled = compile_h200(gradients if backward else outputs, arrays, FOUR)
    sums = {"all-reduce"} if shared and backward else set()
    check_local(compiled, (BATCH, LENGTH, heads // 4, HEAD_DIM), sums)


@pytest.mark.parametrize(
    ("shape", "spec", "collectives"),
    [
        ((BATCH, 8, LENGTH, LENGTH), ("data", "model"), set()),
        ((BATCH, 1, LENGTH, LENGTH), ("data",), {"all-reduce"}),
        ((1, 8, LENGTH, LENGTH), (None, "model"), {"all-reduce"}),
        ((1, 1, LENGTH, LENGTH), (), {"all-reduce"}),
    ],
    ids=["batch-and-heads", "batch", "heads", "neither"],
)
@both_passes
def test_bias_over_four_devices(compile_h200, shape, spec, collectives, backward):
    """Only the gradient of a bias that several devices share is a sum over them."""
    sharded = ("data", None, "model")
    arrays = [*operands(8, 4, sharded, sharded), Operand(shape, "float32", spec)]
    mesh = {"data": 2, "model": 2}
    compiled = compile_h200(gradients if backward else outputs, arrays, mesh)
    check_local(compiled, (BATCH // 2, LENGTH, 4, HEAD_DIM), collectives if backward else ())


def test_collectives_are_seen(compile_h200):
    """Positive controls: plain attention over a sharded sequence gathers, and so do our own custom
    calls over a sharded batch where no partitioning rule stands above them."""
    by_sequence = operands(4, 4, (None, "x"), (None, "x"))
    plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    assert "all-gather" in compile_h200(plain, by_sequence, FOUR).collectives()
    by_batch = operands(4, 4, BY_BATCH, BY_BATCH)
    assert "all-gather" in compile_h200(unpartitioned, by_batch, FOUR).collectives()


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim"),
    [(2, 128, 4, 64), (3, 129, 2, 64), (1, 31, 5, 40), (2, 200, 6, 96), (2, 200, 6, 128),
     (1, 97, 2, 136), (1, 97, 2, 192), (2, 64, 2, 256), (2, 65, 2, 200), (1, 4097, 1, 64),
     (1, 1030, 1, 128), (1, 2000, 1, 128)],
)  # fmt: skip
def test_scratch_is_the_documented_formula(
    compile_h200, batch, length, heads, head_dim, deterministic
):
    built = _ffi.extension.build_info()["head_dims"]
    if head_dim > max(built):
        pytest.skip(f"this build has kernels for head dims up to {max(built)}")
    arrays = operands(heads, heads, batch=batch, length=length, head_dim=head_dim)
    compiled = compile_h200(functools.partial(gradients, deterministic=deterministic), arrays)
    name, shapes = compiled.results(BACKWARD)
    dim = next(d for d in built if d >= head_dim)
    needed = scratch_bytes(batch, length, heads, dim, deterministic)
    assert shapes[-1] == f"f32[{needed // 4}]"
    assert compiled.buffer_bytes(name, len(shapes) - 1) == needed


@pytest.mark.parametrize("deterministic", [False, True])
def test_peak_is_operands_results_and_scratch(compile_h200, deterministic):
    """And for the reference it is not, which shows that the score matrix would be seen."""
    sizes = dict(batch=2, length=1024, head_dim=64)
    arrays = operands(4, 4, **sizes)
    arrays.append(arrays[0])  # d_out
    function = functools.partial(forward_and_backward, deterministic=deterministic)
    compiled = compile_h200(function, arrays)
    tensor = 2 * math.prod(arrays[0].shape)
    assert compiled.argument_bytes == 4 * tensor
    assert compiled.output_bytes >= 4 * tensor
    scratch = scratch_bytes(sizes["batch"], sizes["length"], 4, sizes["head_dim"], deterministic)
    allowed = compiled.argument_bytes + compiled.output_bytes + scratch + MIB
    assert allowed - 2 * MIB < compiled.peak_bytes <= allowed
    reference = compile_h200(functools.partial(function, implementation="xla"), arrays)
    assert reference.peak_bytes > allowed
