"""The kernels run on the stream XLA hands over: ordered with its work, and captured into graphs."""

import concurrent.futures
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from compare import assert_same_bits

from jax_flashattn import attention

pytestmark = pytest.mark.gpu
CAPTURE = {
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,WHILE,CONDITIONAL",
}
NO_CAPTURE = {"xla_gpu_enable_command_buffer": ""}
SETS = 3  # of inputs, in buffers of their own


def _inputs(shape=(2, 200, 4, 64)):
    rng = np.random.default_rng(0)
    return [[jnp.asarray(normal(rng, shape, "bfloat16")) for _ in range(3)] for _ in range(SETS)]


def _forward(*arrays):
    return attention(*arrays, is_causal=True, return_lse=True, implementation="cuda")


def _backward(*arrays):
    def call(*arrays):
        return attention(*arrays, is_causal=True, deterministic=True, implementation="cuda")

    return jax.vjp(call, *arrays)[1](arrays[0])


def _backward_in_any_order(*arrays):
    def call(*arrays):
        return attention(*arrays, is_causal=True, implementation="cuda")

    return jax.vjp(call, *arrays)[1](arrays[0])


def _compile(function, arrays, options, **jit):
    return jax.jit(function, **jit).lower(*arrays).compile(compiler_options=options)


def _mismatches(results, desired):
    """How many elements differ, as a device scalar: nothing waits."""
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(desired), strict=True)
    return sum(jnp.count_nonzero(x != y) for x, y in pairs)


def _mismatches_of_sums(results, desired):
    """The same of bfloat16 sums in any order: by more than the last place."""
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(desired), strict=True)
    return sum(jnp.count_nonzero(~jnp.isclose(x, y, rtol=2**-7, atol=1e-3)) for x, y in pairs)


def test_calls_are_captured(tmp_path):
    """XLA's list of thunks shows the custom calls inside a command buffer, and outside without."""
    arrays = _inputs()[0]
    inside = re.compile(r"kCommandBuffer.*\n(?: +\d+: .*\n)*? +\d+: kCustomCall")
    for name, options, captured in (("on", CAPTURE, True), ("off", NO_CAPTURE, False)):
        folder = tmp_path / name
        _compile(_backward, arrays, options | {"xla_dump_to": str(folder)})
        dumps = [path.read_text() for path in folder.glob("*thunk_sequence*.txt")]
        assert any("kCustomCall" in text for text in dumps)
        assert any(inside.search(text) for text in dumps) == captured


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("function", [_forward, _backward, _backward_in_any_order])
def test_a_thousand_replays(function, head_dim):
    """A captured graph, its buffers changing between replays, gives the eager bits each time.
    Scratch that is not cleared by the graph itself would add one replay's sums to the next."""
    inputs = _inputs((2, 200, 4, head_dim))
    compiled = _compile(function, inputs[0], CAPTURE)
    desired = [jax.block_until_ready(function(*arrays)) for arrays in inputs]
    compare = jax.jit(_mismatches_of_sums if function is _backward_in_any_order else _mismatches)
    wrong = [compare(compiled(*inputs[i % SETS]), desired[i % SETS]) for i in range(1000)]
    assert sum(int(x) > 0 for x in wrong) == 0
    assert int(compare(desired[0], desired[1])) > 0  # the inputs' results can be told apart


def test_loop_in_one_graph():
    """lax.scan with the loop itself captured."""
    query, key, value = _inputs()[0]

    def loop(query, key, value):
        step = functools.partial(attention, implementation="cuda")
        return jax.lax.scan(lambda x, _: (step(x, key, value), None), query, length=64)[0]

    arrays = (query, key, value)
    captured = _compile(loop, arrays, CAPTURE)
    plain = _compile(loop, arrays, NO_CAPTURE)
    desired = plain(*arrays)
    for _ in range(10):
        assert_same_bits(captured(*arrays), desired)


def _step(query, key, value):
    return attention(query, key, value, is_causal=True, deterministic=True, implementation="cuda")


def _while_loop(query, key, value):
    def body(carry):
        return carry[0] + 1, _step(carry[1], key, value)

    return jax.lax.while_loop(lambda carry: carry[0] < 8, body, (0, query))[1]


def _conditional(query, key, value):
    """One branch for half of the rounds, the other for the rest."""

    def step(x, n):
        return jax.lax.cond(n % 2 == 0, lambda x: _step(x, key, value),
                            lambda x: _step(x, value, key), x), None  # fmt: skip

    return jax.lax.scan(step, query, jnp.arange(6))[0]


def _gradient_of_scan(query, key, value):
    """With the forward of each step done again in the backward."""
    step = jax.checkpoint(lambda x, _: (_step(x, key, value), None))

    def total(query):
        return jax.lax.scan(step, query, length=4)[0].astype(jnp.float32).sum()

    return jax.grad(total)(query)


