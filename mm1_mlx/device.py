"""How fast the device is: what its maker says, or what it reaches."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import mlx.core as mx

from mm1_mlx.chips import CHIPS, Chip
from mm1_mlx.errors import MemoryLimitError
from mm1_mlx.room import allowed
from mm1_mlx.sizes import human_bytes

# More than any cache holds: the largest of a Mac's chip has 96 MB.
READ_BYTES = 1 << 29
# A square product's side, on a GPU and on a CPU: long enough to time.
PRODUCT_SIDES = (4096, 1024)
ROUNDS = 5
# What a forecast measures on a CPU: a tenth of a second, without OpenBLAS as well.
QUICK_BYTES, QUICK_SIDE = 1 << 26, 512


def this_chip(dtype: mx.Dtype) -> Chip | None:
    """The default device: as its maker has it, or else measured quickly, once.

    None where there is no room to measure.
    """
    on_cpu = mx.default_device() == mx.cpu
    try:
        return _chip(dtype, on_cpu)
    except MemoryLimitError:
        return None


@cache
def _chip(dtype: mx.Dtype, on_cpu: bool) -> Chip:
    if not on_cpu:
        name = str(mx.device_info().get("device_name", ""))
        if chip := nominal(name, gpu_cores()):
            return chip
    return measure_speed(dtype, QUICK_BYTES, QUICK_SIDE if on_cpu else None)


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

    Raises:
        MemoryLimitError: the array has no room.
    """
    side = side or PRODUCT_SIDES[mx.default_device() == mx.cpu]
    room, need = allowed(), max(read_bytes, 3 * side**2 * dtype.size)
    if room is not None and room < need:
        raise MemoryLimitError(
            f"how fast this machine is is measured on {human_bytes(need)}, but "
            f"{human_bytes(room)} are free here; end other programs"
        )
    bandwidth = _bandwidth(dtype, read_bytes)
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
    # Of those that are not sold yet its maker says nothing.
    known = [chip for chip in CHIPS if chip.name == name and chip.memory]
    chips = sorted(known, key=lambda chip: chip.gpu_cores)
    if gpu_cores is None:
        # Several of one name differ in their bandwidth.
        return chips[0] if len(chips) == 1 else None
    for chip in chips:
        if chip.gpu_cores >= gpu_cores:
            flops = chip.flops * gpu_cores / chip.gpu_cores
            return replace(chip, gpu_cores=gpu_cores, flops=flops)
    return None


def gpu_cores() -> int | None:
    """How many the GPU has, None where the system does not say."""
    if sys.platform != "darwin":
        return None
    said = printed("ioreg", "-rd1", "-c", "AGXAccelerator")
    found = re.search(r'"gpu-core-count" = (\d+)', said or "")
    return int(found[1]) if found else None


def printed(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
