"""Packed sequences with query tiles of their own, on the emulator: csrc/sm90/sequence_tiles.cuh."""

import dataclasses

import numpy as np
import pytest
from cases import CASES, PACKED, Case, packed
from emulator import kernels
from emulator.emulator import why_unavailable
from oracle import attend
from ragged import members
from test_emulator import check
from test_emulator_hopper import DIMS
from ways import Call

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

TILES, TABLE = "the tiles of each sequence", "who sees whom, as a table"
CAUSAL = {"is_causal": True}
BOTTOM = CAUSAL | {"causal_alignment": "bottom_right"}
FORWARD = {"family": "sm90", "gradients": False}


def has_tiles(case, **options):
    """Whether its plan has tiles of sequences, and not a table."""
    text = kernels.schedule(case, "bfloat16", **options)
    assert (TILES in text) != (TABLE in text)
    return TILES in text


# Which calls have them ---------------------------------------------------------------------------


def test_cases_with_tiles_of_sequences():
    found = {name for name, case in CASES.items() if PACKED[0] in case.options and has_tiles(case)}
    long = {name for name in CASES if name.startswith("packed-long-")}
    assert found == long | {"packed-nothing", "packed-one"}
    for name in found:
        assert not has_tiles(CASES[name], family="sm80")


def of_many(sequences, q_len):
    return Case("many", q_len, 8, batch=1, heads=1, options=packed(*[(1, 0)] * sequences))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (of_many(3, 192), False),
        (of_many(3, 193), True),
        (of_many(4096, 64 * 4096 + 1), True),
        (of_many(4097, 64 * 4097 + 1), False),
        (dataclasses.replace(CASES["packed-long-dense"], sinks=(2,)), False),
        (Case("dropout", 331, 331, batch=1,
              options=CASES["packed-long-dense"].options | {"dropout_rate": 0.5}), False),
    ],
    ids=["short", "long", "as-many-as-are-copied", "more", "sinks", "dropout"],
)  # fmt: skip
def test_calls_with_tiles_of_sequences(case, expected):
    assert has_tiles(case) == expected


# All tiles of the kernel -------------------------------------------------------------------------

# Sequences, none of whose ends is at a multiple of 16; heads; what chooses the tile.
KINDS = {
    "short": (((1, 3), (133, 133), (0, 0), (150, 20)), (2, 1), CAUSAL),
    "short-dense": (((150, 1100), (39, 1000)), (2, 1), {}),
    "long": (((150, 90), (37, 4030)), (3, 3), BOTTOM),
    "long-pairs": (((150, 90), (37, 4030)), (4, 2), BOTTOM),
    "general": (((150, 90), (37, 203)), (2, 1), BOTTOM | {"logits_soft_cap": 2.0}),
}
CLUSTERS = {
    "short-dense": ("two heads of a group", (96, 128)),
    "long": ("two query tiles", (96, 128, 256)),
    "long-pairs": ("two heads of a group", (96, 128, 256)),
}


def between_gaps(name, pairs, heads, options, dims):
    """Sequences of (query length, key length) with tokens of none before and after them."""
    (q, k), first = np.sum(pairs, axis=0).tolist(), (5, 3)
    return Case(
        f"tiles-{name}", q + 5 + 4, k + 3 + 6, batch=1, heads=heads[0], kv_heads=heads[1],
        head_dim=dims[0], value_dim=dims[1], options=packed(*pairs, first=first, **options),
    )  # fmt: skip


def of_kind(kind, dims):
    return between_gaps(kind, *KINDS[kind], dims)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile(kind, dims):
    case = of_kind(kind, dims)
    assert has_tiles(case, multiprocessors=2)
    shared, clustered = CLUSTERS.get(kind, ("", ()))
    text = kernels.schedule(case, "bfloat16", multiprocessors=2)
    assert ("in clusters" in text) == (dims[1] in clustered and dims[0] == dims[1])
    assert "in clusters" not in text or f"in clusters, for {shared}" in text
    check(case, "bfloat16", **FORWARD, multiprocessors=2)


def test_sections_of_heads():
    """Where heads are many, and there are fewer tiles than the host thought."""
    case = Case("sections", 200, 4100, batch=1, heads=80,
                options=packed((150, 90), (37, 4000), local_window_size=(20, 5)))  # fmt: skip
    assert "at most 400 items, drawn longest first in sections of 23" in kernels.schedule(
        case, "bfloat16"
    )
    check(case, "bfloat16", **FORWARD)


# Batch entries -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PackedBatch(Case):
    """Bounds of each batch entry, as a call under vmap has them."""

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        return arrays | {name: arrays[name][0] for name in PACKED}


# The second entry has more tiles, and begins later.
BOUNDS = (
    ((0, 30, 30, 400), (9, 140, 271, 399), (0, 0, 0, 7)),
    ((0, 150, 190, 6900), (0, 6250, 6251, 6899), (3, 4, 6000, 6100)),
)
# The blocks of a cluster take two heads of a group, or two query tiles.
ENTRIES = {
    "blocks": (64, 1, 1, 2), "pairs": (128, 8, 2, 1), "query-tiles": (96, 3, 3, 2)
}  # fmt: skip


