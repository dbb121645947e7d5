"""Where kernels run in these tests, and how close they must come."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "metal_cpu"),
]

from metal_cpu import CPUFactory  # noqa: E402
from needed import need_cpu_harness, need_metal  # noqa: E402


@pytest.fixture
def assert_rounded_once(tolerances):
    """A function: a result is float32's arithmetic on numbers around 1, rounded once."""

    def assert_rounded_once(result, expected):
        half = result.dtype != mx.float32
        rounding = mx.finfo(result.dtype).eps / 2 * np.abs(expected) if half else 0
        result = np.array(result.astype(mx.float32), np.float64)
        assert result.shape == expected.shape
        # Not a comparison that a NaN passes.
        assert np.all(np.abs(result - expected) <= rounding + tolerances["kernel"])

    return assert_rounded_once


@pytest.fixture
def cpu_factory():
    """Runs kernels on this CPU and counts what they touch."""
    need_cpu_harness()
    return CPUFactory()


@pytest.fixture
def gpu():
    """Computes on a Mac's GPU."""
    need_metal()
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(mx.cpu)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("gpu", marks=pytest.mark.metal),
    ]
)
def factory(request):
    """The CPU's, or Metal itself on a Mac."""
    if request.param == "cpu":
        return request.getfixturevalue("cpu_factory")
    request.getfixturevalue("gpu")
    return mx.fast.metal_kernel
