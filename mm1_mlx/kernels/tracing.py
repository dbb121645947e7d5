"""Whether what runs is being traced into a file, which holds mlx's own operations alone.

A function with a gradient of its own has no form there; nor is the gradient wanted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

_into_file: ContextVar[bool] = ContextVar("into_file", default=False)


@contextmanager
def into_file() -> Iterator[None]:
    """Within, what stands for mlx's operations on a CPU steps aside for them."""
    token = _into_file.set(True)
    try:
        yield
    finally:
        _into_file.reset(token)


def on_cpu() -> bool:
    """Whether operations run on a CPU and may be ones of ours."""
    return mx.default_device() == mx.cpu and not _into_file.get()
