"""Rules of the house that a regular expression can keep, each shown to catch what it forbids."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = {".h", ".cc", ".cu", ".cuh", ".in", ".py"}
NOT_OURS = {".git", ".venv", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache"}
KERNEL_LINES, FILE_LINES = 420, 360


def repository_files():
    """What git tracks or would add; without git (an sdist) every file."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        paths = [ROOT / line for line in listed.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        paths = [p for p in ROOT.rglob("*") if not NOT_OURS & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def without_comments(text):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def function_like_macros(text):
    return re.findall(r"^\s*#\s*define\s+\w+\(.*", text, flags=re.MULTILINE)


def launches_without_stream(text):
    """`<<<grid, block, bytes>>>` would go to the default stream."""
    found = re.findall(r"<<<(.*?)>>>", without_comments(text), flags=re.DOTALL)
    return [arguments for arguments in found if _top_level_commas(arguments) < 3]


def _top_level_commas(text):
    depth = commas = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        commas += character == "," and depth == 0
    return commas


def forbidden_runtime_calls(text):
    """Calls that wait for the device, allocate on it, or change global state."""
    calls = (
        r"cuda(?:Device|Stream|Event)Synchronize|cudaMalloc\w*|cudaFree\w*|cudaHostAlloc"
        r"|cudaMemcpy(?!\w*Async)\w*|cudaMemset(?!\w*Async)\w*"
        r"|cudaDeviceSet\w+|cudaDeviceReset|cudaStreamCreate\w*"
    )
    return re.findall(rf"\b({calls})\s*\(", without_comments(text))


def foreign_includes(text):
    """CUTLASS, CuTe and PyTorch have no place here."""
    return re.findall(r'#\s*include\s*[<"](?:cute|cutlass|torch|ATen)/[^>"]+', text)


def architecture_templates(text):
    return re.findall(r"template\s*<[^>]*\bint\s+(?:k?Arch|kSm)\b", text)


def machine_paths(text):
    """Absolute paths of one machine."""
    return re.findall(r"(?<![\w.}\-/])/(?:home|work|root|Users|mnt|tmp/bash_jobs)/[\w.]+", text)


def left_over_debugging(text):
    """printf in device code, and sources that a program wrote."""
    return re.findall(r"\bprintf\s*\(|DO NOT EDIT|(?i:auto-?generated)", without_comments(text))


CSRC_RULES = {
    function_like_macros: ("#define CHECK(x) x", "#define NAME value (a)"),
    launches_without_stream: (
        "kernel<T, 3><<<dim3(1, 2, 3), 128, bytes>>>(p);",
        "kernel<<<dim3(1, 2), 128, bytes, stream>>>(p);  // not <<<1, 2>>>",
    ),
    forbidden_runtime_calls: (
        "cudaMemcpy(a, b, n, cudaMemcpyDefault);",
        "cudaMemsetAsync(a, 0, n, stream); cudaMemcpyAsync(a, b);  // cudaMalloc(p)",
    ),
    foreign_includes: ("#include <cute/tensor.hpp>", "#include <cuda_fp16.h>"),
    architecture_templates: ("template <int Arch, class T>", "template <int kHeadDim>"),
    left_over_debugging: ('printf("%d", x);', "fprintf_like(x);"),
}


@pytest.mark.parametrize("rule", CSRC_RULES, ids=lambda rule: rule.__name__)
def test_csrc(rule):
    bad, good = CSRC_RULES[rule]
    assert rule(bad)
    assert not rule(good)
    sources = [p for p in _under("csrc") if p.suffix in SOURCE]
    assert sources
    assert _violations(sources, rule) == {}


@pytest.mark.parametrize(
    "call",
    ["cudaDeviceSynchronize()", "cudaMalloc(&p, n)", "cudaMallocAsync(&p, n, s)", "cudaFree(p)",
     "cudaStreamSynchronize(s)", "cudaMemset(p, 0, n)", "cudaMemcpy2D(a)", "cudaDeviceReset()"],
)  # fmt: skip
def test_each_runtime_call_is_seen(call):
    assert forbidden_runtime_calls(f"  {call};")


def test_only_the_ffi_sees_xla():
    def includes_xla(text):
        return re.findall(r'#\s*include\s*[<"](?:xla|nanobind)/', text)

    assert includes_xla('#include "xla/ffi/api/ffi.h"')
    others = [p for p in _under("csrc") if not p.name.startswith("ffi")]
    assert _violations(others, includes_xla) == {}


def test_families_do_not_include_each_other():
    def other_family(path, text):
        included = set(re.findall(r'#\s*include\s*"[^"]*(sm\d+)/', text))
        return included - {path.parent.name}

    assert other_family(Path("csrc/sm80/forward.cuh"), '#include "csrc/sm90/ptx.cuh"')
    for path in _under("csrc"):
        if re.fullmatch(r"sm\d+", path.parent.name):
            assert not other_family(path, path.read_text()), path


def too_long(path, text):
    """The number of lines, where it is over the limit for this file."""
    kernel = path.parts[0] == "csrc" and re.match(r"(forward|backward)", path.name)
    lines = text.count("\n")
    return lines if lines > (KERNEL_LINES if kernel else FILE_LINES) else 0


def test_file_lengths():
    kernel, other = Path("csrc/sm80/forward.cuh"), Path("csrc/ffi.cc")
    assert too_long(other, "\n" * (FILE_LINES + 1))
    assert not too_long(other, "\n" * FILE_LINES)
    assert too_long(kernel, "\n" * (KERNEL_LINES + 1))
    assert not too_long(kernel, "\n" * KERNEL_LINES)
    code = [p for p in repository_files() if p.suffix in SOURCE or p.name == "CMakeLists.txt"]
    lengths = {p.relative_to(ROOT): too_long(p.relative_to(ROOT), p.read_text()) for p in code}
    assert {str(path): lines for path, lines in lengths.items() if lines} == {}


def test_no_paths_of_one_machine():
    control = "see " + "/" + "home/someone/checkout"
    assert machine_paths(control)
    assert not machine_paths("https://example.org/home/x and a/work/b")
    texts = [p for p in repository_files() if p.suffix not in {".png", ".so"}]
    assert _violations(texts, machine_paths) == {}


def generated(path):
    """Build products and caches."""
    suffixes = {".so", ".o", ".a", ".pyc", ".whl", ".cubin", ".ptx", ".fatbin", ".ninja"}
    return path.suffix in suffixes or bool(NOT_OURS - {".git"} & set(path.parts))


def test_nothing_generated_is_checked_in():
    for bad in ("jax_flashattn/_ext.abi3.so", "build/forward_64.cu", "tests/__pycache__/x.pyc"):
        assert generated(Path(bad))
    assert not generated(Path("csrc/kernel.cu.in"))
    assert [p for p in repository_files() if generated(p.relative_to(ROOT))] == []


def test_no_assert_guards_users():
    """`python -O` drops assert statements, so the package raises."""

    def asserts(text):
        return re.findall(r"^\s*assert\b.*", text, flags=re.MULTILINE)

    assert asserts("    assert x > 0")
    assert _violations(_under("jax_flashattn"), asserts) == {}


def _under(folder):
    return [p for p in repository_files() if p.relative_to(ROOT).parts[0] == folder]


def _violations(paths, rule):
    found = {}
    for path in paths:
        try:
            result = rule(path.read_text())
        except UnicodeDecodeError:
            continue
        if result:
            found[str(path.relative_to(ROOT))] = result
    return found
