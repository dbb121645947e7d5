"""Which attention runs on this device: the kernels only where right and faster.

Before a kernel is first used it is compared here with ``plain.py``; then both are
timed, once per device, mlx version and kernel text: the times are kept in the user's
cache folder. ``MM1_KERNELS=off`` never uses the kernels, ``on`` uses them untimed, but
never where they disagree.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mm1_mlx.errors import ConfigError, MM1Error
from mm1_mlx.files import read_json, replace_json
from mm1_mlx.folders import cache_folder
from mm1_mlx.kernels import fused, metal, plain
from mm1_mlx.kernels.run import Run

SWITCH = "MM1_KERNELS"

# Largest difference from plain.py, relative to the largest value. Both compute in float32
# and round once, so that half precisions may differ in the last bit.
TOLERANCES = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}

# What is timed, keys and queries: a step of a chat that begins to be packed and of a long
# one, and guessed tokens checked; or the steps of a batch behind a shared prefix.
TIMED_STEPS = ((1024, 1), (4096, 1), (4096, 8))
TIMED_HEADS, TIMED_KV_HEADS = 32, 8
TIMED_BATCH, TIMED_SUFFIX = 8, 256
TIMED_CALLS = 7  # of which the median counts


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    bits: int
    group_size: int
    dtype: mx.Dtype
    head_dim: int

    @classmethod
    def of(cls, q: mx.array, run: Run) -> Variant:
        """The one that attends from q over a run."""
        return cls(run.bits, run.group_size, q.dtype, q.shape[3])

    @property
    def name(self) -> str:
        """Readable, and the key of what was measured."""
        dtype = str(self.dtype).removeprefix("mlx.core.")
        packing = f"{self.bits} bits in {self.group_size}s, " if self.bits else ""
        return f"{packing}{dtype}, head of {self.head_dim}"


@dataclass(frozen=True)
class Verdict:
    """What is known of a variant on a device."""

    use: bool
    error: float
    """Largest difference from plain.py, relative to the largest value."""
    seconds: float | None = None
    """Of the kernels, where they gain least; None where nothing was timed."""
    plain_seconds: float | None = None
    """Of the alternative."""
    unpacked_seconds: float | None = None
    """Of mlx's attention over as many keys that every row holds plain: what packing and
    sharing cost or gain, which is for whoever chose them; nothing here depends on it."""
    reason: str = ""


class Seconds(NamedTuple):
    """Of one call of each, the median."""

    kernels: float
    plain: float
    """Of what runs otherwise."""
    unpacked: float
    """Of mlx's attention over as many plain keys."""


