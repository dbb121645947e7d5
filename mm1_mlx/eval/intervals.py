"""Scores -> their mean and the 95 % interval it lies in. No mlx."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Two standard errors of a normal distribution leave 5 % outside.
Z = 1.96
RESAMPLES = 2000
_SEED = 0

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A measured value; shares are 0 to 1, CIDEr 0 to 10.

    Attributes:
        value: what was measured.
        low: of its 95 % interval; None where the answers leave nothing to tell it by.
        high: likewise.
        n: how many questions it is of.
        chance: what guessing gives, None where that is not known.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    chance: float | None = None


def wilson(right: int, total: int) -> tuple[float, float]:
    """The Wilson score interval, of 95 %, of a share."""
    p = right / total
    centre = (p + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    half /= 1 + Z * Z / total
    return centre - half, centre + half


def share(right: Sequence[bool], chance: float | None = None) -> Figure:
    """The share of right answers, with Wilson's interval; of none 0, without one."""
    hits, total = sum(right), len(right)
    if not total:
        return Figure(0.0, None, None, 0, chance)
    return Figure(hits / total, *wilson(hits, total), total, chance)


def mean(scores: Sequence[float]) -> Figure:
    """The mean of scores from 0 to 1, with the interval of their bootstrap.

    Scores of 0 and 1 alone are a share, whose own interval does not end where all are
    alike.
    """
    if set(scores) <= {0, 1}:
        return share([score == 1 for score in scores])
    values = np.asarray(scores, np.float64)
    return bootstrap(values, lambda drawn: float(drawn.mean()))


def bootstrap(rows: Scores, value: Callable[[Scores], float]) -> Figure:
    """A value of rows, and the middle 95 % of what rows drawn with replacement give.

    Where every draw gives the same there is no interval: that all n are alike does not
    say that all others are.

    Args:
        rows: one a question, [n] or [n, fields].
        value: what is measured of some of them; NaN where they leave it undefined. Such
            draws are left out, and of all rows it is 0.
    """
    # A stream of its own: the interval of the same answers is always the same.
    stream = np.random.default_rng(_SEED)
    n = len(rows)
    drawn = [value(rows[stream.integers(0, n, n)]) for _ in range(RESAMPLES)]
    values = [found for found in drawn if not math.isnan(found)]
    measured = value(rows)
    if math.isnan(measured):
        return Figure(0.0, None, None, n)
    # A sum's rounding depends on the order of what was drawn.
    if math.isclose(min(values), max(values), rel_tol=1e-9, abs_tol=1e-12):
        return Figure(measured, None, None, n)
    low, high = np.quantile(values, (0.025, 0.975))
    return Figure(measured, float(low), float(high), n)
