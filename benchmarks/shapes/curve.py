"""How each kind was learned: ``python -m benchmarks.shapes.curve runs/tiny -n 200``.

Measures the weights that ``train --keep`` left behind, and the model that is shipped, on
held-out cases, and draws the share that is right over the steps of the later stages.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

preload_blas()

from benchmarks.shapes.cases import part_cases  # noqa: E402
from benchmarks.shapes.evaluate import answerer, evaluate  # noqa: E402
from benchmarks.shapes.joint import Pupil  # noqa: E402
from benchmarks.shapes.recipe import Recipe, load_recipe  # noqa: E402
from benchmarks.shapes.train import export, restore  # noqa: E402
from mm1_mlx.files import sha256  # noqa: E402
from mm1_mlx.runtime import TINY  # noqa: E402

FIGURES = Path(__file__).with_name("curve.json")
PARTS = ("scenes", "pairs", "reading", "small", "words", "talks")
SHOWN = (
    *("colour", "shape", "count to 4", "exists", "where", "caption", "box"),
    *("two pictures", "read", "read small, one picture", "read small, with parts"),
    *("new word, 4 shots", "new word, 8 shots", "new word, 8 shots, all held out"),
    *("follow-up", "after other pictures"),
)

Point = dict[str, Any]
# What a point stands for, the steps behind the encoder's stage, and the weights; without
# any it is the model as it is shipped, which may be a mean of several.
Place = tuple[str, int, Path | None]


def places(recipe: Recipe, folder: Path) -> Iterator[Place]:
    """Every step that was kept, in the order of the stages, and then what is shipped."""
    before = 0
    for stage in recipe.stages:
        if stage.task == "patches":
            continue
        for step, path in kept_steps(folder, stage.name):
            # A run may have gone on behind what the recipe now says.
            if step <= stage.end:
                yield path.stem, before + step, path
        before += stage.end
    yield "shipped", before, None


def kept_steps(folder: Path, stage: str) -> list[tuple[int, Path]]:
    """The steps of a stage whose weights were kept, and where they lie."""
    # A stage's name may begin another's.
    name = re.compile(rf"{re.escape(stage)}-(\d+)\.safetensors")
    paths = (folder / "kept").iterdir()
    found = [(name.fullmatch(path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match)


def measure(recipe: Recipe, folder: Path, number: int) -> list[Point]:
    """The figures of every place, of so many cases of each kind.

    Kept in the folder after each, so that a start in it goes on with what is lacking.
    """
    kept = folder / f"curve-{number}.json"
    done: dict[str, Point] = json.loads(kept.read_text()) if kept.exists() else {}
    points = []
    for name, step, path in places(recipe, folder):
        # What was measured of other weights is of no use.
        digest = sha256(path or TINY / "model.safetensors")
        if digest not in done:
            done[digest] = _figures(recipe, folder, path, number)
            kept.write_text(json.dumps(done))
            print(name, flush=True)
        points.append({"name": name, "step": step, "model": digest, **done[digest]})
    return points


def _figures(recipe: Recipe, folder: Path, path: Path | None, number: int) -> Point:
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        model = TINY
        if path:
            model = Path(place) / "model"
            pupil = Pupil(recipe)
            restore(pupil, path)
            export(pupil.mm1, folder, model)
        answer = answerer(str(model), stack)
        found: dict[str, dict[str, Any]] = {}
        for part in PARTS:
            found |= evaluate(answer, part_cases(part, number))
    return {name: found[name] for name in SHOWN}


def draw(points: list[Point], out: Path) -> None:
    """A panel for every kind: the share that is right, its interval, and chance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    rows = -(-len(SHOWN) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(12, 2.4 * rows), sharex=True, sharey=True
    )
    steps = [point["step"] for point in points]
    for panel, name in zip(panels.flat, SHOWN, strict=False):
        values = [point[name] for point in points]
        low, high = zip(*(value["interval_95"] for value in values), strict=True)
        panel.fill_between(steps, low, high, alpha=0.25)
        panel.plot(steps, [value["accuracy"] for value in values], marker=".")
        chance = values[-1]["chance_majority"]
        if chance > 0.02:
            panel.axhline(chance, color="grey", linestyle=":", linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(SHOWN) :]:
        panel.axis("off")
    figure.supxlabel("steps behind the encoder's stage", fontsize=9)
    figure.supylabel("right", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("-n", type=int, default=200, help="cases of each kind")
    arguments = parser.parse_args()
    points = measure(load_recipe(), arguments.folder, arguments.n)
    FIGURES.write_text(json.dumps(points, indent=1) + "\n")
    draw(points, FIGURES.with_suffix(".png"))


if __name__ == "__main__":
    main()
