"""What makes mlx's CPU backend quicker on Linux: a BLAS, and a heap that keeps memory.

The Linux wheel links the reference BLAS, 50 times slower at float32 matrix products
than OpenBLAS. Loaded first and globally, OpenBLAS answers for its symbols.

Every result of an operation is a new array. The C library gives large ones back to the
system when they are freed, and the next one is mapped and cleared anew, page by page:
that costs element-wise operations four times their arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

# Of glibc's mallopt: when freed memory is given back, and from which size on an array
# has a mapping of its own.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


def preload_blas() -> str | None:
    """Load OpenBLAS before the first ``import mlx.core``; its name, or None.

    Does nothing on macOS, where mlx uses Accelerate, or once mlx is imported.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    _keep_freed_memory()
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def _keep_freed_memory() -> None:
    """Have the C library keep what is freed, for the next array."""
    # Another C library than glibc has no such call, and keeps its own ways.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**30)
