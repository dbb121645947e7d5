"""What makes mlx's CPU backend quicker on Linux: a BLAS, and a heap that keeps memory.

The Linux wheel links the reference BLAS, 50 times slower at float32 matrix products
than OpenBLAS. Loaded first and globally, OpenBLAS answers for its symbols.

Every result of an operation is a new array. The C library gives large ones back to the
system when they are freed, and the next one is mapped and cleared anew, page by page:
that costs element-wise operations four times their arithmetic. So the heap keeps them,
and mlx, which would keep them beside it by their sizes, does not.
"""

from __future__ import annotations

import ctypes
import sys

# Of glibc's mallopt: when freed memory is given back, and from which size on an array
# has a mapping of its own.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Free memory at the heap's end that is kept: that of an operation, not of a model.
KEPT = 32 * 2**20
LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


def preload_blas() -> str | None:
    """Load OpenBLAS before the first ``import mlx.core``; its name, or None.

    Does nothing on macOS, where mlx uses Accelerate, or once mlx is imported.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    loaded = _load_first(LIBRARIES)
    if _keep_freed_memory():
        _keep_nothing_twice()
    return loaded


def _load_first(names: tuple[str, ...]) -> str | None:
    """Load the first of the libraries that is there, for all that is loaded after it."""
    for name in names:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def _keep_freed_memory() -> bool:
    """Have the C library keep what is freed, for the next array; whether it does."""
    # Another C library than glibc has no such call, and keeps its own ways.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, KEPT) and mallopt(_MMAP_THRESHOLD, 2**30))


def _keep_nothing_twice() -> None:
    """Have mlx give freed arrays to the heap, where any size can use them again."""
    import mlx.core as mx

    # A graphics processor's memory is not the heap's.
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        mx.set_cache_limit(0)
