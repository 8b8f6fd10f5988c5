"""What a call would run, and why."""

from __future__ import annotations

import dataclasses
import inspect

import jax

from jax_flashattn import _api, _ffi, _options, _primitives


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a call of `attention` runs. The fields after `reason` are None on the reference path."""

    platform: str
    implementation: str  # "cuda:<family>" or "xla (reference)"
    reason: str  # why this implementation, and why not a better one
    head_dim: int | None = None  # the compiled one; the call's is filled up to it on the chip
    tile: tuple[int, int] | None = None  # query rows and keys of a forward block
    schedule: str | None = None  # the order of work, and what is in flight
    shared_memory_bytes: int | None = None  # of a forward block
    scratch_bytes_forward: int | None = None
    backward_implementation: str | None = None
    backward_tile: tuple[int, int] | None = None  # query rows and keys, of the kernel for dK and dV
    backward_schedule: str | None = None  # which kernels compute what, and the order of their work
    backward_shared_memory_bytes: int | None = None  # of a block of the kernel that needs most
    scratch_bytes_backward: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.implementation} on {self.platform}: {self.reason}"]
        for name, field in dataclasses.asdict(self).items():
            if name not in ("platform", "implementation", "reason") and field is not None:
                shown = f"{field[0]} x {field[1]}" if isinstance(field, tuple) else f"{field}"
                lines.append(f"  {name.replace('_', ' ')}: {shown}")
        return "\n".join(lines)


def explain(*args, platform: str | None = None, **kwargs) -> Explanation:
    """What `attention` with these arguments would run on a platform, and why, without running it.

    Args:
      *args, **kwargs: those of `attention`; arrays may be jax.ShapeDtypeStruct.
      platform: "cuda", "cpu" and so on; None is the default backend.

    Raises what `attention` would raise, NotImplementedError for a platform included.
    """
    bound = inspect.signature(_api.attention).bind(*args, **kwargs).arguments
    is_array = {name: isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) for name, x in bound.items()}
    arrays = {name: x for name, x in bound.items() if is_array[name]}
    static = {name: x for name, x in bound.items() if not is_array[name]}
    normal = []

    def trace(arrays):
        options, operands, _ = _options.normalise(**arrays, **static)
        normal.append(options)
        return operands

    operands = jax.eval_shape(trace, arrays)
    if platform is None:
        platform = jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform  # jax's older name for it
    return _explain(operands, normal[0], platform)


def _explain(operands, options: _options.Options, platform: str) -> Explanation:
    reference = "xla (reference)"
    if platform != "cuda":
        if options.wants_cuda:
            raise NotImplementedError(_primitives.wrong_platform(options, platform))
        return Explanation(platform, reference, "the kernels need an NVIDIA GPU")
    reason = _primitives.unserved(operands, options, backward=False)
    if reason is not None:
        return Explanation(platform, reference, reason)
    gradient = dataclasses.replace(options, bias_gradient=operands.bias is not None)
    reason = _primitives.unserved(operands, gradient, backward=True)
    device = _ffi.default_device()
    forward = _ffi.plan(operands, options, backward=False, device=device)
    made = Explanation(
        platform,
        f"cuda:{forward.family}",
        _why(forward, operands, options),
        forward.head_dim,
        (forward.q_tile, forward.k_tile),
        forward.schedule,
        forward.shared_memory_bytes,
        4 * forward.scratch_floats,
    )
    if reason is not None:
        return dataclasses.replace(
            made, reason=f"{made.reason}; gradient by the reference: {reason}"
        )
    backward = _ffi.plan(operands, gradient, backward=True, device=device)
    return dataclasses.replace(
        made,
        backward_implementation=f"cuda:{backward.family}",
        backward_tile=(backward.q_tile, backward.k_tile),
        backward_schedule=backward.schedule,
        backward_shared_memory_bytes=backward.shared_memory_bytes,
        scratch_bytes_backward=4 * backward.scratch_floats,
    )


def _why(plan: _ffi.Plan, operands, options: _options.Options) -> str:
    """The plan's reason; where scores are general, with what this call has that makes them so."""
    family, _, scores = plan.why.partition("; ")
    if scores != "general scores":
        return plan.why
    found = {
        "bias": operands.bias is not None,
        "mask": operands.mask is not None,
        "a scale on the device": operands.scale is not None,
        "logits_soft_cap": options.soft_cap is not None,
        "alibi_slopes": operands.alibi_slopes is not None,
        "dropout": operands.dropout_seeds is not None,
    }
    names = ", ".join(name for name, is_there in found.items() if is_there)
    return f"{family}; {scores} ({names})"
