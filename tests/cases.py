"""The calls that every implementation is judged on: shapes, options, and inputs from N(0, 1)."""

import dataclasses
import itertools
import zlib

import ml_dtypes
import numpy as np
import pytest

LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")
# Options that are int32 arrays, given in a Case as tuples.
PACKED = ("cu_seqlens_q", "cu_seqlens_k")
INTEGERS = (
    *LENGTHS, *PACKED, "query_segment_ids", "key_value_segment_ids",
    "prefix_lengths", "bidirectional_spans",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention; `options` are its keyword arguments, all but arrays drawn here.

    With cu_seqlens_q and cu_seqlens_k it is one of varlen_attention: its batch is 1, and these two
    arrays are [1, sequences + 1].
    """

    name: str
    q_len: int = 64
    k_len: int | None = None  # None: q_len
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None  # None: heads
    head_dim: int = 32
    value_dim: int | None = None  # None: head_dim
    bias: tuple[int, ...] | None = None
    bias_dtype: str | None = "float32"  # None: that of the query
    mask: tuple[int, ...] | None = None
    traced_scale: float | None = None  # passed as an array and differentiated
    alibi: tuple[int, ...] | None = None  # the shape of alibi_slopes
    sinks: tuple[int, ...] | None = None
    options: dict = dataclasses.field(default_factory=dict, hash=False)

    def arrays(self, dtype):
        """query, key, value and, where the case has them, the other arrays that attention takes."""
        rng = self._rng()
        k_len = self.q_len if self.k_len is None else self.k_len
        kv_heads = self.kv_heads or self.heads
        value_dim = self.value_dim or self.head_dim
        arrays = {
            "query": normal(rng, (self.batch, self.q_len, self.heads, self.head_dim), dtype),
            "key": normal(rng, (self.batch, k_len, kv_heads, self.head_dim), dtype),
            "value": normal(rng, (self.batch, k_len, kv_heads, value_dim), dtype),
        }
        if self.bias is not None:
            arrays["bias"] = normal(rng, self.bias, self.bias_dtype or dtype)
        if self.mask is not None:
            arrays["mask"] = np.asarray(rng.random(self.mask) < 0.7)
        for name in INTEGERS:
            if name in self.options:
                arrays[name] = np.asarray(self.options[name], np.int32)
        for name in PACKED:
            if name in arrays:
                arrays[name] = arrays[name][None]
        if self.alibi is not None:
            arrays["alibi_slopes"] = 2 ** normal(rng, self.alibi, "float32") / 8
        if self.sinks is not None:
            arrays["sinks"] = 2 * normal(rng, self.sinks, "float32")
        if "dropout_rate" in self.options:
            arrays["dropout_key"] = rng.integers(2**32, size=2, dtype=np.uint32)
        if self.traced_scale is not None:
            arrays["scale"] = np.float32(self.traced_scale)
        return arrays

    def static(self):
        """The keyword arguments that are not arrays."""
        return {name: value for name, value in self.options.items() if name not in INTEGERS}

    def cotangents(self, dtype):
        """d_out in `dtype`, d_lse in float32."""
        rng = self._rng(salt=1)
        value_dim = self.value_dim or self.head_dim
        return (
            normal(rng, (self.batch, self.q_len, self.heads, value_dim), dtype),
            normal(rng, (self.batch, self.heads, self.q_len), "float32"),
        )

    def _rng(self, salt=0):
        return np.random.default_rng(zlib.crc32(self.name.encode()) + salt)


def normal(rng, shape, dtype):
    """N(0, 1) values, rounded to a dtype given by name."""
    return rng.standard_normal(shape).astype(getattr(ml_dtypes, dtype, dtype))


def _dense():
    unequal = [(127, 129), (65, 200), (200, 65), (1, 129), (129, 1)]
    for t, s in [(x, x) for x in (1, 63, 64, 65, 127, 128, 129)] + unequal:
        yield Case(f"dense-{t}x{s}", t, s)
    yield Case("dense-1000x1000", 1000, batch=1, heads=1, head_dim=64)
    yield Case("dense-65x1000", 65, 1000, batch=1)
    yield Case("size-one-everywhere", 1, batch=1, heads=1, head_dim=8)


def _causal():
    shapes = [(64, 64), (127, 127), (65, 129), (129, 65), (1, 128), (129, 1)]
    for (t, s), alignment in itertools.product(shapes, ("top_left", "bottom_right")):
        options = {"is_causal": True, "causal_alignment": alignment}
        yield Case(f"causal-{alignment}-{t}x{s}", t, s, options=options)
    yield Case("causal-1000", 1000, batch=1, heads=1, head_dim=64, options={"is_causal": True})


def _windows():
    for window in (8, 0, (16, 0), (0, 16), (70, 3), (None, 4), (4, None), (None, None)):
        text = str(window).replace(" ", "")
        yield Case(f"window-{text}", 129, options={"local_window_size": window})
    causal = {"is_causal": True, "local_window_size": (20, 9)}
    yield Case("window-causal", 129, options=causal)
    yield Case("window-leaves-rows-empty", 129, 65, options={"local_window_size": 8})
    nobody = {"local_window_size": (66, 19), "query_seq_lengths": (4, 5)}
    yield Case("window-keys-nobody-sees", 5, 400, heads=4, kv_heads=1, options=nobody)
    bottom = {"local_window_size": (20, 3), "causal_alignment": "bottom_right"}
    yield Case("window-bottom-right-65x129", 65, 129, options=bottom)
    yield Case("window-bottom-right-129x65", 129, 65, options=bottom)
    yield Case("window-narrow-1000", 1000, batch=1, options={"local_window_size": (3, 2)})


def _lengths():
    q, k = {"query_seq_lengths": (50, 0, 129)}, {"key_value_seq_lengths": (0, 100, 65)}
    yield Case("lengths-query", 129, batch=3, options=q)
    yield Case("lengths-key", 129, batch=3, options=k)
    yield Case("lengths-both", 129, 100, batch=3, options=q | k)
    yield Case("lengths-causal", 129, batch=3, options=q | k | {"is_causal": True})
    bottom = {"is_causal": True, "causal_alignment": "bottom_right"}
    yield Case("lengths-causal-bottom-right", 129, batch=3, options=q | k | bottom)
    window = {"local_window_size": (10, 5), "causal_alignment": "bottom_right"}
    yield Case("lengths-window-bottom-right", 100, 129, batch=3, options=q | k | window)
    outside = {
        "query_seq_lengths": (-3, 200, 7),
        "key_value_seq_lengths": (64, 2**31 - 1, -(2**31)),
    }
    yield Case("lengths-clamp", 64, batch=3, options=outside | bottom)
    zeros = {"query_seq_lengths": (0, 0), "key_value_seq_lengths": (0, 0)}
    yield Case("lengths-all-zero", 65, options=zeros)


def _heads():
    yield Case("gqa-4-2", 65, heads=4, kv_heads=2)
    yield Case("gqa-6-3-causal", 129, heads=6, kv_heads=3, options={"is_causal": True})
    yield Case("mqa-4-1", 65, 129, heads=4, kv_heads=1)
    yield Case("mqa-8-1-decode", 1, 200, heads=8, kv_heads=1)
    lengths = {"key_value_seq_lengths": (65, 13)}
    yield Case("gqa-bias-lengths", 65, heads=4, kv_heads=2, bias=(1, 4, 65, 65), options=lengths)


def _bias_and_mask():
    b, n, t, s = 2, 2, 65, 70
    for keep in itertools.product((True, False), repeat=4):
        shape = tuple(size if kept else 1 for size, kept in zip((b, n, t, s), keep, strict=True))
        yield Case("bias-" + "x".join(map(str, shape)), t, s, bias=shape, head_dim=16)
    for shape in ((n, t, s), (t, s), (s,), ()):
        name = "bias-rank-" + "x".join(map(str, shape or ("scalar",)))
        yield Case(name, t, s, bias=shape, head_dim=16)
    yield Case("bias-in-query-dtype", t, s, bias=(1, n, t, s), bias_dtype=None)
    for shape in ((1, n, 150, 264), (b, 1, 150, 264), (b, n, 1, 264)):  # rows that TMA can copy
        yield Case(
            "bias-aligned-" + "x".join(map(str, shape)), 150, 264, bias=shape, bias_dtype=None
        )
    ends = {"query_seq_lengths": (130, 20), "key_value_seq_lengths": (200, 77), "is_causal": True}
    yield Case("bias-aligned-lengths", 150, 200, heads=4, kv_heads=2, bias=(b, 4, 150, 200),
               bias_dtype=None, options=ends | {"local_window_size": (70, None)})  # fmt: skip
    yield Case("bias-causal", 129, bias=(1, 2, 129, 129), options={"is_causal": True})
    for shape in (
        (b, n, t, s),
        (b, 1, t, s),
        (1, n, t, s),
        (b, 1, 1, s),
        (b, n, t, 1),
        (n, t, s),
        (t, s),
    ):
        yield Case("mask-" + "x".join(map(str, shape)), t, s, mask=shape, head_dim=16)
    # Rows that TMA can copy.
    for shape in ((1, 1, 150, 272), (b, 1, 150, 272), (b, n, 150, 272), (b, 1, 1, 272)):
        yield Case("mask-aligned-" + "x".join(map(str, shape)), 150, 272, mask=shape)
    features = ends | {"local_window_size": (70, None), "logits_soft_cap": 2.0}
    yield Case("mask-aligned-lengths-cap", 150, 208, heads=4, kv_heads=2, mask=(b, 4, 150, 208),
               options=features)  # fmt: skip
    yield Case("mask-aligned-dim-160", 90, 208, heads=4, kv_heads=2, mask=(b, 4, 90, 208),
               head_dim=160, options={"is_causal": True})  # fmt: skip
    yield Case("mask-bias", t, s, mask=(b, 1, t, s), bias=(1, n, t, s))


def _dims():
    for dim in (8, 16, 40, 64, 72, 96, 104, 128, 136, 160, 192, 200, 256):
        yield Case(f"dim-{dim}", 70, batch=1, head_dim=dim, options={"is_causal": True})
    for dim, value_dim in ((64, 32), (40, 72), (192, 128), (128, 256), (256, 8)):
        yield Case(f"dim-{dim}-value-{value_dim}", 70, batch=1, head_dim=dim, value_dim=value_dim)


def _score_features():
    yield Case("cap", 129, options={"logits_soft_cap": 1.5})
    bias = {"logits_soft_cap": 0.7, "is_causal": True}
    yield Case("cap-bias-mask", 65, 70, bias=(1, 2, 65, 70), mask=(2, 1, 65, 70), options=bias)
    yield Case("cap-traced-scale-gqa", 130, heads=4, kv_heads=2, traced_scale=0.4,
               options={"logits_soft_cap": 2.0, "local_window_size": (40, 3)})  # fmt: skip
    yield Case("alibi", 129, alibi=(2,))
    bottom = {"is_causal": True, "causal_alignment": "bottom_right"}
    yield Case("alibi-causal-bottom-right", 70, 150, alibi=(2, 2), options=bottom)
    lengths = {"query_seq_lengths": (50, 0, 129), "key_value_seq_lengths": (0, 100, 65)}
    yield Case("alibi-lengths", 129, batch=3, alibi=(2,), options=lengths | bottom)
    yield Case("sinks", 65, sinks=(2,))
    yield Case("sinks-lengths", 129, batch=3, heads=4, kv_heads=2, sinks=(3, 4), options=lengths)
    leaves_empty = {"local_window_size": 8}
    yield Case("sinks-of-rows-without-keys", 129, 65, sinks=(2,), options=leaves_empty)
    yield Case("sinks-everything", 129, 70, heads=4, kv_heads=2, bias=(1, 4, 129, 70), alibi=(4,),
               sinks=(4,), traced_scale=0.3, options={"logits_soft_cap": 1.0} | bottom)  # fmt: skip


def _dropout():
    yield Case("dropout", 129, options={"dropout_rate": 0.3})
    yield Case("dropout-high-65x200", 65, 200, heads=4, kv_heads=2, options={"dropout_rate": 0.9})
    window = {"dropout_rate": 0.1, "local_window_size": (20, 3), "logits_soft_cap": 2.0}
    yield Case("dropout-window-cap", 150, sinks=(2,), bias=(1, 2, 150, 150), options=window)
    bottom = {"is_causal": True, "causal_alignment": "bottom_right", "dropout_rate": 0.5}
    yield Case("dropout-causal-alibi", 33, 100, alibi=(2,), options=bottom)


def _sink_tokens():
    for window, tokens in (((8, 0), 4), ((20, 3), 1), ((5, None), 70), ((3, 0), 500)):
        options = {"local_window_size": window, "num_sink_tokens": tokens}
        yield Case(f"sink-tokens-{tokens}-of-{window[0]}", 150, options=options)
    lengths = {"query_seq_lengths": (150, 33), "key_value_seq_lengths": (200, 3)}
    options = {"local_window_size": 9, "num_sink_tokens": 5, "causal_alignment": "bottom_right"}
    yield Case("sink-tokens-lengths", 150, 200, options=options | lengths | {"is_causal": True})


def runs(*lengths):
    """Segment ids 1, 2, ... in runs of these lengths."""
    return tuple(itertools.chain(*([n + 1] * length for n, length in enumerate(lengths))))


def _segments():
    def both(q, k=None):
        return {"query_segment_ids": q, "key_value_segment_ids": q if k is None else k}

    packed = both((runs(50, 1, 70, 8), runs(128, 1)))
    yield Case("segments", 129, options=packed)
    yield Case("segments-causal", 129, heads=4, kv_heads=2, options=packed | {"is_causal": True})
    yield Case("segments-window", 129, options=packed | {"local_window_size": (20, 3)})
    cross = both((runs(30, 0, 40),), (runs(5, 60, 100),))
    yield Case("segments-cross", 70, 165, batch=1, options=cross)
    padded = both((runs(60, 30) + (0,) * 40,), (runs(60, 30) + (7,) * 40,))
    yield Case("segments-padding-sees-nothing", 130, batch=1, options=padded)
    rng = np.random.default_rng(5)
    mixed = both(*(tuple(map(tuple, rng.integers(0, 3, (2, 140)))) for _ in range(2)))
    yield Case("segments-mixed", 140, options=mixed)
    lengths = {"query_seq_lengths": (129, 60), "key_value_seq_lengths": (100, 129)}
    yield Case("segments-lengths", 129, sinks=(2,), options=packed | lengths)


def _spans():
    causal = {"is_causal": True}
    yield Case("prefix", 129, options=causal | {"prefix_lengths": (70, 0)})
    yield Case("prefix-past-the-end", 65, options=causal | {"prefix_lengths": (500, -3)})
    spans = {"bidirectional_spans": (((3, 40), (100, 129)), ((50, 60), (0, 0)))}
    yield Case("spans", 150, heads=4, kv_heads=2, options=causal | spans)
    window = {"local_window_size": (10, None)}
    yield Case("spans-window", 150, options=causal | spans | window)
    bottom = {"causal_alignment": "bottom_right", "prefix_lengths": (90, 33)}
    yield Case("spans-prefix-bottom-right", 70, 129, options=causal | spans | bottom)
    lengths = {"query_seq_lengths": (60, 41), "key_value_seq_lengths": (129, 55)}
    yield Case("spans-lengths-bottom-right", 70, 129, options=causal | spans | bottom | lengths)
    nested = {"bidirectional_spans": (((0, 100), (20, 30), (90, 120)), ((5, 2), (-9, 4), (7, 8)))}
    yield Case("spans-nested", 129, options=causal | nested)
    sinks = {"num_sink_tokens": 3, "local_window_size": (9, None)}
    yield Case("spans-sink-tokens", 150, options=causal | spans | sinks)


def packed(*pairs, first=(0, 0), **options):
    """cu_seqlens_q and cu_seqlens_k of sequences with (query length, key length), and options."""
    ends = np.cumsum([first, *pairs], axis=0)
    return dict(zip(PACKED, map(tuple, ends.T.tolist()), strict=True)) | options


def _packed():
    def case(name, q_len, k_len, options, **fields):
        return Case(f"packed-{name}", q_len, k_len, batch=1, options=options, **fields)

    same = ((64, 64), (1, 1), (70, 70), (0, 0), (129, 129), (36, 36))
    causal = {"is_causal": True}
    bottom = causal | {"causal_alignment": "bottom_right"}
    yield case("dense", 300, 300, packed(*same))
    yield case("causal", 300, 300, packed(*same, **causal), heads=4, kv_heads=2)
    cross = ((0, 30), (20, 0), (50, 131), (7, 3), (0, 0), (90, 100), (5, 0))
    yield case("cross", 172, 264, packed(*cross))
    yield case("cross-causal", 172, 264, packed(*cross, **causal))
    yield case("cross-bottom-right", 172, 264, packed(*cross, **bottom))
    gaps = packed((30, 40), (0, 5), (60, 70), first=(11, 7), **bottom)
    yield case("gaps", 150, 140, gaps)
    yield case("window", 172, 264, packed(*cross, local_window_size=(9, 4)))
    yield case("window-bottom-right", 172, 264, packed(*cross, **bottom, local_window_size=20))
    yield case("nothing", 65, 70, packed())
    yield case("one", 65, 129, packed((65, 129)))
    yield case("many", 200, 200, packed(*((n % 5, n % 5) for n in range(100)), **causal))
    features = packed(*cross, **bottom, logits_soft_cap=2.0)
    yield case("cap-alibi-sinks", 172, 264, features, alibi=(2,), sinks=(2,))
    yield case("dropout", 172, 264, packed(*cross, dropout_rate=0.3))
    # So long on average that the Hopper forward has tiles for each.
    yield case("long-dense", 331, 331, packed((130, 130), (1, 1), (0, 0), (200, 200)))
    yield case("long-causal", 320, 320, packed((3, 3), (250, 250), (67, 67), **causal),
               heads=4, kv_heads=2, value_dim=24)  # fmt: skip
    cross = ((0, 30), (150, 0), (70, 190), (77, 23))
    yield case("long-bottom-right", 330, 290, packed(*cross, first=(11, 7), **bottom))
    yield case("long-window", 297, 243, packed(*cross, local_window_size=(20, 9)), value_dim=56)
    features = packed(*cross, first=(13, 0), **bottom, logits_soft_cap=2.0)
    yield case("long-cap-alibi", 310, 264, features, alibi=(4,), heads=4, kv_heads=2)


def _scale():
    yield Case("scale-static", 65, options={"scale": 0.31})
    yield Case("scale-traced", 65, traced_scale=0.31)
    yield Case("scale-traced-negative", 65, traced_scale=-0.2, options={"is_causal": True})


EVERYTHING = Case(
    "everything", 129, 150, batch=3, heads=4, kv_heads=2, head_dim=40, value_dim=24,
    bias=(1, 4, 129, 150), mask=(3, 1, 129, 150), traced_scale=0.2,
    options={
        "is_causal": True, "causal_alignment": "bottom_right", "local_window_size": (60, None),
        "query_seq_lengths": (129, 77, 0), "key_value_seq_lengths": (150, 31, 20),
    },
)  # fmt: skip

GROUPS = (
    _dense, _causal, _windows, _lengths, _heads, _bias_and_mask, _dims, _scale,
    _score_features, _dropout, _sink_tokens, _segments, _spans, _packed,
)  # fmt: skip
CASES = {case.name: case for group in GROUPS for case in group()} | {EVERYTHING.name: EVERYTHING}


def every_case():
    """A parametrize mark over all cases."""
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def some_cases(*names):
    """A parametrize mark over the cases named."""
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)
