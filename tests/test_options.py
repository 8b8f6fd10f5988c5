"""Bad calls raise at trace time, naming the argument and its value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_same_bits, needs_kernels

import jax_flashattn
from jax_flashattn import _ffi, attention

B, T, S, N, K, H = 2, 5, 8, 4, 2, 16


def arrays(query=(B, T, N, H), key=(B, S, K, H), value=None, dtype="bfloat16"):
    """Zeros of the shapes given; value's shape defaults to key's."""
    shapes = {"query": query, "key": key, "value": key if value is None else value}
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def raises(error, fragments, function=attention, **arguments):
    """function(**arguments) raises `error` with every fragment in its message, traced or not."""
    for traced in (False, True):
        with pytest.raises(error) as caught:
            jax.eval_shape(lambda: function(**arguments)) if traced else function(**arguments)
        assert type(caught.value) is error, f"{type(caught.value)} is not exactly {error}"
        message = str(caught.value)
        missing = [text for text in fragments if text not in message]
        assert not missing, f"{missing} not in {message!r}"


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize(
    "bad", [None, "abc", [[1.0]], object()], ids=["None", "str", "list", "object"]
)
def test_operands_must_be_arrays(name, bad):
    raises(TypeError, [name], **arrays() | {name: bad})


@pytest.mark.parametrize(
    "dtype", ["int32", "int8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]
)
def test_dtypes_not_supported(dtype):
    raises(TypeError, ["query", dtype], **arrays(dtype=dtype))


def test_float64_is_not_supported():
    with jax.enable_x64(True):
        raises(TypeError, ["query", "float64"], **arrays(dtype="float64"))


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float16", "bfloat16", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("float16", "float16", "bfloat16"),
    ],
)
def test_mixed_dtypes_are_all_named(dtypes):
    mixed = {
        name: x.astype(dtype) for (name, x), dtype in zip(arrays().items(), dtypes, strict=True)
    }
    raises(TypeError, ["query", "key", "value", *dtypes], **mixed)


@pytest.mark.parametrize(
    ("shapes", "fragments"),
    [
        ({"query": (T, H)}, ["query", "[5, 16]"]),
        ({"query": (1, B, T, N, H)}, ["query", "[1, 2, 5, 4, 16]"]),
        ({"query": (T, N, H)}, ["query", "key"]),
        ({"key": (S, K, H)}, ["query", "key"]),
        ({"value": (S, K, H)}, ["value"]),
        ({"query": (3, T, N, H)}, ["batch", "3", "2"]),
        ({"query": (1, T, N, H)}, ["batch", "1", "2"]),
        ({"key": (1, S, K, H)}, ["batch", "1", "2"]),
        ({"value": (3, S, K, H)}, ["value", "3", "2"]),
        ({"value": (B, S + 1, K, H)}, ["value", "9", "8"]),
        ({"value": (B, S, K + 1, H)}, ["value", "3", "2"]),
        ({"query": (B, T, N, 8)}, ["head", "8", "16"]),
        ({"key": (B, S, 3, H)}, ["heads", "4", "3"]),
        ({"key": (B, S, 0, H)}, ["heads", "0"]),
        ({"query": (B, T, 2, H), "key": (B, S, 4, H)}, ["heads", "2", "4"]),
        ({"query": (B, T, N, 0), "key": (B, S, K, 0)}, ["head", "0"]),
    ],
    ids=str,
)
def test_shapes(shapes, fragments):
    raises(ValueError, fragments, **arrays(**shapes))


@pytest.mark.parametrize("name", ["query_seq_lengths", "key_value_seq_lengths"])
@pytest.mark.parametrize(
    ("lengths", "error", "fragments"),
    [
        (np.float32([1, 2]), TypeError, ["float32", "int32"]),
        (np.array([True, False]), TypeError, ["bool", "int32"]),
        ("ab", TypeError, []),
        (np.int32([1, 2, 3]), ValueError, ["[3]", "[2]"]),
        (np.int32([[1], [2]]), ValueError, ["[2, 1]", "[2]"]),
        (np.asarray(3, np.int32), ValueError, ["[]", "[2]"]),
        (np.array([1, 2**40], np.int64), ValueError, [str(2**40)]),
    ],
    ids=lambda x: str(x).replace(" ", "") if not isinstance(x, type) else x.__name__,
)
def test_lengths(name, lengths, error, fragments):
    raises(error, [name, *fragments], **arrays(), **{name: lengths})


@pytest.mark.parametrize("dtype", ["int64", "uint32"])
def test_wide_lengths_that_are_traced(dtype):
    """Their values cannot be seen, and would be narrowed silently."""
    call = jax.jit(lambda x: attention(**arrays(), key_value_seq_lengths=x))
    with jax.enable_x64(True), pytest.raises(TypeError, match=f"{dtype}; cast it with"):
        call(np.ones(B, dtype))


def test_lengths_for_unbatched_operands():
    single = {name: x[0] for name, x in arrays().items()}
    raises(ValueError, ["query_seq_lengths", "[2]"], **single, query_seq_lengths=np.int32([1, 2]))


@pytest.mark.parametrize(
    ("lengths", "desired"),
    [
        (np.array([2, 4], np.int64), [2, 4]),
        (np.array([2, 4], np.uint8), [2, 4]),
        (np.int32([-5, 2**31 - 1]), [0, S]),
    ],
    ids=["int64", "uint8", "clamp"],
)
def test_lengths_that_are_taken(lengths, desired):
    rows = jnp.arange(S)[:, None, None] / 8
    some = {n: x + rows[: x.shape[1]] for n, x in arrays(dtype="float32").items()}
    ours = attention(**some, key_value_seq_lengths=lengths)
    assert_same_bits(ours, attention(**some, key_value_seq_lengths=np.int32(desired)))
    assert (ours != attention(**some)).any()


@pytest.mark.parametrize(
    ("name", "bad", "error", "fragments"),
    [
        ("scale", float("nan"), ValueError, ["nan"]),
        ("scale", float("inf"), ValueError, ["inf"]),
        ("scale", -float("inf"), ValueError, ["-inf"]),
        ("scale", 0.0, ValueError, ["0.0"]),
        ("scale", -0.5, ValueError, ["-0.5"]),
        ("scale", np.float32(-2), ValueError, ["-2"]),
        ("scale", "big", TypeError, ["big"]),
        ("scale", 1j, TypeError, ["1j"]),
        ("scale", jnp.ones(3), TypeError, ["[3]"]),
        ("local_window_size", 1.5, TypeError, ["1.5"]),
        ("local_window_size", True, TypeError, ["True"]),
        ("local_window_size", "3", TypeError, ["3"]),
        ("local_window_size", (1.0, None), TypeError, ["1.0"]),
        ("local_window_size", (True, 1), TypeError, ["True"]),
        ("local_window_size", -1, ValueError, ["-1"]),
        ("local_window_size", (2, -1), ValueError, ["-1"]),
        ("local_window_size", (-1, 0), ValueError, ["-1"]),
        ("local_window_size", (1,), ValueError, ["(1,)"]),
        ("local_window_size", (1, 2, 3), ValueError, ["(1, 2, 3)"]),
        ("is_causal", "yes", TypeError, ["yes"]),
        ("causal_alignment", "middle", ValueError, ["middle", "top_left", "bottom_right"]),
        ("implementation", "cudnn", ValueError, ["cudnn", "xla", "cuda", "cuda:sm80", "cuda:sm90"]),
        ("implementation", "cuda:sm1", ValueError, ["cuda:sm1", "cuda:sm80"]),
        ("bias", jnp.zeros((1, N, T, S), "complex64"), TypeError, ["complex64"]),
        ("bias", jnp.zeros((1, N, T, S + 1)), ValueError, ["[1, 4, 5, 9]", "[2, 4, 5, 8]"]),
        ("bias", jnp.zeros((3, N, T, S)), ValueError, ["[3, 4, 5, 8]", "[2, 4, 5, 8]"]),
        ("bias", jnp.zeros((1, K, T, S)), ValueError, ["[1, 2, 5, 8]", "[2, 4, 5, 8]"]),
        ("bias", jnp.zeros((1, B, N, T, S)), ValueError, ["[1, 2, 4, 5, 8]"]),
        ("bias", "abc", TypeError, []),
        ("mask", jnp.zeros((1, N, T, S), "int32"), TypeError, ["bool", "int32"]),
        ("mask", jnp.zeros((1, N, T, S), "float32"), TypeError, ["bool", "float32"]),
        ("mask", jnp.zeros((T, S + 1), bool), ValueError, ["[5, 9]", "[2, 4, 5, 8]"]),
        ("mask", jnp.zeros((1, B, N, T, S), bool), ValueError, ["[1, 2, 4, 5, 8]"]),
    ],
    ids=lambda x: str(getattr(x, "shape", x)).replace(" ", "")[:30],
)
def test_bad_options(name, bad, error, fragments):
    raises(error, [name, *fragments], **arrays(), **{name: bad})


def test_unknown_argument():
    with pytest.raises(TypeError, match="casual"):
        attention(**arrays(), casual=True)


def lower_for_cuda(**arguments):
    """The StableHLO of a call for a GPU; no GPU is needed to make it."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in arguments.items() if name not in arrays}
    traced = jax.jit(lambda arrays: attention(**arrays, **static)).trace(arrays)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("implementation", ["cuda", "cuda:sm80"])
