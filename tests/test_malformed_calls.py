"""Calls straight at the FFI handlers, as a deserialised program makes them: each wrong one is
refused by name, and the process goes on. What Python refuses before is in test_options.py.
"""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits
from ffi_calls import RawCall
from ways import ALONE_ON_THE_GPU

from jax_flashattn import _ffi, attention

pytestmark = pytest.mark.gpu
INVALID, UNIMPLEMENTED = "INVALID_ARGUMENT", "UNIMPLEMENTED"
HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def canary():
    """A right call, whose first result the reference confirms; canary() is to repeat it."""
    raw = RawCall()
    call = raw.compile()

    def program():  # without scratch, which holds anything
        results = call()
        return {name: results[name] for name in ("out", "lse")}

    first = program()
    operands = [raw.arrays[name] for name in ("query", "key", "value")]
    desired = attention(*operands, implementation="xla")
    np.testing.assert_allclose(np.float32(first["out"]), np.float32(desired), atol=1e-2, rtol=2e-2)
    return lambda: assert_same_bits(program(), first)


def array(name, *shape, dtype="bfloat16"):
    """A change of one operand."""
    return lambda raw: raw.arrays.update({name: jnp.zeros(shape, dtype)})


def cast(name, dtype):
    return lambda raw: raw.arrays.update({name: raw.arrays[name].astype(dtype)})


def result(name, *shape, dtype="bfloat16"):
    return lambda raw: raw.results.update({name: jax.ShapeDtypeStruct(shape, dtype)})


def attribute(name, value):
    return lambda raw: raw.attributes.update({name: value})


def without(name):
    return lambda raw: raw.arrays.pop(name)


def one_float_less(raw):
    (floats,) = raw.results["scratch"].shape
    result("scratch", floats - 1, dtype="float32")(raw)


def head_dim(dim):
    def change(raw):
        for name, heads in (("query", 4), ("key", 2), ("value", 2)):
            array(name, 2, 70, heads, dim)(raw)
        result("out", 2, 70, 4, dim)(raw)

    return change


def key_heads(heads):
    def change(raw):
        array("key", 2, 70, heads, 64)(raw)
        array("value", 2, 70, heads, 64)(raw)

    return change


