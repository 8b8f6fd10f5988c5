"""The CPU emulator's models of Hopper: wgmma, a pipeline of TMA, and the bugs planted in them."""

import re

import ml_dtypes
import numpy as np
import pytest
from emulator.emulator import Device, FaultError, build, why_unavailable

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

TYPES = (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
SPANS = (128, 64, 32, 16)  # bytes of the swizzle; 16 is none

# Both operands K-major; B [k, n]; also A [k, m]. A from registers, B [n, k] and [k, n].
FORMS = ("ss", "ss-b", "ss-ab", "rs", "rs-b")

# In the order of enum Bug in selftest_wgmma.cc: what the message must say.
WGMMA_BUGS = {
    "A touched": "changed registers of A",
    "sums overwritten": "TMA stores of thread 0 may still read|never waited for",
    "bulk misaligned": "misaligned shared address: byte .* a multiple of 16",
    "descriptor": "bits of the descriptor",
}

# In the order of enum Bug in selftest_pipeline.cc. None: the results are wrong.
MAY_READ = "may still read"
LANDED = "races with a write of the mbarrier|in flight|nobody has written"
DEADLOCK = r"deadlock: .*mbarrier at byte \d+: "
PIPELINE_BUGS = {
    "no wait for full": LANDED,
    "no wait for free": f"all 1 arrivals have come|{MAY_READ}|in flight",
    "parity of full": f"parity cannot tell|{LANDED}",
    "too few arrivals": f"{MAY_READ}|parity cannot tell",
    "too many arrivals": DEADLOCK + r"1 of \d arrivals and 0 bytes to come",
    "an arrival more": "all 1 arrivals have come",
    "too much expected": DEADLOCK + "0 of 1 arrivals and 16 bytes to come",
    "too little expected": "16 bytes more have landed",
    "late wait": "parity cannot tell",
    "no init fence": "no mbarrier_init_fence after",
    "no barrier after init": "between its mbarrier_init and this|no mbarrier was initialised",
    "initialised twice": "touches the mbarrier",
    "mbarrier touched": "touches the mbarrier",
    "box misaligned": "misaligned shared address: byte .* a multiple of 128",
    "box out of bounds": "out of bounds of shared memory",
    "no proxy fence": r"thread 228 .*has called no fence_async_shared",
    "no proxy fence before a load": r"thread 9 .*has called no fence_async_shared",
    "no barrier before a store": "races with a write of thread",
    "no wait for a store": "TMA stores of thread .* may still read",
    "uncommitted store": "TMA stores .*(never committed|may still read)",
    "store not waited for": "TMA stores that it never waited for",
    "load not waited for": "none of its threads has waited for what the mbarrier|has ended",
    "early release": "products of threads .* may still read",
    "no wgmma fence": "no wgmma_fence between",
    "no wgmma wait": f"{MAY_READ}|products that it never waited for",
    "accumulator touched": "accumulator 35 was changed",
    "accumulator read": None,
    "different products": "issue different products",
    "overlapping accumulators": "registers of two running products overlap",
    "part of a warp elects": "deadlock: .*wait in elect_one|the warp diverged",
    "too many registers": "deadlock: .*wait in grow_registers",
    "registers of three warps": "deadlock: .*wait in shrink_registers",
    "a turn passed twice": "arrives twice at barrier",
    "a turn of fewer": "for 256 threads and for 128 at once|deadlock",
    "partner gone": "has ended|none of its threads has waited",
    "only own stage released": DEADLOCK + "2 of 4 arrivals",
    "mail too early": "races with a write of the mbarrier|has read|in flight",
    "rank in a descriptor": f"{LANDED}|out of bounds",
}
# Where the kernel has no place for the bug.
NOT_IN_CLUSTERS = {"no barrier after init"}
IN_CLUSTERS = {
    "partner gone", "only own stage released", "mail too early", "rank in a descriptor",
}  # fmt: skip


def wgmma(kind=0, n=96, form="ss", spans=(128, 128), bug=0, **device):
    """Runs the product of one tile; actual and expected C in f32, C in f16, and sums of rows."""
    width = 1 if kind > 1 else 2
    m, n_used, k = 56 if form == "ss-ab" else 61, n - 8, 240 // width
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((m, k)) / 4).astype(TYPES[kind])
    b = rng.standard_normal((k, n_used)).astype(TYPES[kind])
    terms = rng.standard_normal(64).astype(np.float32)
    wide, sums = np.full((m, n_used), np.nan, np.float32), np.empty(64, np.float32)
    narrow = np.full((m, n_used), np.nan, np.float16)
    with Device(build("selftest_wgmma.cc"), **device) as memory:
        arrays = (
            memory.input("a", a.T if form == "ss-ab" else a),
            memory.input("b", b if form in ("ss-b", "ss-ab", "rs-b") else b.T),
            memory.output("wide", wide),
            memory.output("narrow", narrow),
            memory.output("sums", sums),
            memory.input("terms", terms),
        )
        extents = (kind, n, FORMS.index(form), *spans, m, n_used, k)
        memory.call("selftest_wgmma", *arrays, *extents, bug)
    c = a.astype(np.float64) @ b.astype(np.float64)
    rows = np.append(c.sum(axis=1), np.zeros(64 - m)) + terms
    return (wide, narrow, sums), (c, c, rows), memory.session


def judge(actual, expected):
    (wide, narrow, sums), (c, _, rows) = actual, expected
    np.testing.assert_allclose(wide, c, atol=2e-4, rtol=1e-5)
    np.testing.assert_allclose(narrow, c, atol=2e-4, rtol=2**-10)
    np.testing.assert_allclose(sums, rows, atol=2e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [64, 96, 128, 256])
