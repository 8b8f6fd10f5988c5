"""Builds the package's kernels for the CPU emulator and calls them on numpy arrays."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-fno-strict-aliasing",
    "-std=c++17",
    "-Wall",
    "-Wno-unknown-pragmas",
)
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
def build(source: str, *flags: str, edits: tuple[tuple[str, str, str], ...] = ()) -> ctypes.CDLL:
    """Compiles one file of this folder into a library, once for each content of the sources.

    Args:
      source: the file, such as "kernels.cc".
      flags: more compiler flags.
      edits: (file below csrc, old text, new text): build a mutant; the old text must occur.
    """
    sources = []
    for folder in (HERE, CSRC):
        sources += [*folder.rglob("*.h"), *folder.rglob("*.cuh"), *folder.rglob("*.cc")]
    digest = hashlib.sha256(repr((flags, edits, cuda_include(), FLAGS)).encode())
    for file in sorted(sources):
        digest.update(str(file).encode() + file.read_bytes())
    cpu = pathlib.Path("/proc/cpuinfo")  # -march=native, and a cache may be shared by machines
    if cpu.is_file():
        features = re.search(rb"^(?:flags|Features).*$", cpu.read_bytes(), re.MULTILINE)
        digest.update(features[0] if features else b"")
    root = os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
    cache = pathlib.Path(root) / "jax_flashattn_emulator"
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"{pathlib.Path(source).stem}_{digest.hexdigest()[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            csrc = CSRC
            if edits:
                csrc = pathlib.Path(folder) / "csrc"
                shutil.copytree(CSRC, csrc)
            for name, old, new in edits:
                content = (csrc / name).read_text()
                if old not in content:
                    raise ValueError(f"{name} does not contain {old!r}")
                (csrc / name).write_text(content.replace(old, new))
            made = pathlib.Path(folder) / library.name
            command = [
                os.environ.get("CXX", "g++"),
                *FLAGS,
                *flags,
                "-shared",
                "-fPIC",
                "-pthread",
                "-Wl,-Bsymbolic",
            ]
            for include in (HERE / "include", HERE, csrc):
                command += ["-I", str(include)]
            for include in cuda_include():
                command += ["-isystem", str(include)]
            command += [
                "-include",
                str(HERE / "include" / "prelude.h"),
                str(HERE / source),
                "-o",
                str(made),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"{' '.join(command)}\n{done.stderr[-6000:]}")
            made.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.memory_create.restype = ctypes.c_void_p
    loaded.memory_allocate.restype = ctypes.c_void_p
    return loaded


_COUNTERS = (
    "switches", "products", "matrices", "matrix_wavefronts",
    "warpgroup_products", "tma_bytes", "proxy_fences",
)  # fmt: skip


class Session(ctypes.Structure):
    """Mirror of Session in api.h."""

    _fields_ = [("seed", ctypes.c_uint64)]
    _fields_ += [(n, ctypes.c_int64) for n in ("host_threads", "multiprocessors")]
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
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        seed: int = 1,
        host_threads: int = 2,
        multiprocessors: int = 3,
    ):
        self.library = library
        self.session = Session(
            seed=seed, host_threads=host_threads, multiprocessors=multiprocessors
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