FORWARD = [  # what is changed, the status, what the message says
    (array("query", 70, 4, 64), INVALID, "query, key and value must have rank 4"),
    (array("key", 1, 2, 70, 2, 64), INVALID, "query, key and value must have rank 4"),
    (cast("query", "float32"), INVALID, "query must be float16 or bfloat16"),
    (cast("key", "float16"), INVALID, "key has an element type"),
    (array("value", 3, 70, 2, 64), INVALID, "value has shape [3,70,2,64], expected [2,70,2,64]"),
    (array("key", 2, 71, 2, 64), INVALID, "value has shape [2,70,2,64], expected [2,71,2,64]"),
    (array("key", 2, 70, 2, 32), INVALID, "key has shape [2,70,2,32], expected [2,70,2,64]"),
    (key_heads(3), INVALID, "4 query heads are no multiple of 3 key heads"),
    (key_heads(0), INVALID, "4 query heads are no multiple of 0 key heads"),
    (head_dim(20), INVALID, "head dims must be positive multiples of 8"),
    (head_dim(264), UNIMPLEMENTED, "head dim and value dim is 264"),
    (result("out", 2, 69, 4, 64), INVALID, "out has shape [2,69,4,64], expected [2,70,4,64]"),
    (result("out", 2, 70, 4, 64, dtype="float32"), INVALID, "out has an element type"),
    (result("lse", 2, 70, 4, dtype="float32"), INVALID, "lse has shape [2,70,4], expected"),
    (result("lse", 2, 4, 70), INVALID, "lse has an element type"),
    (array("scale", 3, dtype="float32"), INVALID, "scale must have 1 or batch elements"),
    (array("scale", 1, dtype="float16"), INVALID, "scale has an element type"),
    (array("scale", 2, 1, dtype="float32"), INVALID, "scale has shape [2,1], expected [2]"),
    (array("bias", 1, 4, 70, 71), INVALID, "[1,4,70,71], which does not broadcast to [2,4,70,70]"),
    (array("bias", 4, 70, 70), INVALID, "bias has shape [4,70,70], which does not broadcast"),
    (array("bias", 1, 4, 70, 70, dtype=bool), INVALID, "bias must not be bool"),
    (array("bias", 1, 4, 70, 70, dtype="int32"), INVALID, "bias must be float16"),
    (array("mask", 1, 4, 70, 70), INVALID, "mask must be bool"),
    (array("mask", 2, 3, 70, 70, dtype=bool), INVALID, "mask has shape [2,3,70,70], which does"),
    (
        array("q_lengths", 3, dtype="int32"),
        INVALID,
        "query_seq_lengths has shape [3], expected [2]",
    ),
    (array("q_lengths", 2, dtype="float32"), INVALID, "query_seq_lengths has an element type"),
    (array("k_lengths", 1, dtype="int32"), INVALID, "key_value_seq_lengths has shape [1]"),
    (array("alibi_slopes", 3, dtype="float32"), INVALID, "alibi_slopes has shape [3], expected"),
    (array("alibi_slopes", 3, 4, dtype="float32"), INVALID, "expected [2,4]"),
    (array("alibi_slopes", dtype="float32"), INVALID, "alibi_slopes has shape [], expected [2,4]"),
    (array("sinks", 1, 4, dtype="float16"), INVALID, "sinks has an element type"),
    (array("dropout_seeds", 2, 4, 2, dtype="uint32"), INVALID, "dropout must be below 2^16"),
    (array("q_segments", 2, 70, dtype="int32"), INVALID, "must be given together"),
    (array("k_segments", 2, 71, dtype="int32"), INVALID, "expected [2,70]"),
    (array("spans", 2, 3, dtype="int32"), INVALID, "spans has shape [2,3]"),
    (array("cu_q", 3, dtype="int32"), INVALID, "cu_seqlens_q must be [batch, sequences + 1]"),
    (array("cu_q", 2, 3, dtype="int32"), INVALID, "must be given together"),
    (attribute("soft_cap", np.float32(-1)), INVALID, "a soft cap must be finite and not negative"),
    (attribute("soft_cap", np.float32("inf")), INVALID, "a soft cap must be finite"),
    (attribute("num_sink_tokens", np.int32(-1)), INVALID, "num_sink_tokens must not be negative"),
    (attribute("window_left", np.int32(-1)), INVALID, "a window must not be negative"),
    (attribute("window_right", np.int32(-(2**31))), INVALID, "a window must not be negative"),
    (attribute("family", "sm1"), UNIMPLEMENTED, "no kernel family 'sm1'"),
    (attribute("window_left", np.int64(5)), INVALID, ""),  # the last two in XLA's own words
    (without("k_lengths"), INVALID, ""),
]
FORWARD += [
    (result("scratch", 0, dtype="float32"), INVALID, "scratch has 0 floats; this call needs 1"),
    (result("scratch", 1, dtype="int32"), INVALID, "scratch has an element type"),
]
BACKWARD = [
    (array("d_out", 2, 70, 4, 32), INVALID, "d_out has shape [2,70,4,32], expected [2,70,4,64]"),
    (cast("d_out", "float32"), INVALID, "d_out has an element type"),
    (array("d_lse", 2, 4, 69, dtype="float32"), INVALID, "d_lse has shape [2,4,69], expected"),
    (array("out", 2, 70, 4, 32), INVALID, "out has shape [2,70,4,32], expected [2,70,4,64]"),
    (array("lse", 2, 4, 70, dtype="float16"), INVALID, "lse has an element type"),
    (result("d_query", 2, 70, 4, 64, dtype="float32"), INVALID, "d_query has an element type"),
    (result("d_key", 2, 70, 4, 64), INVALID, "d_key has shape [2,70,4,64], expected [2,70,2,64]"),
    (result("d_value", 2, 71, 2, 64), INVALID, "d_value has shape [2,71,2,64], expected"),
    (result("d_bias", 1, 4, 70, 70, dtype="float32"), INVALID, "d_bias must be float32 of the"),
    (result("scratch", 10, dtype="float32"), INVALID, "scratch has 10 floats; this call needs"),
    (one_float_less, INVALID, "floats; this call needs"),
    (result("scratch", 10**6, 1, dtype="float32"), INVALID, "scratch has shape [1000000,1]"),
    (result("scratch", 10**6, dtype="int32"), INVALID, "scratch has an element type"),
    (attribute("window_left", np.int32(-1)), INVALID, "a window must not be negative"),
    (attribute("family", "sm1"), UNIMPLEMENTED, "no kernel family 'sm1'"),
    (attribute("deterministic", np.float32(1)), INVALID, ""),
]


CASES = {"forward": FORWARD, "backward": BACKWARD}