@pytest.mark.parametrize("function", [_while_loop, _conditional, _gradient_of_scan])
def test_control_flow_in_a_graph(function):
    inputs = _inputs()
    captured, plain = (_compile(function, inputs[0], x) for x in (CAPTURE, NO_CAPTURE))
    desired = [plain(*arrays) for arrays in inputs]
    for n in range(30):
        assert_same_bits(captured(*inputs[n % SETS]), desired[n % SETS])


def test_lengths_change_between_replays():
    """A batch filled up with empty entries, whose places change: the graph stays the same."""

    def results(q_lengths, k_lengths, *arrays):
        def call(*arrays):
            return attention(
                *arrays, is_causal=True, causal_alignment="bottom_right", deterministic=True,
                query_seq_lengths=q_lengths, key_value_seq_lengths=k_lengths, return_lse=True,
                implementation="cuda",
            )  # fmt: skip

        out, pullback, lse = jax.vjp(call, *arrays, has_aux=True)
        return out, lse, pullback(arrays[0])

    arrays = _inputs()[0]
    pairs = [((200, 0), (200, 0)), ((0, 200), (0, 200)), ((1, 133), (200, 150)),
             ((0, 0), (0, 0)), ((7, 9), (0, 0)), ((999, -3), (200, -(2**31)))]  # fmt: skip
    lengths = [[jnp.array(x, jnp.int32) for x in pair] for pair in pairs]
    captured, plain = (_compile(results, (*lengths[0], *arrays), x) for x in (CAPTURE, NO_CAPTURE))
    desired = [plain(*pair, *arrays) for pair in lengths]
    for n in range(60):
        pair = n % len(pairs)
        assert_same_bits(captured(*lengths[pair], *arrays), desired[pair])
    out, lse, gradients = desired[3]
    assert np.isneginf(lse).all()
    assert not any(np.asarray(x).any() for x in (out, *gradients))


def test_donated_operand_of_a_graph():
    """The output may lie where the query was, and the next round reads it from there."""
    arrays = query, key, value = _inputs()[0]
    in_place = _compile(_step, arrays, CAPTURE, donate_argnums=0)
    plain = _compile(_step, arrays, NO_CAPTURE)
    x, y = query.copy(), query
    for _ in range(50):
        x, y = in_place(x, key, value), plain(y, key, value)
    assert_same_bits(x, y)


def _long_producer(seed):
    """A query that takes milliseconds to make, another one for each seed."""
    start = jnp.sin(seed + jnp.arange(2048 * 2048, dtype=jnp.float32)).reshape(2048, 2048)
    x = jax.lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x @ x / 2048 + start), start)
    return x[:512].reshape(2, 256, 32, 64).astype(jnp.bfloat16)


def _consumer(out, lse):
    return jnp.cumsum(out.astype(jnp.float32), axis=1) + lse.mean()


@pytest.mark.parametrize("together", [True, False], ids=["one program", "three programs"])
def test_producer_attention_consumer(together):
    """500 times, without waiting in between: a kernel on another stream would read stale data."""
    stages = jax.jit(_long_producer), jax.jit(lambda q: _forward(q, q, q)), jax.jit(_consumer)
    desired = []
    for seed in range(SETS):
        query = jax.block_until_ready(stages[0](jnp.float32(seed)))
        results = jax.block_until_ready(stages[1](query))
        desired.append(jax.block_until_ready(stages[2](*results)))

    def chain(seed):
        query = stages[0](seed)
        return stages[2](*stages[1](query))

    run = jax.jit(chain) if together else chain
    # One program may fuse the consumer otherwise than three do, so it is compared with itself.
    if together:
        for seed in range(SETS):
            alone = jax.block_until_ready(run(jnp.float32(seed)))
            np.testing.assert_allclose(alone, desired[seed], rtol=1e-2, atol=1)
            desired[seed] = alone
    compare = jax.jit(_mismatches)
    wrong = [compare(run(jnp.float32(i % SETS)), desired[i % SETS]) for i in range(500)]
    assert sum(int(x) > 0 for x in wrong) == 0
    assert int(compare(desired[0], desired[1])) > 0


@pytest.mark.parametrize("function", [_forward, _backward])
def test_threads(function):
    """Dispatched from 32 threads at once."""
    inputs = _inputs()
    function = jax.jit(function)
    desired = [jax.block_until_ready(function(*arrays)) for arrays in inputs]
    compare = jax.jit(_mismatches)

    def work(thread):
        chosen = thread % SETS
        return [int(compare(function(*inputs[chosen]), desired[chosen])) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert not any(sum(counts) for counts in pool.map(work, range(32)))
