"""The machine: what it is, what its chip should do, and what it does."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.chips import CHIPS, Chip

# More than any cache holds: the largest of a Mac's chip has 96 MB.
READ_BYTES = 1 << 29
# A square product's side, on a GPU and on a CPU: long enough to time.
PRODUCT_SIDES = (4096, 1024)
ROUNDS = 5
PACKAGES = ("mm1-mlx", "mlx", "mlx-lm")
ROOT = Path(__file__).parents[2]


def measure_speed(
    dtype: mx.Dtype, read_bytes: int = READ_BYTES, side: int | None = None
) -> Chip:
    """The default device as a chip: the bytes and operations a second that it reached.

    The best of several runs: a limit is what is possible.

    Args:
        dtype: of the numbers.
        read_bytes: of the array that is read, by a product with a vector as decoding has
            them and by a sum.
        side: of the square matrices that are multiplied; by default what suits the device.
    """
    bandwidth = _bandwidth(dtype, read_bytes)
    side = side or PRODUCT_SIDES[mx.default_device() == mx.cpu]
    square = mx.ones((side, side), dtype)
    flops = 2 * side**3 / _fastest(lambda: square @ square)
    mx.clear_cache()
    return Chip("measured", 0, bandwidth, flops, ())


def _bandwidth(dtype: mx.Dtype, read_bytes: int) -> float:
    """Bytes a second of the faster of a product with a vector and a sum."""
    width = 4096
    matrix = mx.ones((max(1, read_bytes // dtype.size // width), width), dtype)
    vector = mx.ones((width, 1), dtype)
    mx.eval(matrix, vector)
    fastest = min(_fastest(lambda: matrix @ vector), _fastest(lambda: mx.sum(matrix)))
    return matrix.nbytes / fastest


def _fastest(run: Callable[[], mx.array]) -> float:
    """Seconds of the fastest of several runs behind one that is not counted."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def nominal(device_name: str, gpu_cores: int | None) -> Chip | None:
    """The chip of this name with what its maker says of it, None where it is unknown.

    Fewer cores than a chip's usual ones take their share of its operations.

    Args:
        device_name: as the device gives it, e.g. "Apple M4 Max".
        gpu_cores: how many it has, None where that is not known.
    """
    name = device_name.removeprefix("Apple ")
    chips = sorted((c for c in CHIPS if c.name == name), key=lambda c: c.gpu_cores)
    if gpu_cores is None:
        # Several of one name differ in their bandwidth.
        return chips[0] if len(chips) == 1 else None
    for chip in chips:
        if chip.gpu_cores >= gpu_cores:
            flops = chip.flops * gpu_cores / chip.gpu_cores
            return replace(chip, gpu_cores=gpu_cores, flops=flops)
    return None


def describe(blas: str | None = None) -> dict[str, Any]:
    """What a measurement depends on, as JSON values.

    Args:
        blas: the library under mlx's CPU backend, None for its own.
    """
    on_gpu = mx.default_device() != mx.cpu
    chip = str(mx.device_info().get("device_name") or platform.machine())
    mac = platform.mac_ver()[0]
    return {
        "chip": chip,
        "device": "GPU" if on_gpu else "CPU",
        "gpu_cores": gpu_cores() if on_gpu else None,
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"macOS {mac}"
        if mac
        else f"{platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "blas": None if on_gpu else blas or "of mlx",
    }


def gpu_cores() -> int | None:
    """How many the GPU has, None where the system does not say."""
    if sys.platform != "darwin":
        return None
    said = _output("ioreg", "-rd1", "-c", "AGXAccelerator")
    found = re.search(r'"gpu-core-count" = (\d+)', said or "")
    return int(found[1]) if found else None


def commit(root: Path = ROOT) -> str | None:
    """The commit of the checkout that runs, with a + where files were changed since.

    None where the package was installed.
    """
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    status = ("status", "--porcelain", "--untracked-files=no")
    changed = _output("git", "-C", str(root), *status)
    return head.strip() + ("+" if changed else "")


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
