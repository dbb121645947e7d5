"""How far a run is, and how long it will take yet: its steps and its measurements."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from mm1_mlx.train.config import TrainConfig

# So many of the last steps, and of the last held-out batches, say how long the next take.
RECENT = 50


class Moment(NamedTuple):
    """Where a run is.

    Attributes:
        step: how many steps are done.
        measured: how many held-out batches of the measurement that is under way, or of
            the look at them before the first step.
        of: so many, 0 between measurements.
        seconds_left: to the end of the run, None before the first step is done.
    """

    step: int
    measured: int = 0
    of: int = 0
    seconds_left: float | None = None


class Pace:
    """How long a run of this process will take yet.

    Args:
        config: the run.
        held_out: batches of a measurement, of this process.
    """

    def __init__(self, config: TrainConfig, held_out: int) -> None:
        self._config, self._held_out = config, held_out
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._batches: deque[float] = deque(maxlen=RECENT)

    def stepped(self, seconds: float) -> None:
        """Count a step."""
        self._steps.append(seconds)

    def measured(self, seconds: float) -> None:
        """Count a held-out batch."""
        self._batches.append(seconds)

    def left(self, step: int, rest: int = 0) -> float | None:
        """Seconds from a step to the end, behind it ``rest`` batches to be measured now.

        None where none was done yet.
        """
        if not self._steps:
            return None
        steps = self._config.steps - step
        batches = rest + self._held_out * self._config.measurements_after(step)
        each = sum(self._batches) / max(len(self._batches), 1)
        return steps * sum(self._steps) / len(self._steps) + batches * each
