"""Train and measure every point: ``python -m benchmarks.lessons.run FOLDER``.

A run leaves one file of figures and is not repeated while that stands, which is refused
where it is of other settings; one that was stopped goes on from its stage's last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.lessons.points import (
    LESSONS,
    NUMBER,
    SEEDS,
    Point,
    points_of,
)

FIGURES = "figures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument(
        "--only", action="append", choices=[lesson.name for lesson in LESSONS]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    # A core each: threads of one product would only wait for one another.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    chosen = tuple(x for x in LESSONS if x.name in (arguments.only or x.name))
    points = list(points_of(chosen).values())
    from mm1_mlx.bench.machine import commit

    if (made_by := commit()) and made_by.endswith("-dirty"):
        sys.exit(
            "error: files differ from the commit's, which figures name: use a clone"
        )
    try:
        failed = run_all(
            *(arguments.folder, points, arguments.seeds, arguments.processes),
            made_by=made_by,
        )
    except FileExistsError as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {failed} failed, see above; the same command goes on")


def run_all(
    folder: Path,
    points: Iterable[Point],
    seeds: Iterable[int],
    processes: int,
    *,
    number: int = NUMBER,
    made_by: str | None = None,
) -> int:
    """Every point with every seed whose file is not there yet.

    Args:
        folder: where the runs are kept.
        points: to train.
        seeds: of each.
        processes: runs side by side.
        number: pictures or texts of a measure.
        made_by: the commit whose code this is; a file names it.

    Returns:
        How many failed.

    Raises:
        FileExistsError: a file is there, of other settings.
    """
    jobs = [
        (point, seed)
        for seed in seeds
        for point in points
        if not is_done(folder, point, seed, number)
    ]
    if not jobs:
        return 0
    with ProcessPoolExecutor(processes, get_context("spawn"), use_fast_math) as pool:
        # Before there are several processes that could write it.
        pool.submit(write_tokenizer, folder).result()
        runs = {
            pool.submit(run_point, folder, *job, number, made_by): (
                figures_path(folder, *job).stem
            )
            for job in jobs
        }
        return _report(runs)


def _report(jobs: dict[Future[str], str]) -> int:
    """Say what becomes of each job when it ends; how many failed."""
    failed = 0
    for done, job in enumerate(as_completed(jobs), start=1):
        error = job.exception()
        failed += error is not None
        said = job.result() if error is None else f"{jobs[job]} failed: {error!r}"
        print(f"{done} of {len(jobs)}: {said}", flush=True)
    return failed


def use_fast_math() -> None:
    """What a process begins with: its products and exponentials are the machine's best."""
    from mm1_mlx.blas import preload_blas

    preload_blas()

    from benchmarks.shapes.host_math import use_host_math

    use_host_math()


def is_done(
    folder: Path,
    point: Point,
    seed: int,
    number: int = NUMBER,
) -> bool:
    """Whether the figures of a run stand.

    Raises:
        FileExistsError: they are of other settings.
    """
    made = made_of(point, seed, number)
    return _stands(figures_path(folder, point, seed), made)


def _stands(path: Path, made: dict[str, Any]) -> bool:
    """Whether a record stands, and what it says it was made of is this.

    Raises:
        FileExistsError: it is something else.
    """
    if not path.is_file():
        return False
    values = json.loads(path.read_text())
    if any(values.get(name) != value for name, value in made.items()):
        raise FileExistsError(
            f"{path} is of other settings; remove it or choose another folder"
        )
    return True


def made_of(
    point: Point,
    seed: int,
    number: int = NUMBER,
) -> dict[str, Any]:
    """What a run's figures depend on beside the code, as their file holds it."""
    from benchmarks.lessons.batches import ASKED, ROWS
    from benchmarks.lessons.learn import stages
    from benchmarks.lessons.models import config_of, encoder_digest

    made = stages(point, seed)
    return {
        "config": config_of(point).to_dict(),
        "encoder": encoder_digest(),
        "rows": {"documents": ROWS, "questions": ASKED},
        "point": as_json(point),
        "seed": seed,
        "number": number,
        "stages": {name: config.to_dict() for name, config in made.items()},
    }


def figures_path(folder: Path, point: Point, seed: int) -> Path:
    """Where a run's figures are."""
    return folder / FIGURES / f"{point.name}-seed{seed}.json"


def as_json(point: Point) -> dict[str, Any]:
    """The point as its figures' file holds it."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(point)))
    return values


def write_tokenizer(folder: Path) -> None:
    """Make the tokenizer, unless it is there."""
    from benchmarks.shapes.recipe import load_recipe, open_tokenizer

    open_tokenizer(folder / "tokenizer", load_recipe().config)


def run_point(
    folder: Path,
    point: Point,
    seed: int,
    number: int = NUMBER,
    made_by: str | None = None,
) -> str:
    """Train a point, measure it on so many pictures, and write its figures; what they are."""
    from benchmarks.lessons.learn import train
    from benchmarks.lessons.measure import measure
    from benchmarks.lessons.models import config_of, export, working_weights
    from benchmarks.shapes.recipe import open_tokenizer
    from mm1_mlx.bench import describe
    from mm1_mlx.blas import preload_blas
    from mm1_mlx.files import replace_json

    place = folder / "unfinished" / f"{point.name}-seed{seed}"
    made = made_of(point, seed, number)
    if not _stands(place / "made.json", made):
        place.mkdir(parents=True, exist_ok=True)
        replace_json(place / "made.json", made)
    tokenizer = folder / "tokenizer"
    opened = open_tokenizer(tokenizer, config_of(point))
    begun = time.perf_counter()
    model, logs = train(point, seed, opened, place)
    export(model, tokenizer, place / "model", answers=point.question_steps > 0)
    trained = time.perf_counter()
    found = measure(point, place / "model", seed, number)
    steps = {name: seconds for name, (_, seconds) in logs.items()}
    # Beside steps there are checkpoints, and the model that is written.
    rest = max(0.0, trained - begun - sum(steps.values()))
    seconds = {
        **steps,
        "rest": round(rest, 1),
        "measure": round(time.perf_counter() - trained, 1),
    }
    values: dict[str, Any] = {
        **made,
        "working_weights": working_weights(model),
        "figures": found,
        "losses": {name: line["loss"] for name, (line, _) in logs.items()},
        "seconds": seconds,
        # By now the checkout may be another one.
        "machine": describe(preload_blas()) | {"commit": made_by},
    }
    path = figures_path(folder, point, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, values)
    shutil.rmtree(place)
    shares = {name: f"{row['right']:.1%}" for name, row in values["figures"].items()}
    return f"{path.stem}: {shares}, {sum(seconds.values()):.0f} s"


if __name__ == "__main__":
    main()