def test_named_kernels_do_not_take_float32(implementation):
    bad = arrays(dtype="float32")
    raises(NotImplementedError, ["float32", implementation], **bad, implementation=implementation)


@needs_kernels
@pytest.mark.parametrize("implementation", ["cuda", "cuda:sm80"])
@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"query": (B, T, N, 20), "key": (B, S, K, 20)}, "20"),
        ({"query": (B, T, N, 264), "key": (B, S, K, 264)}, "264"),
        ({"value": (B, S, K, 300)}, "300"),
    ],
    ids=["dim-20", "dim-264", "value-300"],
)
def test_named_kernels_that_cannot_serve_the_call(implementation, change, fragment):
    with pytest.raises(NotImplementedError, match=rf"\b{fragment}\b"):
        lower_for_cuda(**arrays(**change), implementation=implementation)
    assert "jax_flashattn" not in lower_for_cuda(**arrays(**change))  # None falls back


@pytest.mark.parametrize("implementation", ["cuda", "cuda:sm80"])
def test_named_kernels_without_a_gpu(implementation):
    """Eager or jitted, the platform is named; nothing falls back."""
    for call in (attention, jax.jit(attention, static_argnames="implementation")):
        with pytest.raises(NotImplementedError, match=f"{implementation}.*cpu"):
            call(**arrays(), implementation=implementation)


