"""On every path every option changes the output and each gradient, and its neutral value none.

Ignoring an option on one path is the fault that equal results cannot show: here each path is asked
with and without it. On the CPU the reference, on a GPU the kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashattn import attention, varlen_attention

B, T, N, K, H = 8, 48, 4, 2, 16
RNG = np.random.default_rng(0)
# Documents of 20, 5 and 23 tokens in most entries; entry 4 is one document.
RUNS = np.repeat([[0] * 20 + [1] * 5 + [2] * 23, [0] * T, [0, 1] + [2] * 46], (4, 1, 3), axis=0)
WINDOW = {"local_window_size": (6, 0)}
CAUSAL = {"is_causal": True}
# What is on in both calls, the option, a value that matters, a value that does not (or _none_).
OPTIONS = {
    "is_causal": ({}, True, False),
    "local_window_size": ({}, (9, 3), (B * T, B * T)),
    "causal_alignment": (WINDOW | {"query_seq_lengths": np.full(B, 40, np.int32)},
                         "bottom_right", "top_left"),
    "scale": ({}, 0.7, 1 / np.sqrt(H)),
    "bias": ({}, RNG.standard_normal((1, N, T, T)).astype(np.float32), None),
    "mask": ({}, RNG.random((B, 1, T, T)) < 0.5, None),
    "query_seq_lengths": ({}, np.int32([30, 40] * 4), np.full(B, T, np.int32)),
    "key_value_seq_lengths": ({}, np.int32([30, 40] * 4), np.full(B, T, np.int32)),
    "logits_soft_cap": ({}, 0.8, None),
    "alibi_slopes": ({}, np.float32([0.5, 0.2, 0.1, 1]), np.zeros(N, np.float32)),
    "sinks": ({}, np.float32([0.5, -1, 3, 1]), np.full(N, -np.inf, np.float32)),
    "num_sink_tokens": (WINDOW, 3, 0),
    "dropout_rate": ({"dropout_key": jax.random.key(5)}, 0.4, 0.0),
    "segment_ids": ({}, RUNS.astype(np.int32), np.zeros((B, T), np.int32)),
    "prefix_lengths": (CAUSAL, np.int32([30, 40] * 4), np.zeros(B, np.int32)),
    "bidirectional_spans": (CAUSAL, np.tile(np.int32([[[4, 20]]]), (B, 1, 1)),
                            np.zeros((B, 1, 2), np.int32)),
}  # fmt: skip
BY_ENTRY = ("query_seq_lengths", "key_value_seq_lengths", "segment_ids", "prefix_lengths",
            "bidirectional_spans", "mask")  # fmt: skip
NOT_PACKED = (*BY_ENTRY, "bias", "num_sink_tokens")
RESULTS = ("out", "query", "key", "value")


def spelt(options):
    """segment_ids as the two arguments that attention has."""
    rest = {name: x for name, x in options.items() if name != "segment_ids"}
    if "segment_ids" in options:
        for side in ("query", "key_value"):
            rest[f"{side}_segment_ids"] = options["segment_ids"]
    return rest


def inputs(dtype, shape=(B, T)):
    rng = np.random.default_rng(1)
    shapes = [(*shape, n, H) for n in (N, K, K, N)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def is_array(x):
    return isinstance(x, (np.ndarray, jax.Array))


def results(function, arrays, options):
    """out and the gradients of query, key and value; options' arrays are operands."""
    traced = {name: x for name, x in options.items() if is_array(x)}
    static = {name: x for name, x in options.items() if name not in traced}

    @jax.jit
    def both(arrays, traced):
        *primal, d_out = arrays
        out, pullback = jax.vjp(lambda *a: function(*a, **traced, **static), *primal)
        return dict(zip(RESULTS, (out, *pullback(d_out)), strict=True))

    return jax.tree.map(np.asarray, both(arrays, traced))


def dense(options, implementation, dtype, mesh):
    function = functools.partial(attention, implementation=implementation)
    return results(function, inputs(dtype), spelt(options))


