"""The package's kernels on the emulator, called with the cases of cases.py."""

import concurrent.futures
import ctypes
import dataclasses
import math

import numpy as np
from compare import with_seeds
from emulator.emulator import Device, FaultError, build

HEAD_DIMS = (64, 96, 128, 192, 256)
UNBOUNDED = 2**31 - 1
ELEMENT_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "bool": 3}  # ElementType of problem.h

_INTS = (
    "batch", "q_len", "k_len", "heads", "kv_heads", "head_dim", "value_dim", "bf16",
    "deterministic", "window_left", "window_right", "bottom_right", "num_sink_tokens",
    "dropout_steps", "span_count", "sequences", "slopes_by_entry", "sinks_by_entry",
)  # fmt: skip
_POINTERS = (
    "q", "k", "v", "o", "lse", "device_scale", "q_lengths", "k_lengths",
    "d_o", "dq", "dk", "dv", "d_lse", "scratch", "alibi_slopes", "sinks", "dropout_seeds",
    "q_segments", "k_segments", "spans", "cu_q", "cu_k",
)  # fmt: skip


# Fields of Call by the names of the arrays that attention takes.
_ARRAYS = {
    "query_seq_lengths": "q_lengths",
    "key_value_seq_lengths": "k_lengths",
    "alibi_slopes": "alibi_slopes",
    "sinks": "sinks",
    "dropout_seeds": "dropout_seeds",
    "query_segment_ids": "q_segments",
    "key_value_segment_ids": "k_segments",
    "cu_seqlens_q": "cu_q",
    "cu_seqlens_k": "cu_k",
}
_GRADIENTS = ("query", "key", "value")


class _ScoreArray(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)]
    _fields_ += [
        (n, ctypes.c_int32) for n in ("type", "batch", "heads", "q_len", "k_len", "unused")
    ]


class _Call(ctypes.Structure):
    """Mirror of Call in kernels.cc."""

    _fields_ = [(n, ctypes.c_int32) for n in _INTS] + [(n, ctypes.c_void_p) for n in _POINTERS]
    _fields_ += [(n, _ScoreArray) for n in ("bias", "mask", "d_bias")]
    _fields_ += [("scratch_floats", ctypes.c_int64)]
    _fields_ += [("scale", ctypes.c_float), ("soft_cap", ctypes.c_float)]


class Results(dict):
    """What compare.run() returns, and in `session` the emulator's counters."""

    session = None


