"""Two GPUs of one host: sharded calls equal those of one, and both work at once.

test_partitioning.py and test_aot.py say the same of sharding without a GPU, but for the numbers.
"""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LENGTHS, Case
from compare import assert_same_bits, expected, judge_all
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from test_examples import EXAMPLES, SHARDED, run, sharded_run
from test_partitioning import collectives, heads
from test_stream import CAPTURE

from jax_flashattn import _ffi, attention

pytestmark = pytest.mark.gpu
DTYPE = "bfloat16"


@pytest.fixture(scope="module")
def gpus():
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip("needs two CUDA devices")
    return devices[:2]


def results(arrays, d_out, d_lse, deterministic):
    """{name: array} of out, lse and the gradients."""
    primal = {name: x for name, x in arrays.items() if name not in LENGTHS}
    lengths = {name: x for name, x in arrays.items() if name in LENGTHS}

    def call(primal):
        return attention(
            **primal, **lengths, is_causal=True, causal_alignment="bottom_right",
            deterministic=deterministic, return_lse=True, implementation="cuda",
        )  # fmt: skip

    (out, lse), pullback = jax.vjp(call, primal)
    return {"out": out, "lse": lse} | pullback((d_out, d_lse))[0]


def a_case(heads=8, kv_heads=4, **sizes):
    options = {
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "query_seq_lengths": (200, 0, 77, 200),
        "key_value_seq_lengths": (150, 150, 64, 0),
    }
    sizes = {"head_dim": 64} | sizes
    return Case("two-gpus", 200, 150, batch=4, heads=heads, kv_heads=kv_heads, options=options,
                **sizes)  # fmt: skip


def operands(case):
    d_out, d_lse = case.cotangents(DTYPE)
    return case.arrays(DTYPE), d_out, d_lse


def layout(by, kv_heads, bias=None):
    """PartitionSpecs in the order of results()' operands."""
    if by == "batch":
        query = key = rows = lengths = P("x")
    else:
        query, rows, lengths = P(None, None, "x"), P(None, "x"), P()
        key = P() if kv_heads == 1 else query
    specs = {"query": query, "key": key, "value": key, **dict.fromkeys(LENGTHS, lengths)}
    return specs if bias is None else specs | {"bias": bias}, query, rows


