"""The CPU emulator catches what it must (selftest.cc), and the CUDA kernels run right on it."""

import concurrent.futures
import itertools
import time
import zlib

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, Case, every_case, some_cases
from compare import expected, judge_all, with_seeds
from emulator import kernels
from emulator.emulator import Device, FaultError, build, make_once, why_unavailable
from oracle import attend

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

DTYPES = ("float16", "bfloat16")
SOME = (
    "dense-127x129",
    "causal-bottom_right-65x129",
    "window-(70,3)",
    "gqa-6-3-causal",
    "mask-bias",
    "everything",
)

# In the order of enum Bug in selftest.cc: what the message must say.
BUGS = {
    "no wait": "in flight",
    "no barrier after the wait": "in flight|races with a write",
    "no barrier before the copy": "overwrites shared memory that thread",
    "uncommitted copies": "in flight",
    "shared out of bounds": "out of bounds of shared memory",
    "shared misaligned": "misaligned shared address",
    "shared unwritten": "nobody has written",
    "shared accessed directly": "plain load or store touched shared memory",
    "global out of bounds": "out of bounds of global memory",
    "global misaligned": "misaligned global address",
    "global accessed directly": "plain load or store touched global memory",
    "input written": "writes to the input",
    "written twice": "two threads of this kernel write",
    "output left unwritten": "output c was never written",
    "divergent barrier": "deadlock: .*threads 0-95 wait in barrier.*threads 96-127 ",
    "divergent warp": "the warp diverged",
    "no warp barrier": "nobody has written|races with a write",
}


def test_what_several_want_at_once_is_made_once(tmp_path):
    makers = []

    def make_into(folder):
        makers.append(folder)
        time.sleep(0.2)
        (folder / "library.so").write_text("made")

    library = tmp_path / "library.so"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: make_once(library, make_into), range(4)))
    assert library.read_text() == "made"
    assert len(makers) == 1


