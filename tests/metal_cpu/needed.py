"""What cannot run is skipped; where every change is checked (CI is set) it fails."""

import os
import sys

import mlx.core as mx
import pytest
from msl_build import why_not


def need_cpu_harness():
    """Skips or fails the test where kernels cannot be run on this CPU."""
    if reason := why_not():
        _stop(reason, where="linux")


def need_metal():
    """Skips or fails the test where there is no Mac's GPU."""
    if not mx.metal.is_available():
        _stop("needs a Mac's GPU", where="darwin")


def _stop(reason, where):
    required = sys.platform == where and os.environ.get("CI")
    (pytest.fail if required else pytest.skip)(reason)