def test_wgmma(n, form):
    actual, expected, session = wgmma(0, n, form)
    judge(actual, expected)
    assert session.warpgroup_products == 8
    assert session.matrix_wavefronts == session.matrices > 0
    assert session.proxy_fences == 128


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("span", SPANS)
def test_wgmma_swizzles(span, form):
    judge(*wgmma(1, 96, form, (span, 32))[:2])
    judge(*wgmma(1, 96, form, (64, span))[:2])


@pytest.mark.parametrize("form", ["ss", "rs"])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("kind", [2, 3], ids=["e4m3", "e5m2"])
def test_wgmma_of_8_bits(kind, span, form):
    judge(*wgmma(kind, 96, form, (span, span))[:2])


@pytest.mark.parametrize("kind", [2, 3], ids=["e4m3", "e5m2"])
def test_every_number_of_8_bits(kind):
    numbers = np.arange(256, dtype=np.uint8).view(TYPES[kind])
    numbers = np.where(np.isfinite(numbers.astype(np.float32)), numbers, TYPES[kind](0))
    a, b = np.eye(64, 256).astype(TYPES[kind]), np.zeros((96, 256), TYPES[kind])
    b[:, :64] = np.resize(numbers, (96, 64))
    c, sums, narrow = (
        np.empty((64, 96), np.float32),
        np.empty(64, np.float32),
        np.empty((64, 96), np.float16),
    )
    with Device(build("selftest_wgmma.cc")) as memory:
        arrays = (memory.input("a", a), memory.input("b", b), memory.output("wide", c))
        arrays += (memory.output("narrow", narrow), memory.output("sums", sums))
        arrays += (memory.input("terms", np.zeros(64, np.float32)),)
        memory.call("selftest_wgmma", *arrays, kind, 96, 0, 128, 128, 64, 96, 256, 0)
    np.testing.assert_array_equal(c, b[:, :64].T.astype(np.float32))


def pipeline(cluster, bug=0, extents=(300, 200, 296), flags=(), **device):
    """Runs the persistent product; actual and expected C, and what the counter holds after it."""
    m, n, k = extents
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((m, k)) / np.sqrt(k)).astype(np.float16)
    b = rng.standard_normal((k, n)).astype(np.float16)
    c, counter = np.full((m, n), np.nan, np.float16), np.ones(1, np.uint32)
    with Device(build("selftest_pipeline.cc", *flags), **device) as memory:
        arrays = (memory.input("a", a), memory.input("b", b), memory.output("c", c))
        arrays += (memory.output("counter", counter, scratch=True),)
        memory.call("selftest_pipeline", *arrays, m, n, k, cluster, bug)
    return c, a.astype(np.float64) @ b.astype(np.float64), counter[0], memory.session


@pytest.mark.parametrize("extents", [(300, 200, 296), (129, 8, 280), (512, 400, 512)])
@pytest.mark.parametrize("multiprocessors", [2, 5])
@pytest.mark.parametrize("cluster", [1, 2])
def test_pipeline(cluster, multiprocessors, extents):
    for seed in range(3):
        c, expected, counter, session = pipeline(
            cluster, extents=extents, seed=seed, multiprocessors=multiprocessors
        )
        np.testing.assert_allclose(c, expected, atol=1e-3, rtol=2**-10)
        assert counter == 0
    m, n, k = extents
    rows, cols, steps = -(-m // (128 * cluster)) * cluster, -(-n // 128), -(-k // 64)
    assert session.warpgroup_products == rows * cols * steps * 4 * 2
    loaded = rows * cols * steps * (128 * 64 + 64 * 128 // cluster) * 2
    assert session.tma_bytes == loaded + rows * cols * 128 * 128 * 2
    assert session.proxy_fences == rows * cols * 256


def test_pipeline_without_assembly():
    c, expected, *_ = pipeline(2, flags=("-DJFA_EMULATOR_UCONTEXT",))
    np.testing.assert_allclose(c, expected, atol=1e-3, rtol=2**-10)


def test_pipeline_is_the_same_with_the_same_seed():
    runs = [pipeline(2, seed=s, host_threads=1)[-1].switches for s in (1, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert len(set(runs)) > 1


def test_every_bug_has_a_test():
    assert build("selftest_wgmma.cc").selftest_wgmma_bugs() == len(WGMMA_BUGS) + 1
    assert build("selftest_pipeline.cc").selftest_pipeline_bugs() == len(PIPELINE_BUGS) + 1


@pytest.mark.parametrize("bug", WGMMA_BUGS)
def test_bug_of_wgmma_is_caught(bug):
    index = list(WGMMA_BUGS).index(bug) + 1
    for seed in (1, 2, 3):
        with pytest.raises(FaultError, match=WGMMA_BUGS[bug]):
            wgmma(0, 64, "rs-b", bug=index, seed=seed)


@pytest.mark.parametrize(
    ("bug", "cluster"),
    [(bug, 1) for bug in PIPELINE_BUGS if bug not in IN_CLUSTERS]
    + [(bug, 2) for bug in PIPELINE_BUGS if bug not in NOT_IN_CLUSTERS],
)
def test_bug_of_the_pipeline_is_caught(bug, cluster):
    index, says = list(PIPELINE_BUGS).index(bug) + 1, PIPELINE_BUGS[bug]
    for seed in (1, 2, 3):
        if says is None:
            assert np.isnan(pipeline(cluster, index, seed=seed)[0]).any()
            continue
        with pytest.raises(FaultError) as caught:
            pipeline(cluster, index, seed=seed)
        assert re.search(says, str(caught.value)), caught.value


def test_uncommitted_store_at_the_end():
    index = list(PIPELINE_BUGS).index("uncommitted store") + 1
    with pytest.raises(FaultError, match="never committed"):
        pipeline(1, index, extents=(100, 104, 200))
