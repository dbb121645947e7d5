"""What attends on this device, and why: the rows that ``mm1`` prints of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mm1_mlx.kernels import metal
from mm1_mlx.kernels.choice import SWITCH, Variant, current, switch


@dataclass(frozen=True)
class Row:
    """One kernel on this device."""

    kernel: str
    device: str
    check: str
    """Whether it agrees with plain operations here."""
    seconds: float | None
    """Of a step of ``choice.TIMED_STEPS``, the least gain; None where not timed."""
    other_seconds: float | None
    """Of what runs otherwise."""
    chosen: bool
    why: str
    unpacked_seconds: float | None = None
    """Of mlx's attention over as many keys that every row holds plain, to compare."""

    @property
    def runs(self) -> str:
        """What runs, and why."""
        return f"{'the kernel' if self.chosen else 'plain operations'}: {self.why}"


def kernel_report(
    dtype: mx.Dtype = mx.float16, head_dims: Sequence[int] = (64, 128)
) -> list[Row]:
    """A row for every kind of keys that there is a kernel for.

    On a GPU the kernels are checked and, unless they were before, timed.

    Raises:
        ConfigError: ``MM1_KERNELS`` is neither "on" nor "off".
    """
    value, kernels = switch(), current()
    rows = []
    for D in head_dims:
        for bits in (8, 4, 0):
            variant = Variant(bits, 64 if bits else 0, dtype, D)
            name = variant.name if bits else f"shared prefix, {variant.name}"
            covered = D in metal.HEAD_DIMS
            if kernels is None or not covered:
                why = f"{SWITCH}=off" if value == "off" else "no Metal here"
                if not covered:
                    known = " and ".join(map(str, metal.HEAD_DIMS))
                    why = f"the kernels read heads of {known}"
                device = "CPU" if mx.default_device() == mx.cpu else "GPU"
                rows.append(Row(name, device, "not run", None, None, False, why))
                continue
            verdict = kernels.verdict(variant)
            wrong = verdict.seconds is None and not verdict.use
            check = "failed" if wrong else f"agrees to {verdict.error:.1e}"
            rows.append(
                Row(
                    name,
                    kernels.device,
                    check,
                    verdict.seconds,
                    verdict.plain_seconds,
                    verdict.use,
                    verdict.reason,
                    verdict.unpacked_seconds,
                )
            )
    return rows
