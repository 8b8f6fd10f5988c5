"""The FFI handlers called directly, as an exported program does: past all of Python's checks."""

import ctypes

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import _ffi, attention
from jax_flashattn._options import Operands, Options

ABSENT = {"bias": "f4", "mask": "?", "scale": "f4", "q_lengths": "i4", "k_lengths": "i4"}
ABSENT |= {"alibi_slopes": "f4", "sinks": "f4", "dropout_seeds": "u4"}
ABSENT |= dict.fromkeys(("q_segments", "k_segments", "spans", "cu_q", "cu_k"), "i4")
FORWARD = ("query", "key", "value", *ABSENT)
BACKWARD = (*FORWARD, "out", "lse", "d_out", "d_lse")
FORWARD_RESULTS = ("out", "lse")
BACKWARD_RESULTS = ("d_query", "d_key", "d_value", "d_bias", "scratch")


class RawCall:
    """A well-formed call that a test may then deform: its arrays, results and attributes by name.

    `arrays` are those of BACKWARD for a backward, else of FORWARD, jax arrays on the default
    device; `results` are ShapeDtypeStructs; `attributes` have XLA FFI's exact types.
    """

    def __init__(self, backward=False, shape=(2, 70, 4, 64), kv_heads=2, dtype="bfloat16",
                 bias=None, deterministic=False):  # fmt: skip
        batch, length, heads, head_dim = shape
        rng = np.random.default_rng(0)

        def normal(*extents):
            return jnp.asarray(rng.standard_normal(extents, np.float32), dtype)

        key_shape = (batch, length, kv_heads, head_dim)
        self.backward = backward
        self.arrays = {"query": normal(*shape), "key": normal(*key_shape)}
        self.arrays["value"] = normal(*key_shape)
        self.arrays |= {name: jnp.zeros((0,), kind) for name, kind in ABSENT.items()}
        if bias is not None:
            self.arrays["bias"] = jnp.asarray(rng.standard_normal(bias, np.float32))
        row_shape = (batch, heads, length)
        rows, like = jax.ShapeDtypeStruct(row_shape, "float32"), jax.ShapeDtypeStruct
        self.results = {"out": like(shape, dtype), "lse": rows}
        options = Options(
            scale=head_dim**-0.5, deterministic=deterministic, bias_gradient=bias is not None
        )
        if backward:
            self.arrays |= {"out": normal(*shape), "lse": jnp.full(row_shape, 5.0)}
            self.arrays |= {"d_out": normal(*shape), "d_lse": jnp.zeros((0,))}
            named = {"query": "d_query", "key": "d_key", "value": "d_value"}
            self.results = {d: like(self.arrays[n].shape, dtype) for n, d in named.items()}
            self.results["d_bias"] = like(bias or (0,), "float32")
        operands = Operands(*(self.arrays[n] for n in FORWARD[:3]))
        if bias is not None:
            operands = operands._replace(bias=self.arrays["bias"])
        floats = 1  # what plan() says of every forward that is not empty
        if backward or 0 not in shape:
            floats = _ffi.plan(operands, options, backward=backward).scratch_floats
        self.results["scratch"] = like((floats,), "float32")
        self.attributes = _ffi.attributes(options, backward=backward)

    def compile(self):
        """A compiled program that holds nothing but the custom call."""
        names = BACKWARD if self.backward else FORWARD
        target = _ffi.BACKWARD_TARGET if self.backward else _ffi.FORWARD_TARGET
        arrays = [self.arrays[name] for name in names if name in self.arrays]
        call = jax.ffi.ffi_call(target, list(self.results.values()))
        compiled = jax.jit(lambda *a: call(*a, **self.attributes)).lower(*arrays).compile()
        return lambda: dict(zip(self.results, jax.block_until_ready(compiled(*arrays))))

    def run(self):
        return self.compile()()


class FullDevice:
    """While it is open, the device has no free memory but what jax has already taken."""

    def __enter__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        context, self.held = ctypes.c_void_p(), []
        device = ctypes.c_int()
        self._check(self.cuda.cuDeviceGet(ctypes.byref(device), 0))
        self._check(self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        self._check(self.cuda.cuCtxSetCurrent(context))
        size = 2**36
        while size >= 2**12:
            pointer = ctypes.c_uint64()
            if self.cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)):
                size //= 2
            else:
                self.held.append(pointer)
        return self

    def __exit__(self, *_):
        for pointer in self.held:
            self._check(self.cuda.cuMemFree_v2(pointer))

    @staticmethod
    def _check(status):
        if status:
            raise RuntimeError(f"the CUDA driver said {status}")


def kernels_without_memory():
    """Launches kernels for the first time when no memory is left to load their code.

    Run in a process of its own: CUDA remembers that a kernel could not be loaded. Prints what jax
    raised first, then runs the kernels that were not tried, and raises if one fails or is wrong.
    """
    programs = {}
    for head_dim in _ffi.extension.build_info()["head_dims"]:
        for backward in (False, True):
            raw = RawCall(backward, (2, 70, 4, head_dim))
            programs[head_dim, backward] = raw, raw.compile()
    tried = set()
    with FullDevice():
        for key, (_, program) in programs.items():
            tried.add(key)
            try:
                jax.block_until_ready(program())
            except jax.errors.JaxRuntimeError as error:
                print(f"failure: {error}")
                break
    for key in programs.keys() - tried:
        raw, program = programs[key]
        results = program()
        if not raw.backward:
            operands = [raw.arrays[name] for name in FORWARD[:3]]
            desired = attention(*operands, implementation="xla")
            np.testing.assert_allclose(
                np.float32(results["out"]), np.float32(desired), atol=2e-2, rtol=2e-2
            )
    print("all others ran afterwards")