def gemm(dtype, transposed, bug=0, flags=(), extents=(128, 192, 128), **device):
    """Runs the self-test's product; actual and expected C and sums of its tiles."""
    m, n, k = extents
    rng = np.random.default_rng(0)
    a = rng.standard_normal((m, k)).astype(dtype)
    b = rng.standard_normal((k, n) if transposed else (n, k)).astype(dtype)
    c, sums = np.full((m, n), np.nan, np.float32), np.empty(m * n // 64**2, np.float32)
    with Device(build("selftest.cc", *flags), **device) as memory:
        arrays = (memory.input("a", a), memory.input("b", b))
        arrays += (memory.output("c", c), memory.output("sum", sums))
        is_bfloat16 = dtype == ml_dtypes.bfloat16
        memory.call("selftest_gemm", *arrays, m, n, k, int(is_bfloat16), int(transposed), bug)
    b = b if transposed else b.T
    reference = a.astype(np.float64) @ b.astype(np.float64)
    tiles = reference.reshape(m // 64, 64, n // 64, 64).sum(axis=(1, 3)).ravel()
    return (c, sums), (reference, tiles), memory.session


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flags", [(), ("-DJFA_EMULATOR_UCONTEXT",)], ids=["assembly", "ucontext"])
def test_product(dtype, transposed, flags):
    actual, reference, session = gemm(dtype, transposed, flags=flags)
    for x, y in zip(actual, reference, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3)
    assert session.products == 128 * 192 * 128 // (16 * 8 * 16)
    assert session.matrix_wavefronts == session.matrices > 0


def test_half_conversion():
    # One column of ones picks out single elements: every finite half, subnormals included.
    bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
    a = np.where(np.isfinite(bits), bits, np.float16(0)).reshape(-1, 64)[:, :, None]
    a = (a * np.eye(64, dtype=np.float16)).reshape(-1, 64)[: 64 * 64]
    b = np.eye(64, dtype=np.float16)
    c, sums = np.empty(a.shape, np.float32), np.empty(len(a) // 64, np.float32)
    with Device(build("selftest.cc")) as memory:
        arrays = (memory.input("a", a), memory.input("b", b))
        arrays += (memory.output("c", c), memory.output("sum", sums))
        memory.call("selftest_gemm", *arrays, *a.shape[:1], 64, 64, 0, 0, 0)
    np.testing.assert_array_equal(c, a.astype(np.float32))


def test_every_bug_has_a_test():
    assert build("selftest.cc").selftest_bugs() == len(BUGS) + 1


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, seed):
    index = list(BUGS).index(bug) + 1
    for transposed in (False, True):
        with pytest.raises(FaultError, match=BUGS[bug]):
            gemm(np.float16, transposed, bug=index, seed=seed)


def test_bug_is_caught_without_assembly():
    for bug in ("shared accessed directly", "divergent barrier"):
        with pytest.raises(FaultError, match=BUGS[bug]):
            gemm(np.float16, False, list(BUGS).index(bug) + 1, ("-DJFA_EMULATOR_UCONTEXT",))


def check(case, dtype, **options):
    """Runs the kernels on a case and judges all they return."""
    actual = kernels.run(case, dtype, **options)
    arrays, lse_cotangent = case.arrays(dtype), options.get("lse_cotangent", True)
    reference = expected(case, dtype, lse_cotangent=lse_cotangent)
    low = expected(case, dtype, lse_cotangent=lse_cotangent, precision=dtype)
    if "bias" in actual and (not case.bias or case.bias[-1] == 1):
        judge_bias_along_keys(actual.pop("bias"), reference, case, dtype)
    judge_all(actual, reference, low, arrays)
    return actual


def judge_bias_along_keys(actual, reference, case, dtype):
    """The dS of a row sum to its d_lse: all else cancels, but for the rounding of p and out.

    Those errors reach dS through delta = rowsum(dO o), and are independent of each other. Where all
    of a row was dropped, out is 0, and what is left is d_lse times the float32 sum of p, rounded.
    """
    arrays, (d_out, d_lse) = with_seeds(case.arrays(dtype)), case.cotangents(dtype)
    sizes = attend(**(arrays | {"value": np.abs(arrays["value"])}), **case.static())["out"]
    squares = np.square(sizes * d_out.astype(np.float64)).sum(axis=-1).swapaxes(1, 2)
    padded = (1,) * (4 - len(case.bias)) + case.bias
    axes = tuple(axis for axis in range(3) if padded[axis] == 1)
    unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}[dtype]
    bound = 4 * unit * np.sqrt(squares.sum(axis=axes, keepdims=True))[..., None].reshape(case.bias)
    lse_terms = np.sqrt(np.square(d_lse).sum(axis=axes, keepdims=True)).reshape(case.bias)
    bound = bound + 2e-5 * lse_terms + unit * np.abs(reference["bias"])
    error = np.abs(actual.astype(np.float64) - reference["bias"])
    assert (error <= bound).all(), f"bias: off by {error.max():.3e}, bound {bound.max():.3e}"


@pytest.mark.parametrize("bias_shape", [(), (1, 2, 1, 1)])
def test_bias_along_keys_is_judged(bias_shape):
    case = next(c for c in CASES.values() if c.bias == bias_shape)
    reference = expected(case, "float16")
    judge_bias_along_keys(reference["bias"], reference, case, "float16")
    wrong = reference["bias"] - case.cotangents("float16")[1][0, 0, 0]  # a row's d_lse left out
    with pytest.raises(AssertionError, match="bias: off by"):
        judge_bias_along_keys(wrong, reference, case, "float16")


@every_case()
def test_case(case):
    turn = zlib.crc32(case.name.encode())  # either type, dQ by either route
    check(case, DTYPES[turn % 2], deterministic=bool(turn // 2 % 2), seed=turn)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("extents", [(65, 0), (0, 65)], ids=["no-keys", "no-queries"])
def test_empty(extents, deterministic):
    case = Case("empty", *extents, bias=(1, 1, 1, 1))
    actual = kernels.run(case, "float16", deterministic=deterministic)
    assert np.isneginf(actual.pop("lse")).all()
    for name, array in actual.items():
        assert not array.any(), name


@some_cases(*SOME)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_ways(case, dtype, deterministic):
    check(case, dtype, deterministic=deterministic, general=True, lse_cotangent=False, seed=7)


@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
def test_shared_memory_has_no_bank_conflicts(dim):
    case = CASES[f"dim-{dim}"]
    for deterministic in (False, True):
        session = kernels.run(case, "bfloat16", deterministic=deterministic).session
        assert session.matrix_wavefronts == session.matrices > 0


def test_order_of_threads_does_not_matter():
    case = CASES["everything"]
    first, *others = (
        kernels.run(case, "float16", deterministic=True, seed=s, host_threads=1 + s % 2)
        for s in range(3)
    )
    for other, name in itertools.product(others, first):
        np.testing.assert_array_equal(first[name], other[name])


# file, what to replace, by what, the case that must notice, dQ by backward_query
MUTANTS = {
    "forward-no-barrier": (
        "sm80/forward.cuh", "barrier();  // K of this", "//", "dense-127x129", False),
    "forward-no-wait": (
        "sm80/forward.cuh", "copy_async_wait<0>();\n    barrier();  // V", "barrier();  //",
        "dense-127x129", False),
    "backward-no-barrier": (
        "sm80/backward.cuh", "barrier();  // dO is read", "//", "dense-127x129", False),
    "backward-one-stage": (
        "sm80/backward.cuh", "const int stage = n % 2;", "const int stage = 0;", "dense-127x129",
        False),
    "query-no-barrier": (
        "sm80/backward_query.cuh", "barrier();  // K and V are read", "//", "dense-127x129", True),
    "bias-no-barrier": (
        "sm80/backward_bias.cuh", "barrier();  // the tiles are read", "//", "mask-bias", False),
    "window-off-by-one": (
        "common/sequence.cuh", "(visibility.window_right, kMaxSequence) + 1",
        "(visibility.window_right, kMaxSequence)", "window-(70,3)", False),
    "swizzle": (
        "sm80/tile.cuh", "(chunk ^ swizzle(row)) * 16", "chunk * 16", "dense-127x129", False),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_of_the_kernels_is_caught(mutant):
    file, old, new, name, deterministic = MUTANTS[mutant]
    with pytest.raises(AssertionError, match=r"csrc/|off by|inf at other|NaN at other"):
        check(
            CASES[name], "bfloat16", gradients="forward" not in file, deterministic=deterministic,
            edits=((file, old, new),),
        )  # fmt: skip
