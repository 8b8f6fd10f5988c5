"""Builds the package's kernels for the CPU emulator and calls them on numpy arrays."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable

import numpy as np

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
PRELUDE = HERE / "include" / "prelude.h"
MACHINE = HERE / "machine.cc"
FLAGS = (
    "-O1",  # more takes longer to compile than it saves: what runs most is the machine
    "-march=native",
    "-fno-strict-aliasing",
    "-std=c++17",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fPIC",
    "-pthread",
)
MACHINE_FLAGS = ("-O2", "-ftree-vectorize")
INPUT, OUTPUT, SCRATCH = range(3)


class FaultError(AssertionError):
    """A kernel did what no kernel may: the message says which thread, where and what."""


class BuildError(Exception):
    """The compiler refused the emulator or a kernel."""


def cuda_include() -> list[pathlib.Path]:
    """Folders with cuda_bf16.h and what it includes, of the toolkit or of NVIDIA's wheels."""
    candidates = []
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if compiler:
        # A wrapper's own place says nothing; asked what it would run, nvcc names its toolkit.
        said = subprocess.run(
            [compiler, "--dryrun", "-c", "x.cu"], capture_output=True, text=True
        ).stderr
        candidates += [
            pathlib.Path(top.strip()) / "include" for top in re.findall(r"#\$ TOP=(.*)", said)
        ]
    candidates += [
        pathlib.Path(os.environ[v]) / "include"
        for v in ("CUDA_HOME", "CUDA_PATH")
        if v in os.environ
    ]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        candidates += sorted(pathlib.Path(folder).glob("cu*/include"))
    candidates.append(pathlib.Path("/usr/local/cuda/include"))
    for folder in candidates:
        if (folder / "cuda_bf16.h").is_file() and (folder / "vector_types.h").is_file():
            return [
                folder.resolve(),
                *([(folder / "cccl").resolve()] if (folder / "cccl").is_dir() else []),
            ]
    return []


def why_unavailable() -> str:
    """Why nothing can be emulated on this machine; empty when it can."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "the emulator needs g++ (or a compiler named by CXX)"
    return (
        ""
        if cuda_include()
        else "the emulator needs CUDA's headers: set CUDA_HOME, or install nvidia-cuda-runtime"
    )


@functools.cache
def build(
    source: str,
    *flags: str,
    defines: tuple[str, ...] = (),
    edits: tuple[tuple[str, str, str], ...] = (),
) -> ctypes.CDLL:
    """Compiles one file of this folder into a library, once for each content of the sources.

    Args:
      source: the file, such as "kernels.cc".
      flags: more compiler flags.
      defines: "NAME=value" of macros that no header of the emulator looks at.
      edits: (file below csrc, old text, new text): build a mutant; the old text must occur.
    """
    key = (source, flags, defines, edits)
    library = _cache() / f"{pathlib.Path(source).stem}_{_digest(key, HERE, CSRC)}.so"

    def compile_into(folder: pathlib.Path) -> None:
        csrc = CSRC
        if edits:
            csrc = folder / "csrc"
            shutil.copytree(CSRC, csrc)
        for name, old, new in edits:
            content = (csrc / name).read_text()
            if old not in content:
                raise ValueError(f"{name} does not contain {old!r}")
            (csrc / name).write_text(content.replace(old, new))
        command = [*_compiler(flags), *(f"-D{define}" for define in defines)]
        command += ["-I", str(csrc), "-include", str(_precompiled(flags))]
        command += ["-shared", "-Wl,-Bsymbolic", str(HERE / source), str(_machine(flags))]
        _run([*command, "-o", str(folder / library.name)])

    make_once(library, compile_into)
    loaded = ctypes.CDLL(str(library))
    loaded.memory_create.restype = ctypes.c_void_p
    loaded.memory_allocate.restype = ctypes.c_void_p
    return loaded


def _precompiled(flags: tuple[str, ...]) -> pathlib.Path:
    """prelude.h beside what the compiler made of it: most of what parsing a library would take."""
    header = _cache() / f"prelude_{_digest(flags, HERE)}.h"

    def compile_into(folder: pathlib.Path) -> None:
        made = header.with_name(f"{header.name}.gch")
        command = [*_compiler(flags), "-x", "c++-header", str(PRELUDE)]
        _run([*command, "-o", str(folder / made.name)])
        (folder / made.name).replace(made)
        (folder / header.name).write_text(f'#include "{PRELUDE}"\n')  # for a compiler without

    make_once(header, compile_into)
    return header


def _machine(flags: tuple[str, ...]) -> pathlib.Path:
    """What machine.cc becomes; the same for libraries that differ in how they are optimised."""
    flags = (*(flag for flag in flags if not flag.startswith("-O")), *MACHINE_FLAGS)
    machine = _cache() / f"machine_{_digest(flags, HERE)}.o"

    def compile_into(folder: pathlib.Path) -> None:
        _run([*_compiler(flags), "-c", str(MACHINE), "-o", str(folder / machine.name)])

    make_once(machine, compile_into)
    return machine


def _compiler(flags: tuple[str, ...]) -> list[str]:
    """The command but for csrc: models and CUDA's headers come before it."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *flags]
    for include in (HERE / "include", HERE):
        command += ["-I", str(include)]
    for include in cuda_include():
        command += ["-isystem", str(include)]
    return command


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def _cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
    cache = pathlib.Path(root) / "jax_flashattn_emulator"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@functools.cache
