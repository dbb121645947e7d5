"""Figures of all runs -> a table, a plot: ``python -m benchmarks.lessons.report FOLDER``.

Writes ``results.json``, the table in ``README.md`` and ``lessons.png`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.lessons.points import LESSONS, Claim, Lesson, points_of
from benchmarks.lessons.run import FIGURES, is_done
from benchmarks.lessons.verdict import Estimate, Shares, estimate, gains, judge

PLACE = Path(__file__).parent
RESULTS, README, PLOT = (
    PLACE / name for name in ("results.json", "README.md", "lessons.png")
)
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
# Lessons whose points have no order.
UNORDERED = ("connector", "text", "experts")
# What a run may take.
SECONDS = 300
# Of a run, what its results hold beside its point.
KEPT = ("seed", "encoder", "working_weights", "figures", "losses", "seconds")
COLOURS = {
    "answers": "tab:blue",
    "zero-shot": "tab:blue",
    "few-shot": "tab:orange",
    "text": "tab:green",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    arguments = parser.parse_args()
    try:
        runs = read_runs(arguments.folder)
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    if not runs:
        sys.exit(
            f"error: {arguments.folder} has no figures; run benchmarks.lessons.run"
        )
    commits = {run["machine"]["commit"] for run in runs}
    if len(commits) > 1 or None in commits:
        sys.exit("error: runs of several commits, or of none: make them anew from one")
    results = summarise(runs)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    before, rest = README.read_text().split(BEGIN)
    _, behind = rest.split(END)
    README.write_text(f"{before}{BEGIN}{table(results)}{END}{behind}")
    plot(results, PLOT)


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The figures of every run of a point that is one now.

    Raises:
        FileExistsError: some are of other settings.
    """
    runs = [
        json.loads(x.read_text()) for x in sorted((folder / FIGURES).glob("*.json"))
    ]
    points = points_of()
    return [
        run
        for run in runs
        if (point := points.get(run["point"]["name"]))
        and is_done(folder, point, run["seed"])
    ]


