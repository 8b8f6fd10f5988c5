"""What goes wrong around the kernels: installations, versions, caches, threads, NaN."""

import concurrent.futures
import functools
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from compare import assert_same_bits, needs_kernels

from jax_flashattn import _ffi, attention
from jax_flashattn._options import Operands, Options

PACKAGE = pathlib.Path(_ffi.__file__).parent
# An editable installation has a finder of its own, before the path.
FROM_PATH = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
"""


def python(script, *flags, path, **environment):
    """Runs a script in another Python that finds modules in `path`; its return code and output."""
    environment = os.environ | {"PYTHONPATH": str(path)} | environment
    command = [sys.executable, *flags, "-c", FROM_PATH + script]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=path, timeout=250
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def package_copy(tmp_path):
    """A folder with the package as JFA_CUDA=OFF installs it."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=without)
    return tmp_path


def test_package_without_kernels_under_python_o(package_copy):
    """Imports, computes, and its checks, being no asserts, still raise."""
    script = """
assert False  # vanishes: this is python -O
import jax.numpy as jnp, jax_flashattn
from jax_flashattn import _ffi
print("extension:", _ffi.extension, "from", _ffi.__file__)
x = jnp.arange(48.0).reshape(1, 3, 2, 8) / 48
print("sum:", float(jax_flashattn.attention(x, x, x, is_causal=True)[0, 0].sum() - x[0, 0].sum()))
for bad in ({"local_window_size": -1}, {"scale": 0.0}, {"implementation": "cuda"}):
    try:
        jax_flashattn.attention(x, x, x, **bad)
    except (ValueError, NotImplementedError) as error:
        print("raised", type(error).__name__, error)
"""
    code, text = python(script, "-O", path=package_copy, JAX_PLATFORMS="cpu")
    assert code == 0, text
    assert f"extension: None from {package_copy}" in text
    assert "sum: 0.0" in text
    assert text.count("raised ValueError") == 2
    assert "raised NotImplementedError" in text


def test_extension_that_is_no_library(package_copy):
    (package_copy / PACKAGE.name / "_ext.abi3.so").write_bytes(b"not ELF")
    code, text = python("import jax_flashattn", path=package_copy, JAX_PLATFORMS="cpu")
    assert code == 1
    assert "ImportError: jax_flashattn is built with CUDA kernels" in text
    assert "_ext does not load" in text
    assert "Reinstall" in text


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(source) is _ffi.load() of a module with this source instead of the extension."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"stand_in_{abs(hash(str(tmp_path)))}"

    def load(source):
        (tmp_path / f"{name}.py").write_text(source)
        return _ffi.load(name)

    yield load
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise OSError('libcudart.so.99: cannot open shared object file')", "libcudart.so.99"),
        ("import module_that_is_not_there", "module_that_is_not_there"),
        ("raise ImportError('undefined symbol: x')", "undefined symbol: x"),
    ],
)
def test_extension_that_does_not_load(load, source, reason):
    with pytest.raises(ImportError, match=r"does not load.*Reinstall") as caught:
        load(source)
    assert reason in str(caught.value)


def test_extension_that_is_absent():
    assert _ffi.load("jax_flashattn._not_there") is None


@pytest.mark.parametrize(("major", "minor", "taken"), [
    (0, 0, True), (0, -1, True), (0, 1, False), (1, -1, False), (-1, 9, False),
])  # fmt: skip
def test_ffi_version(load, major, minor, taken):
    """Refused, before anything is registered, unless of the runtime's major and not newer."""
    runtime = _ffi.runtime_ffi_version()
    built = runtime[0] + major, runtime[1] + minor
    source = f"xla_ffi_api_version = {built}\nasked = []\n"
    source += "def handlers():\n    asked.append(1)\n    return {}\n"
    if taken:
        assert load(source).asked == [1]
        return
    source = source.replace("asked.append(1)", "raise AssertionError('asked for handlers')")
    with pytest.raises(ImportError, match="Upgrade jaxlib") as caught:
        load(source)
    assert all(f"{x[0]}.{x[1]}" in str(caught.value) for x in (built, runtime))


def test_ffi_version_that_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match="cannot read the XLA FFI API version"):
        _ffi.runtime_ffi_version()


@needs_kernels
def test_loading_twice_registers_twice():
    assert _ffi.load() is _ffi.extension