def check_batch(how, **options):
    """Each entry against the oracle on it alone."""
    dim, heads, kv_heads, multiprocessors = ENTRIES[how]
    case = PackedBatch(
        f"tiles-batch-{how}", 400, 6900, batch=3, heads=heads, kv_heads=kv_heads, head_dim=dim,
        options=dict(zip(PACKED, BOUNDS, strict=True)) | CAUSAL,
    )  # fmt: skip
    options["multiprocessors"] = multiprocessors
    text = kernels.schedule(case, "bfloat16", multiprocessors=multiprocessors)
    assert TILES in text
    assert ("in clusters" in text) == (how != "blocks")
    actual = kernels.run(case, "bfloat16", **FORWARD, **options)
    arrays = case.arrays("bfloat16")
    for b in range(case.batch):
        entry = {name: x[b : b + 1] for name, x in arrays.items()}
        desired = attend(**entry, **case.static(), precision="float32")
        for name in ("out", "lse"):
            x = actual[name][b].astype(np.float32)
            np.testing.assert_allclose(x, desired[name][0], atol=0.02, err_msg=f"{name} of {b}")


@pytest.mark.parametrize("how", ENTRIES)
def test_each_batch_entry_has_its_tiles(how):
    check_batch(how)


# What the device's arrays may hold ---------------------------------------------------------------


def of_garbage(seed, tokens=(200, 190), sequences=3, **fields):
    rng = np.random.default_rng(seed)
    shape = (2, sequences + 1)
    near = rng.integers(-20, max(tokens) + 20, shape)
    far = rng.choice([-(2**31), 2**31 - 1, -1, 0, 2**29, -(2**29)], shape)
    bounds = np.where(rng.random(shape) < 0.8, near, far).tolist()
    alignment = {"causal_alignment": ("top_left", "bottom_right")[seed % 2]}
    options = dict(zip(PACKED, map(tuple, bounds), strict=True)) | alignment
    return Case("garbage", *tokens, batch=1, **fields, options=options)


def check_garbage(case, **options):
    """That all is written, and zero where a row is of no sequence."""
    actual = kernels.run(case, "bfloat16", **FORWARD, **options)
    outside = ~members(np.array(case.options[PACKED[0]]), case.q_len).any(axis=0)
    assert not actual["out"][0, outside].any()
    assert np.isneginf(actual["lse"][0, :, outside]).all()
    return outside.any()


# As above, where pairs of heads are many rows; of query tiles the average sequence has 2048 keys.
GARBAGE = {
    "blocks": ({"heads": 2, "kv_heads": 1}, {"multiprocessors": 2}),
    "pairs": ({"heads": 8, "kv_heads": 4, "head_dim": 128}, {"multiprocessors": 1}),
    "query-tiles": ({"heads": 3, "kv_heads": 1, "head_dim": 96, "tokens": (330, 6200)},
                    {"multiprocessors": 2}),
}  # fmt: skip


@pytest.mark.parametrize("how", GARBAGE)
def test_garbage_is_safe(how):
    fields, device = GARBAGE[how]
    found = []
    for seed in range(6):
        case = of_garbage(seed, **fields)
        text = kernels.schedule(case, "bfloat16", **device)
        assert TILES in text
        assert ("in clusters" in text) == (how != "blocks")
        found.append(check_garbage(case, seed=seed, **device))
    assert any(found)


# 33 sequences, of which one early bound is larger than the later ones: two rounds of a warp.
DECREASING = Case(
    "decreasing", 2150, 40, batch=1, heads=1,
    options=dict.fromkeys(PACKED, (0, 30, 2000, *range(60, 1860, 60), 1900)),
)  # fmt: skip


def test_the_largest_bound_before_counts():
    assert has_tiles(DECREASING)
    check_garbage(DECREASING)


def check_ends(options, **how):
    """Bounds outside of the arrays give what those at their ends do, in every bit."""
    case = Case("ends", 300, 200, batch=1, options=options | packed((120, 50), (180, 150)))
    wild = {PACKED[0]: (-7, 120, 2**31 - 1), PACKED[1]: (-(2**31), 50, 300)}
    wild = dataclasses.replace(case, options=case.options | wild)
    desired = kernels.run(case, "bfloat16", **FORWARD)
    actual = kernels.run(wild, "bfloat16", **FORWARD, **how)
    for name in ("out", "lse"):
        np.testing.assert_array_equal(actual[name], desired[name])


@pytest.mark.parametrize("options", [{}, CAUSAL], ids=["dense", "causal"])
def test_bounds_outside_of_the_arrays_are_their_ends(options):
    check_ends(options)


# What comes after the last sequence has two tiles: no slot is left over.
GAP = Case("gap", 297, 40, batch=1, options=packed((60, 20), (70, 20)))


def check_among_others(**how):
    """A sequence between others and gaps, all of which are NaN: the same bits."""
    case = Call(**vars(CASES["packed-long-bottom-right"]))
    rows, keys = (slice(*case.options[name][2:4]) for name in PACKED)
    clean, dirty = case.arrays("bfloat16"), {}
    for name, place in (("query", rows), ("key", keys), ("value", keys)):
        dirty[name] = np.full_like(clean[name], np.nan)
        dirty[name][:, place] = clean[name][:, place]
    desired = kernels.run(case, "bfloat16", **FORWARD)
    actual = kernels.run(case.on(**dirty), "bfloat16", **FORWARD, **how)
    np.testing.assert_array_equal(actual["out"][:, rows], desired["out"][:, rows])
    np.testing.assert_array_equal(actual["lse"][..., rows], desired["lse"][..., rows])


def test_what_others_hold_does_not_leak():
    check_among_others()
