"""Compiles for an H200 on a machine without GPU, driver or CUDA toolkit. It cannot run the result.

jax's CUDA plugin has XLA's whole GPU compiler, and compiles for a topology that only a text
describes: device-specific passes, our FFI handlers, thunks, buffers and CUDA graphs are those of
the real machine. (XLA measures nothing here, so its own products are not tuned.)

The plugin's two wheels lie in a folder that JFA_CUDA_PLUGIN names, not in the environment, and only
a worker process sees it: every other test keeps a jax that knows no CUDA.

    pip install --no-deps --target FOLDER jax-cuda13-plugin==VERSION jax-cuda13-pjrt==VERSION

This module imports jax only inside the worker, which must choose its platform before.
"""

import concurrent.futures
import importlib.metadata
import math
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

VARIABLE = "JFA_CUDA_PLUGIN"
WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
COLLECTIVE = re.compile(
    r"= .* (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast|reduce-scatter|send|recv)(?:-start)?\("
)

# stream_executor::GpuTargetConfigProto. Limits from the CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability" (9.0); sizes and clocks from the H200's data
# sheet and what its driver reports.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  device_address_bits: 64
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
}
"""


class Operand(NamedTuple):
    """An argument of the compiled function; `spec` has the mesh axes of its leading dims."""

    shape: tuple
    dtype: str = "bfloat16"
    spec: tuple = ()


class Thunk(NamedTuple):
    """A step of the executable, such as kCustomCall, and what it is nested in, outermost first."""

    kind: str
    inside: tuple


class Compiled(NamedTuple):
    """What the compiler made for one device of the mesh."""

    hlo: str  # after all optimizations
    thunk_sequence: str
    buffer_assignment: str
    argument_bytes: int
    output_bytes: int
    peak_bytes: int  # arguments and outputs included

    def custom_calls(self) -> Counter:
        return Counter(re.findall(r'custom_call_target="([^"]*)"', self.hlo))

    def results(self, target: str) -> tuple:
        """(name of the instruction, shapes of its results) of the only custom call of `target`."""
        pattern = rf'%(\S+) = \((.*?)\) custom-call\(.*custom_call_target="{target}"'
        ((name, shapes),) = re.findall(pattern, self.hlo)
        return name, re.findall(r"\w+\[[\d,]*\]", shapes)

    def buffer_bytes(self, instruction: str, result: int) -> int:
        """Bytes that the buffer assignment gives one result of an instruction."""
        value = re.escape(f"{instruction}{{{result}}}")
        (size,) = re.findall(rf"<\d+ {value} @\d+> \(size=(\d+),", self.buffer_assignment)
        return int(size)

    def collectives(self) -> set:
        return set(COLLECTIVE.findall(self.hlo))

    def thunks(self) -> list:
        """Every thunk; the dump shows nesting by indentation."""
        found, open_thunks = [], []
        for indent, kind in re.findall(r"^( *)\d+: (k\w+)", self.thunk_sequence, re.MULTILINE):
            while open_thunks and open_thunks[-1][0] >= len(indent):
                open_thunks.pop()
            found.append(Thunk(kind, tuple(outer for _, outer in open_thunks)))
            open_thunks.append((len(indent), kind))
        return found


def plugin_folder(jaxlib_version: str) -> str | None:
    """The folder JFA_CUDA_PLUGIN names, None if it is unset. ValueError unless it has the wheels
    of just this jaxlib: a proof that was asked for is not skipped.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    found = {x.name: x.version for x in importlib.metadata.distributions(path=[folder])}
    found = {name.lower().replace("_", "-"): version for name, version in found.items()}
    if any(found.get(wheel) != jaxlib_version for wheel in WHEELS):
        needs = " and ".join(f"{wheel}=={jaxlib_version}" for wheel in WHEELS)
        raise ValueError(f"{VARIABLE}={folder} needs {needs}, and has {found or 'nothing'}")
    return str(Path(folder).resolve())


class Compiler:
    """A worker process with the plugin in `folder`. A context manager."""

    def __init__(self, folder: str):
        self._pool = concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_start, initargs=(folder,)
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown(cancel_futures=True)

    def __call__(
        self, function, operands: Sequence[Operand], mesh: dict | None = None, **options
    ) -> Compiled:
        """jax.jit(function) of these operands on a mesh {axis: size}; options are XLA's flags.

        `function` is pickled: it is one of a module's top level, or a functools.partial of it.
        """
        work = self._pool.submit(_compile, function, list(operands), mesh or {"x": 1}, options)
        return work.result(timeout=200)


def _start(folder: str) -> None:
    sys.path.insert(0, folder)
    os.environ["JAX_PLATFORMS"] = "cpu"  # otherwise the plugin would look for a driver
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what comes from there leaves no dumps
    os.environ.pop("XLA_FLAGS", None)
    warnings.simplefilter("error")


def _compile(function, operands: list, mesh: dict, options: dict) -> Compiled:
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology=f"1x1x{math.prod(mesh.values())}"
    )
    devices = topologies.make_mesh(topology, tuple(mesh.values()), tuple(mesh))

    def argument(x: Operand):
        sharding = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*x.spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    lowered = jax.jit(function).lower(*map(argument, operands))
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={**options, "xla_dump_to": folder})

        def dumped(*patterns):
            """The only file of the first pattern that there is."""
            found = next(filter(None, (list(Path(folder).glob(p)) for p in patterns)), [])
            (path,) = found
            return path.read_text()

        memory = compiled.memory_analysis()
        return Compiled(
            compiled.as_text(),
            # XLA writes the second sequence where its passes, such as command buffers, change any.
            dumped("*.thunk_sequence_after_thunk_passes.txt", "*.thunk_sequence.txt"),
            dumped("*-buffer-assignment.txt"),
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.peak_memory_in_bytes,
        )


def scratch_bytes(batch, length, heads, dim, deterministic):
    """Of a backward, 4 (B N (T + rows H') + 4): delta, dQ in float32, counters of work items.

    `dim`, H', is the compiled head dim, and rows T in whole tiles of the family with more. If
    deterministic, only Hopper kernels up to head dim 128 have that dQ, and with it eight bytes for
    each head's tile of keys.
    """
    short, wide = dim == 64 and length < 4096, dim > 128
    tiles = [] if deterministic else [32 if wide else 64]
    tiles += [] if wide else [128 if short else 64]
    rows = max((math.ceil(length / tile) * tile for tile in tiles), default=0)
    key_tiles = math.ceil(length / (192 if dim == 64 and not short else 128))
    order = math.ceil(batch * heads * key_tiles / 2) * 4 if deterministic and not wide else 0
    return 4 * (batch * heads * (length + rows * dim) + order + 4)