@pytest.mark.parametrize("dims", [(20, 20), (1, 3), (264, 300)], ids=str)
def test_any_dim_falls_back(dims):
    shapes = {"query": (B, T, N, dims[0]), "key": (B, S, K, dims[0]), "value": (B, S, K, dims[1])}
    assert attention(**arrays(**shapes)).shape == (B, T, N, dims[1])


def test_explain_tells_of_the_fallback():
    told = jax_flashattn.explain(**arrays(dtype="float32"), platform="cuda")
    assert "reference" in str(told)
    assert "float32" in str(told)
    on_cpu = jax_flashattn.explain(**arrays(), platform="cpu")
    assert "reference" in str(on_cpu)
    assert "GPU" in str(on_cpu)


@needs_kernels
def test_explain_tells_of_the_kernels():
    told = str(jax_flashattn.explain(**arrays(), platform="cuda"))
    assert "cuda:sm90 on cuda" in told
    assert "backward implementation: cuda:sm90" in told
    assert "over persistent blocks" in told
    causal = jax_flashattn.explain(**arrays(), is_causal=True, platform="cuda")
    assert "drawn longest first" in causal.schedule
    for heads, shared in ((2, "two query tiles"), (4, "two heads of a group")):
        q, k = (jax.ShapeDtypeStruct((1, 4096, n, 128), jnp.bfloat16) for n in (heads, 2))
        long = jax_flashattn.explain(q, k, k, is_causal=True, platform="cuda")
        assert f"in clusters, for {shared}" in long.schedule
    portable = jax_flashattn.explain(**arrays(), platform="cuda", implementation="cuda:sm80")
    assert portable.implementation == "cuda:sm80"
    with pytest.raises(ValueError, match="local_window_size"):
        jax_flashattn.explain(**arrays(), local_window_size=-1, platform="cuda")


