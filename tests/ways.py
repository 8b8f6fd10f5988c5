"""Calls of attention with given arrays, and the ways of running them that must agree."""

import dataclasses
import functools
import os

import jax
import numpy as np
import pytest
from cases import INTEGERS, Case
from compare import DIFFERENTIABLE, assert_same_bits, with_seeds
from emulator import kernels
from emulator.emulator import why_unavailable
from oracle import attend, visible_keys

from jax_flashattn import attention

DTYPE = "bfloat16"
RESULTS = ("out", "lse", "query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Call(Case):
    """A Case some of whose arrays are given, "d_out" and "d_lse" among them."""

    given: dict = dataclasses.field(default_factory=dict, hash=False)

    def arrays(self, dtype=DTYPE):
        given = {name: x for name, x in self.given.items() if not name.startswith("d_")}
        return super().arrays(dtype) | given

    def cotangents(self, dtype=DTYPE):
        d_out, d_lse = super().cotangents(dtype)
        return self.given.get("d_out", d_out), self.given.get("d_lse", d_lse)

    def all_arrays(self):
        return self.arrays() | dict(zip(("d_out", "d_lse"), self.cotangents(), strict=True))

    def but(self, **options):
        """With other options; None removes one."""
        options = self.options | options
        options = {name: value for name, value in options.items() if value is not None}
        return dataclasses.replace(self, options=options)

    def on(self, **arrays):
        """With other arrays; None gives back the one that is drawn, if any."""
        given = {name: x for name, x in (self.given | arrays).items() if x is not None}
        return dataclasses.replace(self, given=given)


def visible(call):
    """bool [B, N, T, S]: which row sees which key."""
    arrays = call.arrays()
    (batch, q_len, heads, _), k_len = arrays["query"].shape, arrays["key"].shape[1]
    lengths = {name: arrays[name] for name in INTEGERS if name in arrays}
    scores = ("scale", "logits_soft_cap", "dropout_rate")
    options = {name: value for name, value in call.static().items() if name not in scores}
    sees = visible_keys(batch, q_len, k_len, **options, **lengths)[:, None]
    return np.broadcast_to(sees & arrays.get("mask", True), (batch, heads, q_len, k_len))


# A way takes a Call and whether gradients are wanted, and returns {name: array}.


def through_jax(implementation, transform=jax.jit):
    """A way from `attention` itself; `transform` is done to it as a function of two pytrees."""

    @functools.cache
    def transformed(options, gradients):
        def function(arrays, cotangents):
            primal = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
            others = {name: x for name, x in arrays.items() if name not in primal}

            def call(primal):
                return attention(
                    **primal, **others, **dict(options), implementation=implementation,
                    deterministic=True, return_lse=True,
                )  # fmt: skip

            (out, lse), pullback = jax.vjp(call, primal)
            return {"out": out, "lse": lse} | (pullback(cotangents)[0] if gradients else {})

        return transform(function)

    def run(call, gradients=True):
        options = tuple(call.static().items())
        return transformed(options, gradients)(call.arrays(), call.cotangents())

    return run


def emulated(call, gradients=True):
    return kernels.run(call, DTYPE, gradients=gradients, deterministic=True)


def oracle(call, gradients=True):
    """Fast, and right but for NaN in padding."""
    arrays, (d_out, d_lse) = call.arrays(), call.cotangents()
    cotangents = {"d_out": d_out, "d_lse": d_lse} if gradients else {}
    arrays = with_seeds(arrays)
    return attend(**arrays, **call.static(), **cotangents, precision="float32")


IMPLEMENTATIONS = {"reference": "xla", "gpu": "cuda"}
WAYS = {name: through_jax(implementation) for name, implementation in IMPLEMENTATIONS.items()}
WAYS["emulator"] = emulated
ALONE_ON_THE_GPU = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="takes the GPU's memory: run it without -n"
)
NO_EMULATOR = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
MARKS = {"reference": (), "emulator": NO_EMULATOR, "gpu": pytest.mark.gpu}


def way_params(*names):
    """Names of ways as parameters of a test, with their marks."""
    return [pytest.param(name, marks=MARKS[name]) for name in names]


def parts(results, index=..., names=RESULTS):
    """Some results as numpy arrays, indexed from the front."""
    return {name: np.asarray(results[name])[index] for name in names if name in results}


def is_exact(run):
    """Kernels sum in one order whatever surrounds them; XLA's depends on what it fuses."""
    return run in (WAYS["emulator"], WAYS["gpu"])


def assert_same(run, actual, desired):
    """The bits of kernels are equal, and those of other ways but for the last one."""
    if is_exact(run):
        assert_same_bits(actual, desired)
    for name, x in desired.items():
        rtol, atol = (1e-6, 1e-5) if name == "lse" else (2.0**-7, 2e-3)
        np.testing.assert_allclose(
            np.float32(actual[name]), np.float32(x), rtol=rtol, atol=atol, err_msg=name
        )


def differing(run, x, y):
    """bool: where two arrays differ by more than assert_same() lets pass."""
    slack = 0 if is_exact(run) else 1e-5
    return ~np.isclose(np.float32(x), np.float32(y), rtol=slack, atol=slack)