@pytest.mark.parametrize(
    ("backward", "change", "status", "fragment"),
    [(name == "backward", *case) for name in CASES for case in CASES[name]],
    ids=[f"{name}-{n}" for name in CASES for n in range(len(CASES[name]))],
)
def test_malformed_call(canary, backward, change, status, fragment):
    raw = RawCall(backward)
    change(raw)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        raw.run()
    message = str(caught.value)
    assert status in message
    assert fragment in message
    canary()


def test_well_formed_calls(canary):
    """What the deformed ones are made of is right: nothing of it is refused."""
    RawCall(True).run()
    RawCall(True, deterministic=True).run()
    RawCall(True, bias=(1, 4, 70, 70)).run()
    canary()


@pytest.mark.parametrize("family", ["sm80", "sm90"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_well_formed_gradients_of_a_family(canary, family, deterministic):
    """Of every compiled head dim, in the same scratch."""
    if family == "sm90" and jax.devices()[0].compute_capability != "9.0":
        pytest.skip("no other GPU has this family")
    for dim in _ffi.extension.build_info()["head_dims"]:
        raw = RawCall(True, (2, 70, 4, dim), deterministic=deterministic)
        raw.attributes["family"] = family
        results = raw.run()
        for name in ("d_query", "d_key", "d_value"):
            gradient = np.float32(results[name])
            assert np.isfinite(gradient).all(), name
            assert gradient.any(), name
        canary()


@pytest.mark.parametrize("shape", [(0, 70, 4, 64), (2, 0, 4, 64)], ids=str)
def test_empty_query(canary, shape):
    """Python does not call the handlers with empty arrays; an exported program might."""
    results = RawCall(shape=shape).run()
    assert results["out"].shape == shape
    canary()


def test_empty_key():
    raw = RawCall()
    array("key", 2, 0, 2, 64)(raw)
    array("value", 2, 0, 2, 64)(raw)
    results = raw.run()
    assert not results["out"].any()
    assert np.isneginf(results["lse"]).all()


@ALONE_ON_THE_GPU
def test_grid_too_large(canary):
    """2^31 rows of one query each: one block more than a launch can have."""
    limit = jax.devices()[0].memory_stats()["bytes_limit"]
    if limit < 80 * 2**30:
        pytest.skip(f"needs 80 GiB of device memory, jax may use {limit / 2**30:.0f}")
    raw = RawCall()
    raw.attributes["family"] = "sm80"  # sm90 has persistent blocks
    batch, heads = 2**17, 2**14
    array("query", batch, 1, heads, 8)(raw)
    array("key", batch, 1, 1, 8)(raw)
    array("value", batch, 1, 1, 8)(raw)
    result("out", batch, 1, heads, 8)(raw)
    result("lse", batch, heads, 1, dtype="float32")(raw)
    with pytest.raises(jax.errors.JaxRuntimeError, match="at most 2147483647 blocks") as caught:
        raw.run()
    assert UNIMPLEMENTED in str(caught.value)
    canary()


def test_misaligned_pointer(canary):
    """A view one element into another library's array: refused, by XLA or by us, never read."""
    with warnings.catch_warnings(action="ignore"):  # PyTorch's own affair
        torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    raw = RawCall()
    shape = raw.arrays["query"].shape
    tensor = torch.zeros(int(np.prod(shape)) + 1, dtype=torch.bfloat16, device="cuda")
    raw.arrays["query"] = query = jax.dlpack.from_dlpack(tensor[1:].view(shape))
    if query.unsafe_buffer_pointer() % 16 == 0:
        pytest.skip("jax copied the view to an aligned place")
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"aligned to 16 bytes|must be a multiple"):
        raw.run()
    canary()


@ALONE_ON_THE_GPU
def test_launch_that_fails(canary):
    """No memory is left for the code of a kernel that was never launched: the launch fails, with
    the kernel named, the process lives on, and the next calls are right.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05",
        "CUDA_MODULE_LOADING": "LAZY",
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
    }
    command = [sys.executable, "-P", "-c", "import ffi_calls; ffi_calls.kernels_without_memory()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all others ran afterwards" in done.stdout
    canary()
    ours = [x for x in done.stdout.splitlines() if "jax_flashattn" in x and "cudaError" in x]
    if not ours:
        pytest.skip(f"the driver found memory for every kernel: {done.stdout[-300:]}")
    assert all(" with grid " in x or "clearing the counter" in x for x in ours)