def _digest(key: tuple, *folders: pathlib.Path) -> str:
    """Of all that a compilation depends on: what it is told, the compiler, the CPU, the sources."""
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout
    digest = hashlib.sha256(repr((key, cuda_include(), FLAGS, compiler, version)).encode())
    cpu = pathlib.Path("/proc/cpuinfo")  # -march=native, and a cache may be shared by machines
    if cpu.is_file():
        features = re.search(rb"^(?:flags|Features).*$", cpu.read_bytes(), re.MULTILINE)
        digest.update(features[0] if features else b"")
    sources = [file for folder in folders for file in folder.rglob("*.*")]
    for file in sorted(f for f in sources if f.suffix in {".h", ".cuh", ".cc"}):
        digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()[:20]


def make_once(file: pathlib.Path, make_into: Callable[[pathlib.Path], None]) -> None:
    """Has make_into(folder) make a file of this name; processes that want the same wait for it."""
    if file.exists():
        return
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                make_into(pathlib.Path(folder))
                (pathlib.Path(folder) / file.name).replace(file)


_COUNTERS = (
    "switches", "products", "matrices", "matrix_wavefronts",
    "warpgroup_products", "tma_bytes", "proxy_fences",
)  # fmt: skip


class Session(ctypes.Structure):
    """Mirror of Session in api.h."""

    _fields_ = [("seed", ctypes.c_uint64)]
    _fields_ += [(n, ctypes.c_int64) for n in ("host_threads", "multiprocessors", "together")]
    _fields_ += [(n, ctypes.c_uint64) for n in _COUNTERS]
    _fields_ += [("fault", ctypes.c_char * 4096)]

    def add(self, other):
        """Adds another session's counters."""
        for name in _COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Device(contextlib.AbstractContextManager):
    """Arrays registered as a device's memory, and calls on them.

    Args:
      library: from build().
      seed: decides which thread runs next.
      host_threads: clusters that run at once.
      multiprocessors: how many the device says it has; persistent kernels launch as many blocks.
      together: blocks of a small grid take turns, as those of a cluster do, instead of running one
        after another.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        seed: int = 1,
        host_threads: int = 2,
        multiprocessors: int = 3,
        together: bool = False,
    ):
        self.library = library
        self.session = Session(
            seed=seed,
            host_threads=host_threads,
            multiprocessors=multiprocessors,
            together=together,
        )
        self._memory = ctypes.c_void_p(library.memory_create())
        self._arrays: list[np.ndarray] = []  # kept alive

    def __exit__(self, *_):
        self.library.memory_destroy(self._memory)

    def input(self, name: str, array: np.ndarray | None) -> ctypes.c_void_p:
        """Registers what kernels may read; None is a null pointer."""
        return self._register(name, None if array is None else np.ascontiguousarray(array), INPUT)

    def output(self, name: str, array: np.ndarray | None, scratch: bool = False) -> ctypes.c_void_p:
        """Registers what kernels may write, and must write in full unless it is scratch."""
        return self._register(name, array, SCRATCH if scratch else OUTPUT)

    def call(self, function: str, *arguments) -> None:
        """Runs an entry point of the library; FaultError if a kernel misbehaved or left a hole."""
        getattr(self.library, function)(ctypes.byref(self.session), self._memory, *arguments)
        if not self.session.fault:
            self.library.memory_check_outputs(self._memory, ctypes.byref(self.session))
        if self.session.fault:
            raise FaultError(f"{self.session.fault.decode()} (seed {self.session.seed})")

    def _register(self, name: str, array: np.ndarray | None, kind: int) -> ctypes.c_void_p:
        if array is None:
            return ctypes.c_void_p(None)
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous")
        self._arrays.append(array)
        host = ctypes.c_void_p(array.ctypes.data)
        size = ctypes.c_uint64(array.nbytes)
        return ctypes.c_void_p(
            self.library.memory_allocate(self._memory, name.encode(), host, size, kind)
        )
