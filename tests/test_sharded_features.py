"""Every feature over two devices, batch or heads sharded: what one device computes, no gathering.

On two GPUs each feature by itself, on two CPU devices all at once; test_feature_operands.py,
test_partitioning.py and test_dropout.py take features one by one there.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from cases import LENGTHS, PACKED, Case, packed, runs
from compare import DIFFERENTIABLE, assert_same_bits, expected, judge_all
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from test_partitioning import collectives
from test_transformations import close

from jax_flashattn import attention, varlen_attention

B, T, S, N, K = 4, 100, 130, 4, 2
IDS = ("query_segment_ids", "key_value_segment_ids")
DIMS = {
    "query": "b t h d", "key": "b s k d", "value": "b s k d", "bias": "b h t s", "mask": "b h t s",
    "scale": "", "alibi_slopes": "b h", "sinks": "b h", "dropout_key": "x",
    **dict.fromkeys(LENGTHS, "b"), IDS[0]: "b t", IDS[1]: "b s", "prefix_lengths": "b",
    "bidirectional_spans": "b r x", **dict.fromkeys(PACKED, "b n"),
}  # fmt: skip


def case(name, **fields):
    options = {"is_causal": True, "causal_alignment": "bottom_right"} | fields.pop("options", {})
    sizes = {"batch": B, "heads": N, "kv_heads": K, "head_dim": 64} | fields
    return Case(f"sharded-{name}", T, S, **sizes, options=options)


IDS_IN_RUNS = {
    IDS[0]: (runs(30, 70), runs(100), runs(1, 9, 90), runs(50, 50)),
    IDS[1]: (runs(60, 70), runs(130), runs(9, 30, 91), runs(40, 90)),
}
SPANS = {"bidirectional_spans": (((3, 40), (60, 90)), ((5, 9), (0, 0)), ((0, 130), (7, 7)),
                                 ((120, 130), (1, 2)))}  # fmt: skip
FEATURES = {  # a case, and which of its arguments are the feature
    "cap": (case("cap", options={"logits_soft_cap": 1.5}), ["logits_soft_cap"]),
    "slopes": (case("slopes", alibi=(N,)), ["alibi_slopes"]),
    "slopes by entry": (case("slopes-by-entry", alibi=(B, N)), ["alibi_slopes"]),
    "sinks": (case("sinks-of-heads", sinks=(N,)), ["sinks"]),
    "sinks by entry": (case("sinks-by-entry", sinks=(B, N)), ["sinks"]),
    "sink tokens": (case("tokens", options={"local_window_size": (9, None), "num_sink_tokens": 5}),
                    ["num_sink_tokens"]),
    "segments": (case("segments", options=IDS_IN_RUNS), IDS),
    "prefix": (case("prefix", options={"prefix_lengths": (90, 0, 130, 60)}), ["prefix_lengths"]),
    "spans": (case("spans", options=SPANS), ["bidirectional_spans"]),
    "dropout": (case("dropout", options={"dropout_rate": 0.3}), ["dropout_rate", "dropout_key"]),
    "bias": (case("bias", bias=(1, N, T, S)), ["bias"]),
    "bias by entry": (case("bias-by-entry", bias=(B, 1, T, S), bias_dtype=None), ["bias"]),
    "mask": (case("mask", mask=(B, 1, 1, S)), ["mask"]),
    "scale": (case("scale", traced_scale=0.4), ["scale"]),
    "packed": (case("packed", batch=1, alibi=(N,), sinks=(N,), options=packed(
        (30, 20), (0, 60), (60, 40), first=(5, 0), dropout_rate=0.2)), PACKED),
    "everything": (case(
        "everything", alibi=(B, N), sinks=(N,), bias=(1, N, T, S), mask=(B, 1, T, S),
        traced_scale=0.2, options=IDS_IN_RUNS | SPANS | {
            "prefix_lengths": (90, 0, 130, 60), "dropout_rate": 0.3, "logits_soft_cap": 2.0,
            "query_seq_lengths": (100, 60, 0, 99), "local_window_size": (70, None)}), ["bias"]),
}  # fmt: skip
# Of a batch of one there is nothing to shard.
CALLS = [(by, name) for by in ("batch", "heads") for name in FEATURES
         if (by, name) != ("batch", "packed")]  # fmt: skip
WAYS = [pytest.param("cuda", *call, marks=pytest.mark.gpu) for call in CALLS]
WAYS += [("xla", by, "everything") for by in ("batch", "heads")]


@pytest.fixture
def devices(way):
    found = jax.devices("cpu" if way == "xla" else "cuda")
    if len(found) < 2:
        pytest.skip("needs two devices")
    return found[:2]


def results(case, implementation, arrays, d_out, d_lse):
    """{name: array} of out, lse and the gradients."""
    primal = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
    function = functools.partial(
        attention, **case.static(), return_lse=True, deterministic=True,
        implementation=implementation,
    )  # fmt: skip

    def call(primal):
        operands = arrays | primal
        if PACKED[0] not in operands:
            return function(**operands)
        one = {name: operands[name][0] for name in ("query", "key", "value", *PACKED)}
        made = varlen_attention(**operands | one, **function.keywords)
        return tuple(x[None] for x in made)

    (out, lse), pullback = jax.vjp(call, primal)
    return {"out": out, "lse": lse} | pullback((d_out, d_lse))[0]


def spec(dims, x, by):
    """How an array is sharded; what has one batch entry, or one head, is whole."""
    dims = dims.split()[-x.ndim :] if x.ndim else []
    extents = {"b": B} if by == "batch" else {"h": N, "k": K}
    return P(*("x" if extents.get(dim) == extent else None for dim, extent in zip(dims, x.shape)))


@pytest.mark.parametrize(("way", "by", "name"), WAYS)
def test_feature(devices, way, by, name):
    """The bits of one device on GPUs, but for sums over both; right by the rule; nothing moved."""
    case, _ = FEATURES[name]
    dtype = "float32" if way == "xla" else "bfloat16"
    arrays, (d_out, d_lse) = case.arrays(dtype), case.cotangents(dtype)
    mesh = jax.make_mesh((2,), ("x",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    specs = (
        {key: spec(DIMS[key], x, by) for key, x in arrays.items()},
        spec("b t h d", d_out, by), spec("b h t", d_lse, by),
    )  # fmt: skip
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    operands = (arrays, d_out, d_lse)
    placed = jax.device_put(operands, shardings)
    function = jax.jit(functools.partial(results, case, way))
    compiled = function.lower(*placed).compile()
    actual = compiled(*placed)
    alone = function(*jax.device_put(operands, SingleDeviceSharding(devices[0])))

    summed = {key for key in ("bias", "sinks", "scale") if key in arrays}
    assert actual["out"].sharding.is_equivalent_to(shardings[1], 4)
    # Where a summed gradient shall be whole, pieces of a few floats are put together.
    assert collectives(compiled) <= ({"all-reduce", "all-gather"} if summed else set())
    if way == "xla":
        close(actual, alone)
    else:
        same = actual.keys() - summed
        assert_same_bits({key: actual[key] for key in same}, {key: alone[key] for key in same})
    judge_all(actual, expected(case, dtype), expected(case, dtype, precision=dtype), arrays,
              gradient_factor=3 + ("dropout_rate" in case.options))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Without(Case):
    """A case without some of its arguments."""

    missing: tuple = ()

    def arrays(self, dtype):
        return {key: x for key, x in super().arrays(dtype).items() if key not in self.missing}

    def static(self):
        return {key: x for key, x in super().static().items() if key not in self.missing}


@pytest.mark.parametrize("name", FEATURES)
def test_feature_matters(name):
    """To both halves of the batch and of the heads: lost on one device, it would be noticed."""
    case, missing = FEATURES[name]
    without = Without(**vars(case), missing=tuple(missing))
    one, other = (expected(x, "float32", precision="float32") for x in (case, without))
    different = (np.abs(one["out"] - other["out"]) > 0.05).any(axis=(1, 3))  # [B, N]
    different |= ~np.isclose(one["lse"], other["lse"], atol=0.01).all(axis=2)
    halves = np.array_split(different, 2, axis=1)
    halves += np.array_split(different, 2) if case.batch > 1 else []
    assert all(half.any() for half in halves), different
    assert {*case.arrays("float32"), *case.static()}.issuperset(missing)


def test_every_array_is_sharded_somewhere():
    """The arrays of attention, and those of varlen_attention, are all in some case."""
    found = set.union(*(set(case.arrays("float32")) for case, _ in FEATURES.values()))
    assert found == DIMS.keys() - {LENGTHS[1]}
