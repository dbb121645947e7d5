"""A faster BLAS for mlx's CPU backend on Linux, where one is installed.

The Linux wheel links the reference BLAS, 50 times slower at float32 matrix products
than OpenBLAS. Loaded first and globally, OpenBLAS answers for its symbols.
"""

from __future__ import annotations

import ctypes
import sys

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


def preload_blas() -> str | None:
    """Load OpenBLAS before the first ``import mlx.core``; its name, or None.

    Does nothing on macOS, where mlx uses Accelerate, or once mlx is imported.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None
