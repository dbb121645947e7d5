"""Figures of several seeds -> intervals, and whether a lesson shows in them.

A claim's gain is taken seed by seed: points of one seed answer the same cases, and those of
one mix see the same pictures, so what the seed alone does falls out of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy import stats

from benchmarks.lessons.points import Claim

Verdict = Literal["shows", "does not show", "opposite"]
CONFIDENCE = 0.95
# Shares by measure, point and seed.
Shares = Mapping[tuple[str, str], Mapping[int, float]]


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values and its interval by Student's t; of one value there is none."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Estimate(mean, -math.inf, math.inf)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    half = quantile * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def gains(claim: Claim, shares: Shares) -> list[float]:
    """By how much each seed has what the claim says, in the order of the seeds.

    How much better its better point is, less how far its rivals lie apart: the best of
    them from the worst. Which those are the other seeds say: on the seed that they are
    chosen by, the best lies apart from the worst by chance alone. Of seeds that lack a run
    there is none.
    """

    def of(point: str) -> Mapping[int, float]:
        return shares.get((claim.measure, point), {})

    held = [of(point) for point in (claim.better, claim.worse, *claim.rivals)]
    seeds = sorted(set.intersection(*(set(values) for values in held)))
    found = []
    for seed in seeds:
        others = [other for other in seeds if other != seed]
        ranked = sorted(claim.rivals, key=lambda p: sum(of(p)[s] for s in others))
        apart = of(ranked[-1])[seed] - of(ranked[0])[seed] if ranked else 0.0
        found.append(of(claim.better)[seed] - of(claim.worse)[seed] - apart)
    return found


def judge(gain: Estimate) -> Verdict:
    """Whether the interval of a gain lies above 0, holds it, or lies below."""
    if gain.low > 0:
        return "shows"
    return "opposite" if gain.high < 0 else "does not show"
