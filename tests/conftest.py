"""Eight CPU devices for the partitioning tests, and the mark `gpu` for what needs a CUDA device."""

import os

_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):  # read when jax starts its CPU backend
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
# Several test processes may share one GPU, and the stress tests need most of it to themselves.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import pytest  # noqa: E402

from jax_flashattn import _ffi  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--cuda-family",
        default="auto",
        help="the kernel family that implementation='cuda' and None run in this session",
    )


def pytest_configure(config):
    chosen = config.getoption("--cuda-family")
    if chosen != "auto":
        named = _ffi.family
        _ffi.family = lambda options: chosen if named(options) == "auto" else named(options)


def _has_cuda():
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def pytest_collection_modifyitems(items):
    if _has_cuda():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="jax has no CUDA device"))


@pytest.fixture(autouse=True)
def _device(request):
    """Tests without the mark run on the CPU, also where there is a GPU."""
    if request.node.get_closest_marker("gpu"):
        yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            yield


@pytest.fixture
def cpu_mesh():
    """Makes a mesh of CPU devices: cpu_mesh((2, 4), ("data", "model"))."""

    def make(shape, names, axis_type=jax.sharding.AxisType.Auto):
        return jax.make_mesh(
            shape, names, devices=jax.devices("cpu")[:8], axis_types=(axis_type,) * len(names)
        )

    return make