class Kernels:
    """The Metal kernels of one device.

    Args:
        device: its name, under which measurements are kept.
        factory: makes a kernel of its text: ``mx.fast.metal_kernel``.
        store: the file of measurements.
        timed: whether a kernel must also be faster than its alternative.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        device: str,
        factory: metal.Factory,
        store: Path,
        timed: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self._factory = factory
        self._store = store
        self._timed = timed
        self._clock = clock
        self._verdicts: dict[Variant, Verdict] = {}

    def attend(
        self, q: mx.array, runs: list[Run], *, scale: float, causal: bool
    ) -> mx.array:
        """Attention [B, Hq, T, D] over runs, the last of which holds the queries' own."""
        states = [
            metal.partial(
                q,
                run,
                scale=scale,
                causal=causal and run is runs[-1],
                factory=self._factory,
            )
            for run in runs
        ]
        return metal.merge(states, q, factory=self._factory)

    def use(self, variant: Variant) -> bool:
        """Whether the kernels are right here, and faster."""
        return self.verdict(variant).use

    def verdict(self, variant: Variant) -> Verdict:
        """What the kernels are worth here; looked into once."""
        if variant not in self._verdicts:
            self._verdicts[variant] = self._judge(variant)
        return self._verdicts[variant]

    def _judge(self, variant: Variant) -> Verdict:
        try:
            error = self._error(variant)
        except (RuntimeError, ValueError) as failure:
            # mlx's for a kernel that Metal does not compile or run.
            first = str(failure).strip().partition("\n")[0]
            return Verdict(False, float("inf"), reason=f"does not run: {first}")
        if not error <= TOLERANCES[variant.dtype]:
            return Verdict(
                False, error, reason=f"differs from plain operations by {error:.1e}"
            )
        if not self._timed:
            return Verdict(True, error, reason=f"{SWITCH}=on")
        seconds, other, unpacked = self._seconds(variant)
        reason = (
            f"{other / seconds:.2f} times as fast as plain operations, "
            f"{unpacked / seconds:.2f} as mlx's over keys that are plain and each row's own"
        )
        return Verdict(seconds < other, error, seconds, other, unpacked, reason)

    def _error(self, variant: Variant) -> float:
        """The largest difference from plain.py: ragged rows, a shared run, blocks."""
        worst = 0.0
        for T in (1, 3):
            B, H, G, N = 2, 2, 4, 600
            runs = [
                _random_run(variant, 1, H, 300, 300),
                _random_run(variant, B, H, N, N - 23, mx.array([0, N - 23 - T])),
            ]
            q = _random(variant, (B, H * G, T, variant.head_dim), seed=0)
            scale = variant.head_dim**-0.5
            result = self.attend(q, runs, scale=scale, causal=True)
            expected = plain.attend(q, runs, scale=scale, mask="causal")
            result, expected = (x.astype(mx.float32) for x in (result, expected))
            error = mx.abs(result - expected).max() / mx.abs(expected).max()
            # Not a comparison that a NaN passes.
            worst = max(worst, float(mx.where(mx.isnan(error), mx.inf, error)))
        return worst

    def _seconds(self, variant: Variant) -> Seconds:
        """Measured now or before."""
        # Not at the top: it takes 30 ms, which every start of mm1 would wait for.
        from importlib.metadata import version

        key = f"{self.device}, mlx {version('mlx')}, kernels {metal.digest()}"
        kept = _read(self._store)
        known = kept.get(key, {}).get(variant.name)
        if known:
            return Seconds(*known)
        measured = self._measure(variant)
        with suppress(OSError):
            # Without a cache folder it is measured again next time.
            self._store.parent.mkdir(parents=True, exist_ok=True)
            entries = kept.get(key, {}) | {variant.name: list(measured)}
            replace_json(self._store, kept | {key: entries})
        return measured

    def _measure(self, variant: Variant) -> Seconds:
        steps = [self._time(variant, N, T) for N, T in TIMED_STEPS]
        return max(steps, key=lambda step: step.kernels / step.plain)

    def _time(self, variant: Variant, N: int, T: int) -> Seconds:
        """Of T queries over N keys."""
        D, scale = variant.head_dim, variant.head_dim**-0.5
        # Plain keys come to the kernels from a shared prefix only.
        B = 1 if variant.bits else TIMED_BATCH
        H = TIMED_KV_HEADS
        q = _random(variant, (B, TIMED_HEADS, T, D), seed=0)
        runs = [_random_run(variant, 1, H, N, N)]
        if B > 1:
            runs.append(_random_run(variant, B, H, TIMED_SUFFIX, TIMED_SUFFIX))
        mask = "causal" if T > 1 else None
        shape = (B, H, sum(run.length for run in runs), D)
        k, v = (_random(variant, shape, seed) for seed in (1, 2))
        calls = (
            lambda: self.attend(q, runs, scale=scale, causal=T > 1),
            lambda: (plain.attend if variant.bits else fused.attend_joined)(
                q, runs, scale=scale, mask=mask
            ),
            lambda: fused.attend(q, k, v, scale=scale, mask=mask),
        )
        mx.eval(q, k, v, [run.planes for run in runs], [call() for call in calls])
        times: tuple[list[float], ...] = ([], [], [])
        for _ in range(TIMED_CALLS):
            for call, seconds in zip(calls, times, strict=True):
                start = self._clock()
                mx.eval(call())
                seconds.append(self._clock() - start)
        return Seconds(*(sorted(seconds)[TIMED_CALLS // 2] for seconds in times))


def current() -> Kernels | None:
    """The kernels of the default device; None where there are none, or they are off.

    Raises:
        ConfigError: ``MM1_KERNELS`` is neither "on" nor "off".
    """
    value = switch()
    if value == "off" or not has_metal():
        return None
    return _of_this_device(value != "on")


def switch() -> str:
    """What ``MM1_KERNELS`` says: "on", "off", or "" where nothing."""
    value = os.environ.get(SWITCH, "")
    if value not in ("", "on", "off"):
        raise ConfigError(
            f"{SWITCH}={value!r} is not known; set it to 'on' or 'off', or unset it "
            "to use the kernels where they are faster"
        )
    return value


def has_metal() -> bool:
    """Whether kernels can run where arrays are computed."""
    return mx.metal.is_available() and not plain.on_cpu()


@functools.cache
def _of_this_device(timed: bool) -> Kernels:
    name = str(mx.device_info().get("device_name", "GPU"))
    store = cache_folder() / "kernels.json"
    return Kernels(name, cast(metal.Factory, mx.fast.metal_kernel), store, timed)


def _random(variant: Variant, shape: tuple[int, ...], seed: int) -> mx.array:
    # With a key: what users sample must not depend on whether a check ran.
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(variant.dtype)


def _random_run(
    variant: Variant,
    B: int,
    H: int,
    capacity: int,
    length: int,
    starts: mx.array | None = None,
) -> Run:
    def side(seed: int) -> Any:
        x = _random(variant, (B, H, capacity, variant.head_dim), seed)
        if not variant.bits:
            return x
        return mx.quantize(x, group_size=variant.group_size, bits=variant.bits)

    return Run(side(1), side(2), length, starts, variant.bits, variant.group_size)


def _read(store: Path) -> dict[str, dict[str, list[float]]]:
    """What was measured; nothing where the file is missing or damaged."""
    try:
        kept = read_json(store)
    except (MM1Error, OSError):
        return {}
    sound = isinstance(kept, dict) and all(
        isinstance(entries, dict) and all(map(_are_seconds, entries.values()))
        for entries in kept.values()
    )
    return kept if sound else {}


def _are_seconds(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(Seconds._fields)
        and all(isinstance(x, float) and x > 0 for x in value)
    )
