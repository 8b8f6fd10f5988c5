"""What is done to scores, in all kernels on the emulator: soft cap, ALiBi, sinks, dropout."""

import dataclasses

import numpy as np
import pytest
from cases import CASES, Case
from emulator import kernels
from emulator.emulator import why_unavailable
from test_emulator import check

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

# The kernels that a backward may run: family, whether dQ is summed in order, head dim.
ROUTES = {
    "sm80": ("sm80", False, 64),
    "sm80-deterministic": ("sm80", True, 64),
    "sm90": ("sm90", False, 64),
    "sm90-deterministic": ("sm90", True, 64),
    "sm90-wide": ("sm90", True, 192),
}
every_route = pytest.mark.parametrize("route", ROUTES)


def on_route(case, route):
    """The case with the route's head dim, and check()'s or run()'s options."""
    family, deterministic, dim = ROUTES[route]
    case = dataclasses.replace(case, head_dim=dim, value_dim=dim - 24)
    return case, {"family": family, "deterministic": deterministic}


@dataclasses.dataclass(frozen=True)
class WithSinks(Case):
    """Sinks of these values, one a head."""

    values: tuple[float, ...] = ()

    def arrays(self, dtype):
        return super().arrays(dtype) | {"sinks": np.asarray(self.values, np.float32)}


@every_route
@pytest.mark.parametrize("general", [False, True])
def test_sinks_far_from_the_scores(route, general):
    """Infinite ones too, and rows that see no key: nothing overflows, nothing becomes NaN."""
    values = (np.inf, -np.inf, 300.0, -300.0, 5.0)
    fields = {"heads": len(values), "options": {"local_window_size": 8}}
    case, options = on_route(WithSinks("far-sinks", 129, 65, values=values, **fields), route)
    actual = check(case, "bfloat16", general=general, **options)
    assert not actual["out"][:, :, 0].any()
    assert np.isposinf(actual["lse"][:, 0]).all()
    np.testing.assert_array_equal(actual["lse"][:, 2], np.float32(300))
    without = dataclasses.replace(case, values=(-np.inf,) * len(values))
    desired = kernels.run(without, "bfloat16", general=general, **options)
    for name in ("out", "query"):
        np.testing.assert_array_equal(actual[name][:, :, 1], desired[name][:, :, 1])


def test_sink_of_a_large_score():
    """Scores so large that the softmax subtracts the largest before it scales."""
    case = WithSinks("large", 65, 70, values=(2.0e8, -2.0e8), options={"scale": 1.0e8})
    for family in ("sm80", "sm90"):
        check(case, "bfloat16", family=family, gradients=False)


@every_route
def test_a_wide_cap_is_none(route):
    case, options = on_route(Case("wide", 65, 130, options={"logits_soft_cap": 3.0e3}), route)
    check(case, "float16", **options)


@dataclasses.dataclass(frozen=True)
class Unseen(Case):
    """NaN in the keys and in the rows that a window at the end leaves to nobody."""

    poison: float = np.nan

    def arrays(self, dtype):
        arrays = super().arrays(dtype)
        rows, keys = self._unseen()
        arrays["query"][:, :rows] += self.poison
        for name in ("key", "value"):
            arrays[name][:, :keys] += self.poison
        return arrays

    def cotangents(self, dtype):
        d_out, d_lse = super().cotangents(dtype)
        d_out[:, : self._unseen()[0]] += self.poison
        return d_out, d_lse

    def _unseen(self):
        left, _ = self.options["local_window_size"]
        return max(self.q_len - self.k_len, 0), max(self.k_len - self.q_len - left, 0)


# Of calls whose scores are general, one for each kind of tile of the Hopper forward and backward;
# sinks are for tiles that read more than a formula of who sees whom.
SINKS = {"alibi": (2,), "sinks": (2,)}
DROP, CAP, CAUSAL = {"dropout_rate": 0.3}, {"logits_soft_cap": 2.0}, {"is_causal": True}
KINDS = {
    "reading": dataclasses.replace(CASES["dropout-window-cap"], alibi=(2,)),
    "biased": dataclasses.replace(CASES["bias-aligned-1x2x150x264"], **SINKS),
    "masked": dataclasses.replace(CASES["mask-aligned-2x2x150x272"], **SINKS),
    "dropping": Case("dropping", 150, options=DROP | CAUSAL, alibi=(2,)),
    "dropping-seeing": Case("dropping-seeing", 150, options=DROP | CAUSAL, **SINKS),
    "dense": Case("dense", 150, options=CAP, alibi=(2,)),
    "general": Case("general", 150, options=CAP | CAUSAL, alibi=(2,)),
    "general-seeing": Case("general-seeing", 150, options=CAP | CAUSAL, **SINKS),
}


@pytest.mark.parametrize(
    ("family", "kind"), [("sm80", "reading"), *(("sm90", kind) for kind in KINDS)]
)
@pytest.mark.parametrize("dims", [(d, d) for d in kernels.HEAD_DIMS] + [(192, 128)], ids=str)
def test_every_tile(dims, family, kind):
    case = dataclasses.replace(KINDS[kind], head_dim=dims[0], value_dim=dims[1])
    for deterministic in (False, True):
        check(case, "float16", family=family, deterministic=deterministic, multiprocessors=2)


