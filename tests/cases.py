"""The calls that every implementation is judged on: shapes, options, and inputs from N(0, 1)."""

import dataclasses
import itertools
import zlib

import ml_dtypes
import numpy as np
import pytest

LENGTHS = ("query_seq_lengths", "key_value_seq_lengths")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention; `options` are its keyword arguments, all but arrays drawn here."""

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
    options: dict = dataclasses.field(default_factory=dict, hash=False)

    def arrays(self, dtype):
        """query, key, value and, where the case has them, bias, mask, lengths and scale."""
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
        for name in LENGTHS:
            if name in self.options:
                arrays[name] = np.asarray(self.options[name], np.int32)
        if self.traced_scale is not None:
            arrays["scale"] = np.float32(self.traced_scale)
        return arrays

    def static(self):
        """The keyword arguments that are not arrays."""
        return {name: value for name, value in self.options.items() if name not in LENGTHS}

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
    yield Case("mask-bias", t, s, mask=(b, 1, t, s), bias=(1, n, t, s))


def _dims():
    for dim in (8, 16, 40, 64, 72, 96, 104, 128, 136, 160, 192, 200, 256):
        yield Case(f"dim-{dim}", 70, batch=1, head_dim=dim, options={"is_causal": True})
    for dim, value_dim in ((64, 32), (40, 72), (192, 128), (128, 256), (256, 8)):
        yield Case(f"dim-{dim}-value-{value_dim}", 70, batch=1, head_dim=dim, value_dim=value_dim)


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

GROUPS = (_dense, _causal, _windows, _lengths, _heads, _bias_and_mask, _dims, _scale)
CASES = {case.name: case for group in GROUPS for case in group()} | {EVERYTHING.name: EVERYTHING}


def every_case():
    """A parametrize mark over all cases."""
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def some_cases(*names):
    """A parametrize mark over the cases named."""
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)
