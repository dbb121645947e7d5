"""The other end of the comparison: a process that holds one runtime and does as told.

Reads a JSON object a line, ``{"task": NAME, ...}``, and answers with one: what the task
returned. It imports nothing of this project, so that it runs in a peer's environment.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

Task = Callable[..., Any]
# Of every peer's training steps.
TRAINING_RATE = 1e-5


def preload() -> None:
    """Load OpenBLAS before mlx is imported, for every peer alike.

    With ``--our-heap`` what ``mm1_mlx/blas.py`` asks of the C library and of mlx is asked
    for a peer too.
    """
    with suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    if "--our-heap" in sys.argv:
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-1, 1 << 27), (-3, 1 << 27), (-8, 1)):
            mallopt(option, value)
        import mlx.core as mx

        mx.set_cache_limit(0)


def serve(tasks: dict[str, Task]) -> None:
    """Do what is asked on stdin until it ends."""
    # What a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        order = json.loads(line)
        result = tasks[order.pop("task")](**order)
        print(json.dumps(result), file=answers, flush=True)


def timed(tokens: Iterable[Any]) -> dict[str, Any]:
    """Seconds to the first token, tokens per second after it, and the tokens."""
    start = time.perf_counter()
    times, seen = [], []
    for token in tokens:
        times.append(time.perf_counter())
        seen.append(token)
    rest = times[-1] - times[0]
    return {
        "first": times[0] - start,
        "rate": (len(times) - 1) / rest if rest else 0.0,
        "total": times[-1] - start,
        "tokens": seen,
    }


def peak() -> int:
    """The most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def count_products(function: Task, *arrays: Any) -> dict[str, int]:
    """Operations of a function's matrix products, and elements of its softmaxes.

    Read from the graph that mlx traces; nothing is computed.
    """
    import mlx.core as mx

    counts = {"matmul_flops": 0, "softmax_elements": 0}

    def visit(node: dict[str, Any]) -> None:
        if node["type"] != "primitive":
            return
        (_, shape, *_), *_ = node["outputs"]
        size = 1
        for side in shape:
            size *= side
        if node["name"] in ("Matmul", "AddMM"):
            counts["matmul_flops"] += 2 * size * node["inputs"][0][1][-1]
        elif node["name"] == "Softmax":
            counts["softmax_elements"] += size

    mx.export_function(visit, function, *arrays)
    return counts