def with_segments(options, implementation, dtype, mesh):
    """Beside segment ids of its own."""
    ids = np.tile(np.repeat([3, 4], T // 2), (B, 1)).astype(np.int32)
    return dense({"segment_ids": ids} | options, implementation, dtype, mesh)


def by_vmap(options, implementation, dtype, mesh):
    """Lanes of two entries each; arrays with a batch are mapped, others shared."""
    mapped = {n: x for n, x in spelt(options).items() if n.endswith(BY_ENTRY) and is_array(x)}
    shared = {n: x for n, x in spelt(options).items() if n not in mapped}

    def function(*arrays, **mapped):
        def lane(arrays, mapped):
            return attention(*arrays, **mapped, **shared, implementation=implementation)

        def lanes(x):
            return x.reshape(B // 2, 2, *x.shape[1:])

        out = jax.vmap(lane)(*jax.tree.map(lanes, (arrays, mapped)))
        return out.reshape(B, *out.shape[2:])

    return results(function, inputs(dtype), mapped)


def sharded(options, implementation, dtype, mesh):
    """Batch and heads over eight devices."""
    arrays = inputs(dtype)
    placed = [jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))) for x in arrays]
    function = functools.partial(attention, implementation=implementation)
    return results(function, placed, spelt(options))


def packed(options, implementation, dtype, mesh):
    """Four sequences, of which one has one token, and fewer or more keys than rows."""
    bounds = {"cu_seqlens_q": [0, 90, 91, 200, B * T], "cu_seqlens_k": [0, 60, 100, 250, B * T]}
    bounds = {name: jnp.asarray(x, "int32") for name, x in bounds.items()}
    options = {name: x for name, x in options.items() if name not in NOT_PACKED}
    function = functools.partial(varlen_attention, **bounds, implementation=implementation)
    return results(function, inputs(dtype, (B * T,)), options)


PATHS = {"dense": dense, "segments": with_segments, "vmap": by_vmap, "sharded": sharded,
         "varlen": packed}  # fmt: skip
CALLS = [
    (path, option)
    for path in PATHS
    for option in OPTIONS
    if not (path == "varlen" and option in NOT_PACKED)
    and not (path == "segments" and option in ("segment_ids", "num_sink_tokens"))
]


@pytest.fixture(params=["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def way(request):
    """implementation and dtype."""
    return request.param, "float32" if request.param == "xla" else "bfloat16"


@functools.cache
def without(path, way, mesh, base):
    """Results of what several options are compared with; `base` is the option it belongs to."""
    return PATHS[path](OPTIONS[base][0], *way, mesh)


def first_of_its_base(option):
    base = OPTIONS[option][0]
    return next(
        name for name, (given, *_) in OPTIONS.items() if given is base or given == base == {}
    )


@pytest.mark.parametrize(("path", "option"), CALLS)
def test_an_option_reaches_everything(way, cpu_mesh, path, option):
    """Out and each gradient differ in every entry; with the neutral value they do not."""
    if way[0] == "cuda" and path == "sharded":
        pytest.skip("it is made of CPU devices")
    mesh = cpu_mesh((4, 2), ("data", "model")) if path == "sharded" else None
    base, value, neutral = OPTIONS[option]
    plain = without(path, way, mesh, first_of_its_base(option))
    given = PATHS[path](base | {option: value}, *way, mesh)
    for name in RESULTS:
        x, y = (z[name].astype(np.float64) for z in (given, plain))
        changed = np.abs(x - y).reshape(1 if path == "varlen" else B, -1).max(axis=1)
        if option == "segment_ids":
            assert changed[4] < (1e-5 if way[0] == "xla" else 0.03)  # one document
            changed = np.delete(changed, 4)
        assert (changed > 0.02 * np.abs(y).max()).all(), f"{option} and {name}: {changed}"
    if neutral is None:
        return
    same = PATHS[path](base | {option: neutral}, *way, mesh)
    for name in RESULTS:
        x, y = (z[name].astype(np.float64) for z in (same, plain))
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 if way[0] == "xla" else 0.03)


def test_all_options_are_here():
    """What attention takes beyond operands, results, and what is tested elsewhere."""
    import inspect

    names = set(inspect.signature(attention).parameters) - {
        *("query", "key", "value", "implementation", "return_residual", "return_lse"),
        *("deterministic", "dropout_key"),
    }
    names = {name.replace("query_segment", "segment") for name in names}
    assert names - {"key_value_segment_ids"} == OPTIONS.keys()
    packed_names = set(inspect.signature(varlen_attention).parameters)
    assert packed_names & OPTIONS.keys() == OPTIONS.keys() - set(NOT_PACKED)
