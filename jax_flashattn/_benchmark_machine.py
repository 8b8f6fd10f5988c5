"""The machine a benchmark runs on: versions, the device's name, the clock while it is busy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata

import jax

import jax_flashattn
from jax_flashattn import _ffi

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13",
            "nvidia-cudnn-cu12")  # fmt: skip


def environment() -> dict[str, str]:
    """What a published figure must be read with; what this machine does not have is left out."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["jax_flashattn"] = jax_flashattn.__version__
    if _ffi.extension is None:
        found["kernels"] = "none: built without CUDA"
    else:
        info = _ffi.extension.build_info()
        families = ", ".join(info["families"])
        found["kernels"] = f"{families}; CUDA {info['cuda']} for sm {info['architectures']}"
    found["device"] = jax.devices()[0].device_kind
    for name, field in (("driver", "driver_version"), ("power limit", "power.limit")):
        answer = answered(query(field))
        if answer is not None:
            found[name] = answer
    return found


def query(field: str) -> subprocess.Popen | None:
    """Starts asking nvidia-smi about the device; None where it is not a GPU, or there is none."""
    program = shutil.which("nvidia-smi")
    if program is None or jax.default_backend() != "gpu":
        return None
    # nvidia-smi counts all the machine's GPUs, jax only the visible ones.
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return subprocess.Popen(
        [program, f"--query-gpu={field}", "--format=csv,noheader", f"--id={device}"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def answered(process: subprocess.Popen | None) -> str | None:
    """Waits for the answer; None where nvidia-smi has none."""
    if process is None:
        return None
    text = process.communicate()[0].strip()
    return text if process.returncode == 0 and text else None


def megahertz(process: subprocess.Popen | None) -> int | None:
    """The answer to a query of clocks.sm, which reads "1980 MHz"; None for "[N/A]"."""
    words = (answered(process) or "").split()
    return int(words[0]) if words and words[0].isdigit() else None