@needs_kernels
def test_explain_tells_what_tma_brings():
    shapes = {"query": (1, 40, 2, 64), "key": (1, 48, 2, 64), "value": (1, 48, 2, 64)}
    mask, bias = jnp.ones((40, 48), bool), jnp.zeros((40, 48), "bfloat16")

    def explain(**scores):
        return jax_flashattn.explain(**arrays(**shapes), **scores, platform="cuda")

    def schedule(**scores):
        return explain(**scores).schedule

    assert "mask by TMA" in schedule(mask=mask)
    assert "bias by TMA" in schedule(bias=bias)
    assert "mask by TMA" in explain(mask=mask).backward_schedule
    assert "read by each thread" in explain(bias=bias.astype("float32")).backward_schedule
    dropout = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    assert "mask by TMA" in schedule(mask=mask, **dropout)
    assert "bias by TMA" in explain(bias=bias, **dropout).backward_schedule
    capped = explain(bias=bias, logits_soft_cap=9.0, **dropout)
    assert "bias by TMA" in capped.schedule
    assert "read by each thread" in capped.backward_schedule
    assert "mask by TMA" in schedule(mask=mask[:1])  # a row for all queries
    read = ({"mask": mask[:, :1]}, {"mask": mask, "bias": bias}, {"bias": bias.astype("float32")})
    for scores in read:
        assert "read by each thread" in schedule(**scores)
    assert "by each thread" not in schedule()


@needs_kernels
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("general", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    "dims", [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)]
)
def test_explain_tells_of_the_backward(dims, general, deterministic):
    """Which kernels run, and the memory of that which needs most."""
    if dims[0] not in _ffi.extension.build_info()["head_dims"]:
        pytest.skip("this build has no kernels for the head dim")
    shapes = {
        "query": (2, 300, 4, dims[0]),
        "key": (2, 300, 4, dims[0]),
        "value": (2, 300, 4, dims[1]),
    }
    call = arrays(**shapes) | ({"bias": jnp.ones((1, 4, 300, 300))} if general else {})
    told = jax_flashattn.explain(**call, deterministic=deterministic, platform="cuda")
    assert told.backward_implementation == "cuda:sm90"
    assert told.head_dim == dims[0]
    rows, keys = told.backward_tile
    assert rows in (32, 64, 128)
    assert keys in ((128, 192) if dims[0] <= 128 else (64,))
    assert "dK and dV by key tiles" in told.backward_schedule
    apart = dims[0] > 128
    assert ("dQ by query tiles" in told.backward_schedule) == apart
    assert ("dQ by float32 additions" in told.backward_schedule) != apart
    ordered = deterministic and not apart
    assert ("in the order of keys" in told.backward_schedule) == ordered
    assert ("gradient of the bias by its tiles, 128 x 112" in told.backward_schedule) == general
    assert told.backward_shared_memory_bytes <= _ffi.SHARED_MEMORY_BYTES
    assert told.backward_schedule in str(told)
    portable = jax_flashattn.explain(
        **call, deterministic=deterministic, platform="cuda", implementation="cuda:sm80"
    )
    assert portable.backward_shared_memory_bytes < told.backward_shared_memory_bytes
    assert portable.scratch_bytes_backward == told.scratch_bytes_backward


@needs_kernels
@pytest.mark.parametrize("bias_shape", [(1, 4, 1, 300), (1, 4, 300, 1)])
def test_explain_tells_of_a_bias_of_one_row_or_column(bias_shape):
    shapes = dict.fromkeys(("query", "key", "value"), (2, 300, 4, 64))
    told = jax_flashattn.explain(**arrays(**shapes), bias=jnp.ones(bias_shape), platform="cuda")
    assert "gradient of the bias by the portable family" in told.backward_schedule


def test_signature_begins_as_jax_nns():
    import inspect

    ours = list(inspect.signature(attention).parameters.values())
    theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters.values())
    for mine, parameter in zip(ours, theirs, strict=False):
        assert (mine.name, mine.kind, mine.default) == (
            parameter.name,
            parameter.kind,
            parameter.default,
        )
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_no_heads():
    raises(ValueError, ["heads", "0"], **arrays((B, T, 0, H), (B, S, 0, H)))