# Not the portable backward that owns keys: with or without dropout it reads a tile's keys that
# nobody sees, in front of those that are seen.
@pytest.mark.parametrize("route", [r for r in ROUTES if r != "sm80"])
@pytest.mark.parametrize("extents", [(20, 150), (150, 20)], ids=["keys", "rows"])
def test_what_dropout_begins_with_does_not_leak(route, extents):
    """Its tiles begin at multiples of 32 keys and 16 rows, before the first that are seen."""
    options = {"dropout_rate": 0.2, "local_window_size": (5, 0), "causal_alignment": "bottom_right"}
    case, options = on_route(Unseen("unseen", *extents, options=options), route)
    actual, desired = (
        kernels.run(dataclasses.replace(case, poison=poison), "bfloat16", **options)
        for poison in (np.nan, 0.0)
    )
    for name in ("out", "query", "key", "value"):
        assert desired[name].any(), name
        np.testing.assert_array_equal(actual[name], desired[name], err_msg=name)


@every_route
def test_a_rate_that_drops_nothing(route):
    case = CASES["causal-top_left-127x127"]
    small = case.options | {"dropout_rate": 2.0**-18}
    case, options = on_route(dataclasses.replace(case, options=small), route)
    check(case, "bfloat16", **options)


# File, what to replace, by what, the case that must notice, and the route.
SCORES, SOFTMAX, SEQUENCE = "common/scores.cuh", "common/softmax.cuh", "common/sequence.cuh"
DROPOUT, CLEAR = "common/dropout.cuh", "clear_marked(s);"
DERIVATIVE = "slopes.multiply_into({});"
MUTANTS = {
    "derivative-sm80": (
        "sm80/backward.cuh", DERIVATIVE.format("ds"), ";", "cap", "sm80"),
    "derivative-sm80-query": (
        "sm80/backward_query.cuh", DERIVATIVE.format("ds"), ";", "cap", "sm80-deterministic"),
    "derivative-in-the-bias": (
        "sm80/backward_bias.cuh", "recompute_ds<Element, false>", "recompute_ds<Element, true>",
        "cap-bias-mask", "sm80"),
    "derivative-sm90": (
        "sm90/backward.cuh", DERIVATIVE.format("dp"), ";", "cap-bias-mask", "sm90"),
    "derivative-sm90-query": (
        "sm90/backward_query.cuh", DERIVATIVE.format("dp"), ";", "cap", "sm90-wide"),
    "derivative-sm90-wide": (
        "sm90/backward_wide.cuh", "first.x,", "1.0f,", "cap", "sm90-wide"),
    "derivative-of-the-neighbour": (
        SCORES, "one_minus_square(next)", "one_minus_square(tanh)", "cap", "sm80"),
    "cap-after-the-bias": (
        SCORES, "if (!has_terms(scores) && (capped", "if ((capped", "cap-bias-mask", "sm80"),
    "cap-without-scale": (
        SCORES, "inward = scale * per_cap", "inward = per_cap", "cap", "sm80"),
    "kept-sm80": (
        "sm80/forward.cuh", "kGeneral ? p.scores.dropout.kept : 1.0f", "1.0f", "dropout", "sm80"),
    "kept-sm90": (
        "sm90/forward_store.cuh", "rows.lse[r]) * kept", "rows.lse[r])", "dropout", "sm90"),
    "kept-values-sm80": (
        "sm80/backward.cuh", "dv.scale_row(r, p.scores.dropout.kept)", ";", "dropout", "sm80"),
    "kept-values-sm90": (
        "sm90/backward.cuh", "{kept, kept}", "{1.0f, 1.0f}", "dropout", "sm90"),
    "kept-values-wide": (
        "sm90/backward_wide.cuh", "out, kept, a.g.dv", "out, 1.0f, a.g.dv", "dropout", "sm90-wide"),
    "kept-gradients": (DROPOUT, "dp.v[r][c] * kept;", "dp.v[r][c];", "dropout", "sm80"),
    "gradients-not-dropped": (
        DROPOUT, "p.v[r][c] < 0.0f ? 0.0f : dp", "dp", "dropout", "sm80-deterministic"),
    "probabilities-not-dropped-sm80": ("sm80/backward.cuh", CLEAR, ";", "dropout", "sm80"),
    "probabilities-not-dropped-sm90": (
        "sm90/backward.cuh", f"if (dropping) {CLEAR}", ";", "dropout", "sm90"),
    "probabilities-not-dropped-wide": (
        "sm90/backward_wide.cuh", f"if (drops<Shape>(a.p.scores)) {CLEAR}", ";", "dropout",
        "sm90-wide"),
    "bits-of-another-row": (
        DROPOUT, "counter_of_row(row) + r * 4", "counter_of_row(row + 16) + r * 4",
        "dropout", "sm80"),
    "bits-of-another-key": (DROPOUT, "c / 8 * 8 + c % 2", "c / 8 * 8", "dropout", "sm80"),
    "bits-of-another-query": (DROPOUT, "c / 4 * 8 + c % 2", "c / 4 * 8", "dropout", "sm90"),
    "bits-of-the-other-half": (
        DROPOUT, "first_key % 32 < 16 ? words.x : words.y", "words.x", "dropout", "sm90"),
    "bits-of-the-other-octet": (
        DROPOUT, "kTransposed ? p.v[r + n / 2][c + n % 2 * 2] : p", "p", "dropout", "sm90"),
    "bits-that-are-not-shared": (
        DROPOUT, "term_ - kOneInEachByte", "term_", "dropout", "sm80"),
    "rates-above-one-half": (
        DROPOUT, "whole < 128 ? ~0u : 0u", "~0u", "dropout-high-65x200", "sm80"),
    "operand-with-the-wrong-bits": (
        DROPOUT, "0x4400 + n * 0x1111", "0x4400", "dropout", "sm90"),
    "operand-with-bits-of-another-key": (
        DROPOUT, "kept[c / 4][c % 2]", "kept[c / 4][1 - c % 2]", "dropout", "sm90"),
    "operand-that-is-not-dropped": (
        "sm90/forward.cuh", "if constexpr (Shape::kDrops) drop_packed(p, kept);", ";",
        "dropout", "sm90"),
    "probabilities-beside-a-bias-not-dropped": (
        "sm90/forward.cuh", "DropoutBits(a.p, now.batch, now.head).drop(s, at);", ";",
        "dropout-window-cap", "sm90"),
    "transposed-hidden": (
        SCORES, "if (hides) hide_transposed(s, at, sequence);", ";",
        "alibi-causal-bottom-right", "sm90"),
    "hidden-in-dq": (
        SCORES, "if (hides) hide_rows(s, at, sequence, rows);", ";",
        "alibi-causal-bottom-right", "sm90-wide"),
    "transposed-nothing-hidden": (
        SCORES, "return (kGeneral && kReads) || !is_whole(all, begin, end);", "return false;",
        "alibi-causal-bottom-right", "sm90"),
    "bits-of-another-head": (
        DROPOUT, "p.shape.heads + h);", "p.shape.heads);", "dropout", "sm80"),
    "a-round-less": (DROPOUT, "round < 7", "round < 6", "dropout", "sm80"),
    "tiles-that-begin-anywhere-sm80": (
        SEQUENCE, "return 32;", "return 1;", "dropout-window-cap", "sm80"),
    "tiles-that-begin-anywhere-sm90": (
        DROPOUT, "x / 16 * 16 : x", "x : x", "dropout-window-cap", "sm90-wide"),
    "alibi-without-offset": (
        SEQUENCE, "(table_rows().token(i) + 2) : offset", "(table_rows().token(i) + 2) : 0",
        "alibi-causal-bottom-right", "sm80"),
    "alibi-of-one-side": (
        SCORES, "fabsf(first + Position<>::col_offset(c))", "(first + Position<>::col_offset(c))",
        "alibi", "sm80"),
    "alibi-transposed": (
        SCORES, "first - Position<>::col_offset(c)", "first + Position<>::col_offset(c)",
        "alibi", "sm90"),
    "alibi-without-offset-kept": (
        SEQUENCE, "return {keys(i), offset};", "return {keys(i), 0};",
        "alibi-causal-bottom-right", "sm90"),
    "rows-kept-of-another": (
        "sm90/forward.cuh", "sight_of_row(at.row(1))", "sight_of_row(at.row(0))",
        "alibi-causal-bottom-right", "sm90"),
    "alibi-of-another-entry": (
        SCORES, "slopes.data + b * slopes.batch_stride", "slopes.data",
        "alibi-causal-bottom-right", "sm80"),
    "sink-not-in-the-output": (
        SOFTMAX, "sum = fmaf(sum, of_keys, ", "const float total = fmaf(sum, of_keys, ",
        "sinks-of-rows-without-keys", "sm80"),
    "sink-without-rescale": (
        SOFTMAX, "0.0f : of_keys * rec", "0.0f : rec", "sinks-of-rows-without-keys", "sm90"),
    "sink-of-another-entry": (
        SOFTMAX, "sinks.data + b * sinks.batch_stride", "sinks.data", "sinks-lengths", "sm90"),
    "sink-of-another-head": (SOFTMAX, "batch_stride + h)", "batch_stride)", "sinks", "sm80"),
    "sink-of-padding": (
        "sm90/forward_store.cuh", "inside ? rows.lse[r] : minus_infinity()", "rows.lse[r]",
        "sinks-lengths", "sm90"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant):
    file, old, new, name, route = MUTANTS[mutant]
    case, options = on_route(CASES[name], route)
    of_gradients = "backward" in file or "derivative" in mutant or "transposed" in mutant
    of_gradients = of_gradients or file == DROPOUT or route not in ("sm80", "sm90")
    backward = of_gradients and "operand" not in mutant
    with pytest.raises(AssertionError, match=r"off by|inf at other|NaN at other|non-zeros"):
        check(case, "bfloat16", gradients=backward, edits=((file, old, new),), **options)