# Mutants are many, and are run a few times each: one has the element type it is run with.
_OTHER_TYPE = {
    "float16": (
        "dispatch.h",
        "if (type == ElementType::kBfloat16) return f(Type<__nv_bfloat16>{});",
        "",
    ),
    "bfloat16": ("dispatch.h", "if (type == ElementType::kHalf) return f(Type<__half>{});", ""),
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """What is compiled of edited kernels: for one call, since compiling takes longer than that.

    Attributes:
      edits: as of build().
      dtype: "float16" or "bfloat16".
      choices: the Hopper family's kernels, as JFA_CHOICES in kernels.cc; empty: all.
    """

    edits: tuple[tuple[str, str, str], ...]
    dtype: str
    choices: str


def library(head_dim, family, backward, mutant=None):
    """One pass of a family, compiled for head dims up to one of HEAD_DIMS.

    Args:
      head_dim: the largest.
      family: "sm80" or "sm90"; None: no kernels, only what says which ones a call needs.
      backward: that pass, or the forward.
      mutant: a Mutant, if edited.
    """
    flags, edits = (), ()
    defines = (
        f"JFA_HEAD_DIMS={head_dim}", f"JFA_FAMILY={family[2:] if family else 0}",
        f"JFA_BACKWARD={int(backward)}",
    )  # fmt: skip
    if mutant or not family:
        flags = ("-O0",)
    if mutant:
        edits = (*mutant.edits, _OTHER_TYPE[mutant.dtype])
        defines += (f"JFA_CHOICES={mutant.choices}",) if mutant.choices else ()
    loaded = build("kernels.cc", *flags, defines=defines, edits=edits)
    loaded.call_bytes.restype = ctypes.c_uint64
    loaded.scratch_floats.restype = ctypes.c_int64
    loaded.choices.restype = loaded.schedule.restype = ctypes.c_char_p
    if loaded.call_bytes() != ctypes.sizeof(_Call):
        raise TypeError("Call in kernels.cc and _Call in kernels.py differ")
    return loaded


def _operands(case, dtype, general, deterministic):
    """A case's _Call, its arrays, and a function that registers those that both passes read."""
    arrays, static = with_seeds(case.arrays(dtype)), case.static()
    query, key, value = arrays["query"], arrays["key"], arrays["value"]
    batch, q_len, heads, head_dim = query.shape
    bias, mask = arrays.get("bias"), arrays.get("mask")
    scale = static.get("scale") or 1 / math.sqrt(head_dim)
    device_scale = arrays.get("scale", np.float32(scale) if general else None)
    left, right = _window(**static)
    values = {
        "batch": batch, "q_len": q_len, "k_len": key.shape[1],
        "heads": heads, "kv_heads": key.shape[2], "head_dim": head_dim, "value_dim": value.shape[3],
        "bf16": dtype == "bfloat16", "deterministic": deterministic,
        "window_left": left, "window_right": right,
        "bottom_right": static.get("causal_alignment") == "bottom_right",
        "scale": scale if device_scale is None else 1.0,
        "soft_cap": static.get("logits_soft_cap") or 0.0,
        "num_sink_tokens": 0 if left == UNBOUNDED else static.get("num_sink_tokens", 0),
        "dropout_steps": round(static.get("dropout_rate", 0) * 2**16),
    }  # fmt: skip
    spans = _spans(arrays)
    if spans is not None:
        values["span_count"] = spans.shape[1]
    if "cu_seqlens_q" in arrays:
        values["sequences"] = arrays["cu_seqlens_q"].shape[1] - 1
    for name, field in (("alibi_slopes", "slopes_by_entry"), ("sinks", "sinks_by_entry")):
        values[field] = np.ndim(arrays.get(name)) == 2
    call = _Call(**values)

    def prepare(memory):
        call.q, call.k, call.v = (memory.input(n, arrays[n]) for n in ("query", "key", "value"))
        if device_scale is not None:
            call.device_scale = memory.input("scale", np.reshape(device_scale, 1))
        for name, field in _ARRAYS.items():
            setattr(call, field, memory.input(name, arrays.get(name)))
        call.spans = memory.input("spans", spans)
        call.bias = _scores(memory.input("bias", bias), bias)
        call.mask = _scores(memory.input("mask", mask), mask)

    return call, arrays, prepare


def _dim(call):
    """That the kernels of a call are compiled for."""
    return next(d for d in HEAD_DIMS if d >= max(call.head_dim, call.value_dim))


def schedule(case, dtype, family="sm90", backward=False, **device):
    """What the plan of a case's forward or backward says of its order and of what comes before."""
    call, _, prepare = _operands(case, dtype, False, False)
    with Device(library(_dim(call), None, False), **device) as memory:
        prepare(memory)
        arguments = ctypes.byref(memory.session), ctypes.byref(call), family.encode(), int(backward)
        text = memory.library.schedule(*arguments).decode()
        if memory.session.fault:
            raise FaultError(memory.session.fault.decode())
    return text


def run(case, dtype, *, gradients=True, general=False, deterministic=False, lse_cotangent=True,
        family="sm80", edits=(), **device):  # fmt: skip
    """Runs forward and backward of a case; Results, without the gradients of a scale and of sinks.

    A case's arrays may hold cu_seqlens_q and cu_seqlens_k, [batch, sequences + 1] each.

    Args:
      case: a Case.
      dtype: "float16" or "bfloat16".
      gradients: run the backward too.
      general: pass the scale as an array, so that the kernels for general scores run in any case.
      deterministic: dQ summed in a fixed order.
      lse_cotangent: give the backward a gradient of lse.
      family: of kernels: "sm80" or "sm90".
      edits: as of build(): run a mutant of the last pass that runs.
      **device: arguments of Device.

    Raises:
      FaultError: a kernel did what no kernel may, or the call was refused.
    """
    call, arrays, prepare = _operands(case, dtype, general, deterministic)
    query, value, bias = arrays["query"], arrays["value"], arrays.get("bias")
    batch, q_len, heads, _ = query.shape
    dim = _dim(call)

    mutant = None
    if edits:
        choices = ""
        if family == "sm90":  # what chooses may be edited too
            host = tuple(edit for edit in edits if edit[0].endswith(".h"))
            chooser = library(dim, None, False, Mutant(host, dtype, "") if host else None)
            with Device(chooser, **device) as memory:
                prepare(memory)
                choices = _choices(memory, call, gradients)
        mutant = Mutant(edits, dtype, choices)

    # Each in a thread, since compiling takes long; the last is the mutant.
    compilations = [(dim, family, True, mutant)] if gradients else []
    compilations.insert(0, (dim, family, False, None if gradients else mutant))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        forward, *backward = pool.map(lambda arguments: library(*arguments), compilations)

    with Device(forward, **device) as memory:
        prepare(memory)
        # NaN cannot be a result: what is left alone fails the caller's comparison as well.
        out = np.full((batch, q_len, heads, value.shape[3]), np.nan, query.dtype)
        lse = np.full((batch, heads, q_len), np.nan, np.float32)
        _add_scratch(memory, call, family, "forward_scratch")
        call.o, call.lse = memory.output("out", out), memory.output("lse", lse)
        memory.call("attention_forward", ctypes.byref(call), family.encode())
        results = Results(out=out, lse=lse)
        results.session = memory.session
    if not gradients:
        return results

    with Device(*backward, **device) as memory:
        prepare(memory)
        # What the forward wrote is an input now, as it is to the package's second call.
        call.o, call.lse = memory.input("out", out), memory.input("lse", lse)
        d_out, d_lse = case.cotangents(dtype)
        call.d_o = memory.input("d_out", d_out)
        call.d_lse = memory.input("d_lse", d_lse if lse_cotangent else None)
        gradient = {n: np.full(arrays[n].shape, np.nan, dtype=query.dtype) for n in _GRADIENTS}
        call.dq, call.dk, call.dv = (memory.output(f"d_{n}", gradient[n]) for n in _GRADIENTS)
        if bias is not None:
            d_bias = np.full(bias.shape, np.nan, np.float32)
            call.d_bias = _scores(memory.output("d_bias", d_bias), d_bias)
        _add_scratch(memory, call, family, "scratch", is_backward=True)
        memory.call("attention_backward", ctypes.byref(call), family.encode())
        results |= gradient
        if bias is not None:
            results["bias"] = d_bias.astype(bias.dtype)
        results.session.add(memory.session)
    return results


def _choices(memory, call, is_backward):
    """Mutant's choices, of the last pass that runs."""
    arguments = ctypes.byref(memory.session), ctypes.byref(call), int(is_backward)
    return memory.library.choices(*arguments).decode()


def _add_scratch(memory, call, family, name, is_backward=False):
    """Allocates what the plan of a call says that it needs."""
    arguments = ctypes.byref(memory.session), ctypes.byref(call), family.encode(), int(is_backward)
    call.scratch_floats = memory.library.scratch_floats(*arguments)
    if memory.session.fault:
        raise FaultError(memory.session.fault.decode())
    scratch = np.full(call.scratch_floats, np.nan, np.float32)
    call.scratch = memory.output(name, scratch, scratch=True)


def _spans(arrays):
    """What bidirectional() of _options.py makes of prefixes and spans."""
    spans, prefixes = arrays.get("bidirectional_spans"), arrays.get("prefix_lengths")
    if prefixes is None:
        return spans
    prefix = np.stack([np.zeros_like(prefixes), prefixes], axis=-1)[:, None]
    return prefix if spans is None else np.concatenate([prefix, spans], axis=1)


def _window(is_causal=False, local_window_size=None, **_):
    """Problem's window_left and window_right."""
    window = local_window_size if local_window_size is not None else (None, None)
    if isinstance(window, int):
        window = (window, window)
    left, right = (UNBOUNDED if size is None else size for size in window)
    return left, min(right, 0) if is_causal else right


def _scores(pointer, array):
    """An array of rank 4 or less as one value per score; absent for None."""
    if array is None:
        return _ScoreArray()
    extents = (1,) * (4 - array.ndim) + array.shape
    return _ScoreArray(pointer, ELEMENT_TYPES[array.dtype.name], *extents)
