"""Random bounds of packed sequences, valid ones and garbage (ragged.py): 10,000 batches on a GPU.

And as many on the emulator by `python tests/ragged.py --first 0 --count 10000 --way emulator`, of
which the first 200 run here.
"""

import draws
import numpy as np
import pytest
import ragged
from cases import PACKED
from emulator import kernels
from programs import TILED
from ways import NO_EMULATOR

GPU_BATCHES, EMULATOR_BATCHES = 10_000, 200
INDEX = 10  # of the program that the reference runs, which takes seconds to compile


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(ragged.COUNT))
def test_gpu(index):
    ragged.check_through_jax(index, range(index, GPU_BATCHES, ragged.COUNT), "cuda")


@NO_EMULATOR
@pytest.mark.parametrize("index", range(ragged.COUNT))
def test_emulator(index):
    for number in range(index, EMULATOR_BATCHES, ragged.COUNT):
        ragged.check_on_emulator(number)


def test_reference():
    ragged.check_through_jax(INDEX, range(INDEX, 40 * ragged.COUNT, ragged.COUNT), "xla")


def test_programs_have_every_feature():
    """That packed calls have, each of them in several programs; and both kinds of bounds occur."""
    found = [draws.features(call) for call in ragged.programs()]
    every = {x for call in map(draws.draw, range(200)) for x in draws.features(call)
             if "packed" in draws.features(call)}  # fmt: skip
    rare = {name for name in every if sum(name in one for one in found) < 3}
    assert not rare
    valid = np.array([ragged.bounds(number)[1] for number in range(EMULATOR_BATCHES)])
    assert 0.5 < valid.mean() < 0.7


@NO_EMULATOR
def test_programs_of_both_roads():
    """The last ones have tiles for each sequence on sm90, the others a table of who sees whom."""
    for index, call in enumerate(ragged.programs()):
        plan = kernels.schedule(call.case, call.dtype, multiprocessors=2)
        assert ("tiles of each sequence" in plan) == (index >= ragged.COUNT - TILED)
        assert ("as a table" in plan) == (index < ragged.COUNT - TILED)


def test_valid_bounds_are_and_others_are_not():
    """Garbage has entries that decrease or lie outside, nearly always."""
    for is_valid in (True, False):
        meant = []
        for number in range(400):
            cu, kind = ragged.bounds(number)
            if kind != is_valid:
                continue
            case = ragged.program(number)[0].case
            inside = (cu >= 0).all() and (cu.max(axis=1) <= (case.q_len, case.k_len)).all()
            meant.append(inside and (np.diff(cu.astype(np.int64), axis=1) >= 0).all())
        assert np.mean(meant) == 1 if is_valid else np.mean(meant) < 0.1


def later(cu):
    """One sequence of the keys begins one key later."""
    return cu + np.int32([[0], [1]]) * (np.arange(cu.shape[-1]) == cu.shape[-1] // 2)


MUTANTS = {
    "a sequence begins late": later,
    "sides exchanged": lambda cu: cu[:, ::-1],
    "one sequence": lambda cu: cu[:, :, [0] * (cu.shape[-1] - 1) + [-1]],
    "the first begins at the first token": lambda cu: cu * (np.arange(cu.shape[-1]) > 0),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_found(mutant):
    """Bounds that attention is given wrong are noticed in most batches whose bounds they change."""
    numbers = range(INDEX, 80 * ragged.COUNT, ragged.COUNT)
    cu = np.stack([cu for cu, is_valid in map(ragged.bounds, numbers) if is_valid][:40])
    wrong = MUTANTS[mutant](cu).astype(np.int32)
    changed = (wrong != cu).any(axis=(1, 2))
    found, _ = ragged.through_jax(INDEX, "xla")(cu, wrong)
    assert not ragged.wrong(found)[~changed].any()
    assert changed.sum() >= 5
    # By as much as 16 bits would show; what lies outside is NaN, and so may the results be.
    coarse = ragged.TOLERANCE["bfloat16"] / ragged.TOLERANCE["float32"]
    noticed = ~(np.asarray(found["off"]) <= coarse)
    assert noticed[changed].mean() > 0.5


SPOILT = {  # a result, an index, what is written there; which of violations() sees it
    "NaN in a row": ("out", np.s_[0, 0], np.nan, "not finite"),
    "lse of +inf": ("lse", np.s_[0, 0, 0], np.inf, "not finite"),
    "a row outside": ("query", np.s_[0, -1], 1e-3, "outside"),
    "a key outside": ("value", np.s_[0, -1], 1e-3, "outside"),
    "lse outside": ("lse", np.s_[0, :, -1], 0.0, "outside"),
    "no mean of values": ("out", np.s_[0, 0], 1e3, "no mean"),
    "another gradient": ("key", np.s_[0, 0], 1e3, "off"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_wrong_is_found(spoilt):
    """Here in one sequence of the first twenty tokens."""
    name, index, value, kind = SPOILT[spoilt]
    case, cu, _ = ragged.batch(INDEX)
    dtype = ragged.program(INDEX)[0].dtype
    cu = np.zeros_like(cu) + np.int32(20) * (np.arange(cu.shape[1]) > 0)
    drawn = dict.fromkeys(("query", "key", "value", "d_out", "d_lse"))  # and not NaN outside
    case = case.on(**drawn, **{bounds: x[None] for bounds, x in zip(PACKED, cu)})
    desired = ragged.by_oracle(case, dtype)
    made = {key: np.array(x) for key, x in desired.items()}
    assert not ragged.wrong(ragged.violations(case, dtype, made, cu, desired))
    made[name][index] = value
    found = ragged.violations(case, dtype, made, cu, desired)
    assert ragged.wrong({kind: found[kind]})