def summarise(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Means and intervals of every point, and what becomes of every claim."""
    runs = list(runs)
    shares: dict[tuple[str, str], dict[int, float]] = {}
    chances: dict[str, list[float]] = {}
    seconds = [sum(run["seconds"].values()) for run in runs]
    for run in runs:
        for measure, row in run["figures"].items():
            own = shares.setdefault((measure, run["point"]["name"]), {})
            own[run["seed"]] = row["right"]
            chances.setdefault(measure, []).append(row["chance"])
    points = [
        {
            "point": point,
            "measure": measure,
            "seeds": {str(seed): share for seed, share in sorted(values.items())},
            **_rounded(estimate([values[seed] for seed in sorted(values)])),
        }
        for (measure, point), values in sorted(shares.items())
    ]
    claims = [
        {"lesson": lesson.name, "text": claim.text, **_judged(claim, shares)}
        for lesson in LESSONS
        for claim in lesson.claims
    ]
    return {
        "runs": len(runs),
        "seconds": {
            "mean": round(sum(seconds) / len(seconds), 1),
            "longest": round(max(seconds, default=0.0), 1),
            "over": sum(x > SECONDS for x in seconds),
        },
        # Seeds have cases of their own.
        "chance": {
            name: round(fmean(some), 4) for name, some in sorted(chances.items())
        },
        "points": points,
        "claims": claims,
        "machines": [json.loads(x) for x in sorted({_text(run) for run in runs})],
        "each": [
            {
                "point": run["point"]["name"],
                **{name: run[name] for name in KEPT},
            }
            for run in runs
        ],
    }


def _text(run: dict[str, Any]) -> str:
    return json.dumps(run["machine"], sort_keys=True)


def _judged(claim: Claim, shares: Shares) -> dict[str, Any]:
    values = gains(claim, shares)
    if not values:
        return {"runs": 0, "verdict": "not run"}
    gain = estimate(values)
    return {"runs": len(values), **_rounded(gain), "verdict": judge(gain)}


def _rounded(found: Estimate) -> dict[str, float | None]:
    """As JSON has it, which knows no infinity."""
    values = {"mean": found.mean, "low": found.low, "high": found.high}
    return {k: round(v, 4) if math.isfinite(v) else None for k, v in values.items()}


def table(results: dict[str, Any]) -> str:
    """What the paper says beside what is measured here, as Markdown."""
    took = results["seconds"]
    lines = [
        f"{results['runs']} runs. One took {took['mean']:.0f} s on average and "
        f"{took['longest']:.0f} s at most; {took['over']} took more than {SECONDS} s.",
        "",
        f"![what was right, beside the paper's figures]({PLOT.name})",
        "",
        "| the paper | its figures | here: gain in points, 95% interval | verdict |",
        "|---|---|---|---|",
    ]
    papers = [claim.paper for lesson in LESSONS for claim in lesson.claims]
    for row, paper in zip(results["claims"], papers, strict=True):
        gain = _points(row, "+.1f") if row["runs"] else ""
        lines.append(f"| {row['text']} | {paper} | {gain} | {row['verdict']} |")
    lines += ["", "| lesson | point | measure | right, 95% interval | chance |"]
    lines.append("|---|---|---|---|--:|")
    held = {(row["measure"], row["point"]): row for row in results["points"]}
    for lesson in LESSONS:
        for point, label in lesson.points:
            for measure in lesson.measures:
                if (row := held.get((measure, point.name))) is None:
                    continue
                name, chance = label.replace("\n", " "), results["chance"][measure]
                lines.append(
                    f"| {lesson.name} | {name} | {measure} | {_points(row, '.1f')} "
                    f"| {100 * chance:.1f} |"
                )
    return "\n".join(lines) + "\n"


def _points(row: dict[str, Any], form: str) -> str:
    """Mean and interval in per cent."""
    if row["low"] is None:
        return f"{100 * row['mean']:{form}}, one run"
    mean, low, high = (100 * row[name] for name in ("mean", "low", "high"))
    return f"{mean:{form}}, {low:{form}} to {high:{form}}"


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel a lesson: what is measured here, and the paper's curve at a scale of its own.

    Both scales span as many points, so that slopes can be compared.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    rows = math.ceil(len(LESSONS) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(16, 4.6 * rows))
    for axis, lesson in zip(axes.flat, LESSONS, strict=False):
        _panel(axis, lesson, results)
    for axis in axes.flat[len(LESSONS) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, lesson: Lesson, results: dict[str, Any]) -> None:
    held = {(row["measure"], row["point"]): row for row in results["points"]}
    lowest, highest = [], []
    for measure in lesson.measures:
        found = [held.get((measure, point.name)) for point, _ in lesson.points]
        places = [i for i, row in enumerate(found) if row]
        means = [100 * row["mean"] for row in found if row]
        halves = [
            0.0 if row["high"] is None else 100 * (row["high"] - row["mean"])
            for row in found
            if row
        ]
        axis.errorbar(
            places,
            means,
            halves,
            fmt="o" if lesson.name in UNORDERED else "o-",
            capsize=4,
            color=COLOURS[measure],
            label=f"here, {measure}",
        )
        lowest += [mean - half for mean, half in zip(means, halves, strict=True)]
        highest += [mean + half for mean, half in zip(means, halves, strict=True)]
        if means:
            chance = 100 * results["chance"][measure]
            axis.axhline(chance, color=COLOURS[measure], linestyle=":", linewidth=1)
            lowest.append(chance)
    axis.set_title(lesson.title, fontsize=10)
    labels = [name for _, name in lesson.points]
    axis.set_xticks(range(len(labels)), labels, fontsize=8)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_ylabel("right, % (dotted: chance)", fontsize=8)
    shown = [axis]
    if lesson.curves:
        other = axis.twinx()
        shown.append(other)
        other.set_ylabel("MM1", color="grey", fontsize=8)
        for curve, marker in zip(lesson.curves, "sD", strict=False):
            other.plot(
                *(curve.places, curve.values, f"{marker}--"),
                color="grey",
                label=curve.label,
            )
        values = [value for curve in lesson.curves for value in curve.values]
        span = 1.1 * max(
            max(highest, default=0.0) - min(lowest, default=0.0),
            max(values) - min(values),
        )
        _centre(other, values, span)
        if lowest:
            _centre(axis, lowest + highest, span)
    else:
        axis.plot([], [], " ", label="MM1: drawn, no figures")
    legends = [each.get_legend_handles_labels() for each in shown]
    handles = [handle for held, _ in legends for handle in held]
    names = [name for _, held in legends for name in held]
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
    axis.legend(handles, names, fontsize=7, ncols=2, **below)


def _centre(axis: Any, values: list[float], span: float) -> None:
    """So many points from bottom to top, the values in the middle."""
    middle = (max(values) + min(values)) / 2
    axis.set_ylim(middle - span / 2, middle + span / 2)


if __name__ == "__main__":
    main()
