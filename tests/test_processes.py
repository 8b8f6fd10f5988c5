"""Processes that fork, are interrupted, or run out of device memory; always a right call after."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from test_faults import FROM_PATH, PACKAGE, PLATFORMS, python

PRELUDE = """
import functools, gc, hashlib, os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from jax_flashattn import attention

def results(implementation, shape=(1, 65, 2, 16)):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    call = functools.partial(attention, deterministic=True, implementation=implementation)
    gradients = implementation == "cuda"  # compiling them for a CPU takes too long
    made = jax.jit(lambda x: jax.vjp(call, x, x, x)[1](x) if gradients else [call(x, x, x)])(x)
    return hashlib.sha256(b"".join(np.asarray(y).tobytes() for y in made)).hexdigest()
"""


def settings(implementation):
    platforms = "cpu" if implementation == "xla" else "cuda,cpu"
    return {"JAX_PLATFORMS": platforms, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@pytest.mark.parametrize("implementation", PLATFORMS)
def test_fork_after_import(implementation):
    """Importing starts no backend and no CUDA context, neither of which survives a fork."""
    script = f"""
children = []
for _ in range(2):
    end, start = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(start, results({implementation!r}).encode())
        os._exit(0)
    os.close(start)
    children.append((pid, end))
for pid, end in children:
    print(os.read(end, 100).decode(), "status", os.waitpid(pid, 0)[1])
print(results({implementation!r}), "status 0")
"""
    code, text = python(PRELUDE + script, path=PACKAGE.parent, **settings(implementation))
    assert code == 0, text
    digests = [line.split()[0] for line in text.splitlines() if line.endswith(" status 0")]
    assert len(digests) == 3, text
    assert len(digests[0]) == 64
    assert len(set(digests)) == 1


@pytest.mark.parametrize(
    ("implementation", "sent"),
    [
        ("xla", signal.SIGINT),
        pytest.param("cuda", signal.SIGINT, marks=pytest.mark.gpu),
        pytest.param("cuda", signal.SIGTERM, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_interrupted_process_ends(implementation, sent):
    """In the midst of calls; no process is left on the device, and others go on there."""
    script = f"""
signal.signal(signal.SIGINT, signal.default_int_handler)
results({implementation!r})
print("running", flush=True)
x = jnp.ones((1, 1000, 2, 16), jnp.bfloat16)
call = jax.jit(functools.partial(attention, implementation={implementation!r}))
while True:
    x = jax.block_until_ready(call(x, x, x))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", FROM_PATH + PRELUDE + script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PACKAGE.parent,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | settings(implementation),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "running\n", process.stderr.read()
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (sent == signal.SIGINT)
    if implementation == "xla":
        return
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
        there = subprocess.run(command, capture_output=True, text=True).stdout.split()
        assert str(process.pid) not in there
    again = f"{PRELUDE}\nprint(len(results({implementation!r})))"
    code, text = python(again, path=PACKAGE.parent, **settings(implementation))
    assert code == 0, text
    assert "64" in text.splitlines()


@pytest.mark.gpu
def test_no_memory_for_results_and_scratch():
    """RESOURCE_EXHAUSTED, from XLA before any kernel; other calls then give the bits they gave.

    The operand takes a fifth of what there is; its three gradients, out and dq in float32 seven.
    """
    script = """
first = results("cuda")
device = jax.devices()[0]
limit = device.memory_stats()["bytes_limit"]
x = jnp.ones((limit // 5 // 2**16, 64, 8, 64), jnp.bfloat16).block_until_ready()
call = functools.partial(attention, implementation="cuda")
program = jax.jit(lambda x: jax.vjp(call, x, x, x)[1](x))
try:
    jax.block_until_ready(program(x))
    sys.exit(f"{x.nbytes} of {limit} bytes were not too many")
except jax.errors.JaxRuntimeError as error:
    print(str(error).split(":")[0])
gc.collect()
print("the same bits", results("cuda") == first)
"""
    code, text = python(
        PRELUDE + script, path=PACKAGE.parent,
        JAX_PLATFORMS="cuda,cpu", XLA_PYTHON_CLIENT_PREALLOCATE="true",
        XLA_PYTHON_CLIENT_MEM_FRACTION="0.03",
    )  # fmt: skip
    assert code == 0, text
    assert "RESOURCE_EXHAUSTED" in text
    assert "the same bits True" in text
