"""Where kernels run in these tests."""

import os
import sys
from pathlib import Path

import mlx.core as mx
import pytest

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[1] / "metal_cpu"),
]

from metal_cpu import CPUFactory  # noqa: E402
from msl_build import why_not  # noqa: E402


@pytest.fixture
def cpu_factory():
    """Runs kernels on this CPU and counts what they touch."""
    if reason := why_not():
        # Where every change is checked, what cannot run is no pass.
        required = sys.platform.startswith("linux") and os.environ.get("CI")
        (pytest.fail if required else pytest.skip)(reason)
    return CPUFactory()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("gpu", marks=pytest.mark.metal),
    ]
)
def factory(request):
    """The CPU's, or Metal itself on a Mac."""
    if request.param == "cpu":
        yield request.getfixturevalue("cpu_factory")
        return
    if not mx.metal.is_available():
        pytest.skip("needs a Mac's GPU")
    mx.set_default_device(mx.gpu)
    yield mx.fast.metal_kernel
    mx.set_default_device(mx.cpu)