def sharded(gpus, case, specs, deterministic):
    """What two devices compute together, and the collectives of the program."""
    mesh = jax.make_mesh((2,), ("x",), devices=gpus, axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    placed = jax.device_put(operands(case), shardings)
    function = functools.partial(results, deterministic=deterministic)
    compiled = jax.jit(function).lower(*placed).compile()
    text = compiled.as_text()
    assert "jax_flashattn_fwd_v2" in text
    assert "jax_flashattn_bwd_v2" in text
    actual = compiled(*placed)
    assert actual["out"].sharding.is_equivalent_to(shardings[1], 4)
    return actual, collectives(compiled)


def alone(device, case, deterministic, **options):
    placed = jax.device_put(operands(case), SingleDeviceSharding(device))
    function = jax.jit(functools.partial(results, deterministic=deterministic))
    return function.lower(*placed).compile(compiler_options=options)(*placed)


@heads
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("by", ["batch", "heads"])
def test_sharded_calls_equal_those_of_one_device(gpus, by, deterministic, heads, kv_heads):
    """Bit for bit, but what is summed in any order or over devices: that is right by the rule."""
    case = a_case(heads, kv_heads)
    specs = layout(by, kv_heads)
    actual, found = sharded(gpus, case, specs, deterministic)
    sums_keys = by == "heads" and kv_heads == 1
    assert found <= ({"all-reduce"} if sums_keys else set())
    desired = alone(gpus[0], case, deterministic)
    same = ["out", "lse", *(["query"] if deterministic else [])]
    same += [] if sums_keys else ["key", "value"]
    assert_same_bits({n: actual[n] for n in same}, {n: desired[n] for n in same})
    low = expected(case, DTYPE, precision=DTYPE)
    judge_all(actual, expected(case, DTYPE), low, case.arrays(DTYPE))


@pytest.mark.parametrize("by", ["batch", "heads"])
def test_gradient_of_a_shared_bias_is_a_sum_over_both(gpus, by):
    case = a_case(bias=(1, 1, 200, 150))
    actual, found = sharded(gpus, case, layout(by, case.kv_heads, P()), True)
    assert found == {"all-reduce"}
    low = expected(case, DTYPE, precision=DTYPE)
    judge_all(actual, expected(case, DTYPE), low, case.arrays(DTYPE))
    one = alone(gpus[0], case, True)
    np.testing.assert_allclose(actual["bias"], one["bias"], rtol=1e-4, atol=1e-5)


def test_shard_map(gpus):
    case = a_case()
    mesh = jax.make_mesh((2,), ("x",), devices=gpus, axis_types=(jax.sharding.AxisType.Auto,))
    specs = layout("heads", case.kv_heads)
    result_specs = {"out": specs[1], "lse": specs[2], **{n: specs[0][n] for n in
                    ("query", "key", "value")}}  # fmt: skip
    mapped = jax.shard_map(
        functools.partial(results, deterministic=True), mesh=mesh, in_specs=specs,
        out_specs=result_specs,
    )  # fmt: skip
    placed = jax.device_put(
        operands(case), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    )
    compiled = jax.jit(mapped).lower(*placed).compile()
    assert not collectives(compiled)
    assert_same_bits(compiled(*placed), alone(gpus[0], case, True))


@pytest.mark.parametrize("options", [{}, CAPTURE], ids=["plain", "captured"])
def test_the_second_device_alone(gpus, options):
    """Every compiled head dim: how much shared memory a kernel may use is set for each device."""
    for head_dim in _ffi.extension.build_info()["head_dims"]:
        case = a_case(head_dim=head_dim)
        second = alone(gpus[1], case, True, **options)
        assert second["out"].devices() == {gpus[1]}
        assert_same_bits(second, alone(gpus[0], case, True, **options))


def test_operands_on_different_devices(gpus):
    """An error of jax, which leaves ours as they were."""
    case = a_case()
    arrays = case.arrays(DTYPE)
    query, key, value = (jax.device_put(arrays[n], gpus[0]) for n in ("query", "key", "value"))
    for call in (attention, jax.jit(attention)):
        with pytest.raises(ValueError, match="incompatible devices"):
            call(query, key, jax.device_put(value, gpus[1]))
        desired = call(query, key, value)
        moved = call(*(jax.device_put(x, gpus[1]) for x in (query, key, value)))
        assert moved.devices() == {gpus[1]}
        assert_same_bits(moved, desired)


def test_both_devices_at_once(gpus):
    """From 32 threads, half of them on either device, each with calls of two kinds in flight."""
    cases = [a_case(), a_case(head_dim=128, kv_heads=1)]
    function = jax.jit(functools.partial(results, deterministic=True))
    placed = [[jax.device_put(operands(case), gpu) for case in cases] for gpu in gpus]
    desired = [jax.block_until_ready(function(*arrays)) for arrays in placed[0]]

    def work(thread):
        mine = placed[thread % 2]
        return jax.block_until_ready([function(*mine[(n + thread // 2) % 2]) for n in range(20)])

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        made = list(pool.map(work, range(32)))
    for thread, calls in enumerate(made):
        for n in (0, 1, 18, 19):
            assert calls[n]["out"].devices() == {gpus[thread % 2]}
            assert_same_bits(calls[n], desired[(n + thread // 2) % 2])
    assert (np.asarray(desired[0]["lse"]) != np.asarray(desired[1]["lse"])).any()


def test_results_of_one_device_feed_the_other(gpus):
    """A pipeline of two stages: the copy waits for the first kernel, the second for the copy."""
    case = a_case()
    arrays = case.arrays(DTYPE)
    key, value = ([jax.device_put(arrays[n], gpu) for gpu in gpus] for n in ("key", "value"))
    call = jax.jit(functools.partial(attention, implementation="cuda"))
    x = y = jax.device_put(arrays["query"], gpus[0])
    for n in range(40):
        x = call(jax.device_put(x, gpus[n % 2]), key[n % 2], value[n % 2])
        y = call(y, key[0], value[0])
    assert x.devices() == {gpus[1]}
    assert jnp.isfinite(y.astype(jnp.float32)).all()
    assert_same_bits(x, y)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["heads", "batch"])
def test_training_on_a_mesh(gpus, sizes, tmp_path, monkeypatch):
    """Example 05, on two devices however many there are, with either axis over them."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(devices[:2]))
    text = (EXAMPLES / SHARDED).read_text()
    line = "sizes = (count // 2, 2) if count % 2 == 0 else (count, 1)\n"
    assert text.count(line) == 1
    (tmp_path / SHARDED).write_text(text.replace(line, f"sizes = {sizes}\n"))
    output = run(tmp_path / SHARDED, platform="cuda")
    assert f"mesh: {dict(zip(('data', 'model'), sizes, strict=True))} of NVIDIA" in output
    assert "'jax_flashattn_fwd_v2'" in output
    assert "'jax_flashattn_bwd_v2'" in output
    sharded_run(output)
