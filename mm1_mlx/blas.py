"""What makes mlx's CPU backend quicker on Linux: a BLAS, and a heap that keeps memory.

The Linux wheel links the reference BLAS, 50 times slower at float32 matrix products
than OpenBLAS. Loaded first and globally, OpenBLAS answers for its symbols.

Every result of an operation is a new array. The C library gives large ones back to the
system when they are freed, and the next one is mapped and cleared anew, page by page:
that costs element-wise operations four times their arithmetic. So the heap keeps them,
and mlx, which would keep them beside it by their sizes, does not. That is the whole
process's: where another program's needs differ, ``MM1_HEAP=off`` leaves both as they are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mm1_mlx.errors import ConfigError

# Of glibc's mallopt: how much free memory at the heap's end is kept, from which size on
# an array has a mapping of its own, and how many heaps the threads share.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
# The results of a few operations on a long prompt, not the weights of a model.
KEPT = 128 * 2**20
# As much as mallopt can be told.
KEPT_OF_STEPS = 2**31 - 1
HEAP_VARIABLE = "MM1_HEAP"
LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
# Of the process, as what they are about.
_heap_keeps = False
_loaded: str | None = None
_library: ctypes.CDLL | None = None


def preload_blas() -> str | None:
    """Load OpenBLAS, set the heap up, then import mlx; what was loaded, or None.

    Does nothing on macOS, where mlx uses Accelerate, or once mlx is imported: then it says
    what was loaded before.

    Raises:
        ConfigError: ``MM1_HEAP`` is neither "on" nor "off".
    """
    global _heap_keeps
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return _loaded
    keep = _may_keep()
    _load_first(LIBRARIES)
    if keep and _keep_freed_memory():
        _heap_keeps = True
        _keep_nothing_twice()
    return _loaded


def heap_keeps() -> bool:
    """Whether this process's heap was told to keep freed memory."""
    return _heap_keeps


@contextmanager
def steps_kept() -> Iterator[None]:
    """The heap keeps all that is freed meanwhile: a training step takes it again.

    What it keeps else is given back at the end. A heap that was not set up here is left
    alone.
    """
    if not _heap_keeps:
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_TRIM_THRESHOLD, KEPT_OF_STEPS)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, KEPT)
        give_back()


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """OpenBLAS computes a product in the thread that asks for it.

    Its own threads serve one product at a time and spin until the next: they take a core
    from whoever else computes. Another BLAS, or one that was not loaded here, is left alone.
    """
    if _library is None:
        yield
        return
    threads = _library.openblas_get_num_threads()
    _library.openblas_set_num_threads(1)
    try:
        yield
    finally:
        _library.openblas_set_num_threads(threads)


def give_back() -> None:
    """Give the system what the heap keeps, holes too: after a model is let go.

    A heap that was not set up here is left alone.
    """
    if _heap_keeps:
        ctypes.CDLL(None).malloc_trim(0)


def _load_first(names: tuple[str, ...]) -> None:
    """Load the first of the libraries that is there, for all that is loaded after it."""
    global _loaded, _library
    for name in names:
        try:
            _library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = name
        return


def _may_keep() -> bool:
    """Whether the user lets the process's heap be set up."""
    value = os.environ.get(HEAP_VARIABLE, "on")
    if value not in ("on", "off"):
        raise ConfigError(
            f"{HEAP_VARIABLE}={value!r} is not known; set it to 'off' to leave the heap "
            "as it is, or unset it"
        )
    return value == "on"


def _keep_freed_memory() -> bool:
    """Have the C library keep what is freed, for the next array; whether it does."""
    # Another C library than glibc has no such call, and keeps its own ways.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # An old C library refuses the first; the others alone would do harm. One heap:
    # arrays made by a thread and freed by another leave holes in two.
    options = {_MMAP_THRESHOLD: KEPT, _TRIM_THRESHOLD: KEPT, _ARENA_MAX: 1}
    return all(mallopt(option, value) for option, value in options.items())


def _keep_nothing_twice() -> None:
    """Have mlx give freed arrays to the heap, where any size can use them again."""
    import mlx.core as mx

    # A graphics processor's memory is not the heap's.
    if not (mx.metal.is_available() or mx.cuda.is_available()):
        mx.set_cache_limit(0)