@needs_kernels
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"family": "sm1"}, "no kernel family 'sm1'"),
        ({"head_dim": 264}, "head dim and value dim is 264"),
        ({"q_len": 2**30}, "longer than"),
        ({"shared_memory_bytes": 1024}, "bytes of shared memory"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backward", [False, True])
def test_plans_that_are_refused(change, reason, backward):
    call = dict(
        backward=backward, batch=1, q_len=8, k_len=8, heads=2, kv_heads=1, head_dim=64,
        value_dim=64, bf16=True, mask=(), device_scale=False, bias=(),
        has_lengths=False, window_left=2**31 - 1,
        window_right=0, bias_gradient=False, deterministic=False, family="auto", soft_cap=False,
        num_sink_tokens=0, sequences=-1, **dict.fromkeys(_ffi.PRESENCE, False),
        **_ffi.Device()._asdict(),
    )  # fmt: skip
    assert _ffi.extension.plan(**call)["family"] == "sm90"
    older = call | {"compute_capability": 89}
    assert _ffi.extension.plan(**older)["family"] == "sm80"
    with pytest.raises(ValueError, match="the nearest family is sm80"):
        _ffi.extension.plan(**older | {"family": "sm90"})
    with pytest.raises(ValueError, match=reason):
        _ffi.extension.plan(**call | change)


@needs_kernels
def test_scratch_depends_on_how_many_sequences_are_packed():
    """An order of additions takes 8 bytes for each key tile of each head, one more a sequence."""

    def floats(sequences):
        array = jax.ShapeDtypeStruct((1, 2000, 2, 64), "bfloat16")
        bounds = jax.ShapeDtypeStruct((1, sequences + 1), "int32")
        operands = Operands(array, array, array, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        return _ffi.plan(operands, Options(deterministic=True), backward=True).scratch_floats

    assert floats(9) - floats(1) == 2 * 2 * 8
    (symbol,) = jax.export.symbolic_shape("n")
    with pytest.raises(NotImplementedError, match="concrete shapes"):
        floats(symbol)


PLATFORMS = ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("implementation", PLATFORMS)
def test_persistent_compilation_cache(tmp_path, implementation):
    """A second process takes the program from the cache and computes the same bits."""
    script = f"""
import hashlib, jax, numpy as np
from jax_flashattn import attention
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append("cache_hits" in name))
x = np.random.default_rng(0).standard_normal((1, 65, 2, 16)).astype(np.float16)
call = lambda *a: attention(*a, implementation={implementation!r}, deterministic=True)
results = jax.jit(lambda x: jax.vjp(call, x, x, x)[1](x))(x)
digest = hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest()
print("hits", sum(hits), "bits", digest)
"""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu" if implementation == "xla" else "cuda,cpu",
    }
    words = []
    for _ in range(2):
        code, text = python(script, path=PACKAGE.parent, **settings)
        assert code == 0, text
        words.append(text.split("hits ")[1].split())
    assert [int(x[0]) > 0 for x in words] == [False, True]
    assert words[0][2] == words[1][2]
    assert words[0][2] != ""


@pytest.mark.parametrize("implementation", PLATFORMS)
def test_32_threads_trace_compile_and_run(implementation):
    """Four new programs, each wanted by eight threads at once; then again in one thread."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(normal(rng, (2, 131, 2, 40), "bfloat16")) for _ in range(3)]
    device = next(iter(arrays[0].devices()))
    gradients = implementation == "cuda"  # compiling them for a CPU takes too long

    def program(**options):
        call = functools.partial(
            attention, implementation=implementation, deterministic=True, **options
        )
        return jax.jit(lambda *a: jax.vjp(call, *a)[1](a[0]) if gradients else [call(*a)])

    options = [{}, {"is_causal": True}, {"local_window_size": 9}, {"scale": 0.3}]
    programs = [program(**some) for some in options]

    def work(thread):
        with jax.default_device(device):  # a setting of each thread
            return [jax.block_until_ready(programs[thread % 4](*arrays)) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        results = list(pool.map(work, range(32)))
    alone = [work(thread)[0] for thread in range(4)]
    for thread, repeated in enumerate(results):
        for result in repeated:
            assert_same_bits(result, alone[thread % 4])
    assert (alone[0][0] != alone[1][0]).any()


@pytest.mark.parametrize("implementation", PLATFORMS)
def test_nan_query_row_stays_in_its_head_in_gradients(implementation):
    """d_query of that row alone; d_key and d_value of that batch entry and key head alone."""
    rng = np.random.default_rng(0)
    query, d_out = (normal(rng, (2, 130, 4, 32), "float16") for _ in range(2))
    key, value = (normal(rng, (2, 130, 2, 32), "float16") for _ in range(2))
    call = functools.partial(
        attention, is_causal=True, deterministic=True, implementation=implementation
    )
    gradients = jax.jit(lambda *a: jax.vjp(call, *a)[1](d_out))
    clean = [np.array(x) for x in gradients(query, key, value)]
    query[1, 7, 0, 3] = np.nan
    dirty = [np.array(x) for x in gradients(query, key, value)]
    for x, y, where in zip(dirty, clean, [(1, 7, 0), (1, slice(None), 0), (1, slice(None), 0)]):
        assert np.isnan(x[where]).any()
        x[where] = y[where]
        assert_same_bits(x, y)
