"""What a comparison says: medians, ratios round by round, and how sure they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass
class Row:
    """One comparison: what each measured, and ours against the peer."""

    name: str
    # "higher" or "lower": which is better.
    better: str
    unit: str
    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """How many times as good as the peer, round by round."""
        pairs = zip(self.ours, self.peer, strict=True)
        return [a / b if self.better == "higher" else b / a for a, b in pairs]

    def to_dict(self) -> dict[str, Any]:
        """The row as results hold it."""
        ratios = self.ratios
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": summary(self.ours),
            "peer": summary(self.peer),
            "ratio": round(median(ratios), 3),
            # One round says nothing of the next.
            "ratio_lower_95": round(lower_bound(ratios), 3) if ratios[1:] else None,
            "rounds": len(ratios),
            "note": self.note,
        }


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range, to four digits."""
    made = {"median": median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in made.items()}


def lower_bound(ratios: Sequence[float], draws: int = 4000) -> float:
    """The 2.5% quantile of the median over resampled rounds (bootstrap)."""
    source = random.Random(0)
    medians = sorted(
        median(source.choices(ratios, k=len(ratios))) for _ in range(draws)
    )
    return medians[int(0.025 * draws)]


def interleave(
    rounds: int, row: Row, ours: Callable[[int], float], peer: Callable[[int], float]
) -> Row:
    """Fill a row, round by round, each going first every other time; one round warms up."""
    for i in range(-1, rounds):
        pair = [(row.ours, ours), (row.peer, peer)]
        for kept, measure in pair if i % 2 else reversed(pair):
            value = measure(i)
            if i >= 0:
                kept.append(value)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what, beside whom | ours | theirs | times as good | at least (95%) | |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        unit = row["unit"]
        ours, peer = (row[side]["median"] for side in ("ours", "peer"))
        if unit == "bytes":
            ours, peer, unit = ours / 1e6, peer / 1e6, "MB"
        lower = row["ratio_lower_95"]
        sure = "" if lower is None else f"{lower:.2f}"
        lines.append(
            f"| {row['name']} | {ours:.4g} {unit} | {peer:.4g} {unit} | "
            f"{row['ratio']:.2f} | {sure} | {row['note']} |"
        )
    return "\n".join(lines)
