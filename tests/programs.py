"""The programs of ragged.py: packed calls of the fuzz test, whose bounds are drawn anew."""

import collections
import dataclasses
import functools
import itertools

import draws
from cases import PACKED
from emulator import kernels

COUNT, TILED = 20, 8  # of them; the last ones, whose sequences have tiles of their own on sm90


def has_tiles(case):
    """Whether each sequence has its own: tiles_sequences() of csrc/sm90/sequence_tiles.h."""
    sequences = len(case.options[PACKED[0]]) - 1
    is_long = case.q_len > 64 * sequences
    return is_long and case.sinks is None and "dropout_rate" not in case.options


def of_long_sequences(call):
    """With as many sequences as have more than 64 queries on average."""
    case = call.case
    count = (case.q_len - 1) // 64
    bounds = draws.packing(draws.Dice(case.q_len), case.q_len, case.k_len, count)
    return dataclasses.replace(call, case=dataclasses.replace(case, options=case.options | bounds))


def steepness(case):
    """The standard deviation of q.k times the scale, for N(0, 1) data."""
    root = case.head_dim**0.5
    scale = case.options.get("scale", 1 / root) if case.traced_scale is None else case.traced_scale
    return abs(scale) * root


def traits(call):
    """A call's features, and the head dim that its kernels are compiled for."""
    dim = max(call.case.head_dim, call.case.value_dim or 0)
    return draws.features(call) | {next(d for d in kernels.HEAD_DIMS if d >= dim)}


@functools.cache
def programs():
    """Packed calls of the fuzz test without their bounds: what is compiled once for all bounds."""

    def fitting(calls, most, work, tiled):
        for call in calls:
            case = call.case
            lengths, sequences = (case.q_len, case.k_len), len(case.options[PACKED[0]]) - 1
            is_small = case.heads * case.q_len * case.k_len * case.head_dim <= work
            is_small &= min(lengths) >= 48 and max(lengths) <= most and case.heads <= 4
            if is_small and sequences >= 3 and has_tiles(case) == tiled:
                yield call

    def take(count, calls):
        """Those with most of what fewer than three that were taken have."""
        calls = list(itertools.islice(calls, 100))
        for _ in range(count):
            found = collections.Counter(x for call in taken for x in traits(call))
            best = max(calls, key=lambda call: sum(found[x] < 3 for x in traits(call)))
            calls.remove(best)
            taken.append(best)

    packed = [x for x in map(draws.draw, range(4000)) if PACKED[0] in x.case.options]
    taken = []
    take(COUNT - TILED, fitting(packed, 200, 2**21, False))
    take(TILED, fitting(map(of_long_sequences, packed), 300, 2**22, True))
    return taken
