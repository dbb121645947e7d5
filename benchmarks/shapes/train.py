"""Train the embedded model: ``python -m benchmarks.shapes.train runs/tiny``.

A run that was stopped continues from its last checkpoint. On a CPU, two processes share
a step's micro-batches faster than two threads of one do.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, cast

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

from benchmarks.shapes.conversations import Conversations  # noqa: E402
from benchmarks.shapes.host_math import use_host_math  # noqa: E402
from benchmarks.shapes.joint import Pupil, joint_loss  # noqa: E402
from benchmarks.shapes.patches import (  # noqa: E402
    PatchClassifier,
    Patches,
    encoder_loss,
)
from benchmarks.shapes.pictures import shipped_pictures  # noqa: E402
from benchmarks.shapes.positions import sine_cosine_positions  # noqa: E402
from benchmarks.shapes.recipe import Recipe, Stage, load_recipe, open_tokenizer  # noqa: E402
from benchmarks.shapes.ring import RANK, run_ring  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.tokenizer import Tokenizer  # noqa: E402
from mm1_mlx.train.pace import Moment  # noqa: E402
from mm1_mlx.train.trainer import Trainer  # noqa: E402
from mm1_mlx.writer import CheckpointWriter  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the run is kept")
    parser.add_argument("--export", type=Path, help="write the model here and stop")
    parser.add_argument("--processes", type=int, default=1, help="that share a step")
    parser.add_argument(
        "--keep", type=int, default=0, help="steps between weights to keep for a curve"
    )
    parser.add_argument("--stage", help="begin with this stage")
    parser.add_argument(
        "--weights", type=Path, help="kept weights that it begins with, half precision"
    )
    arguments = parser.parse_args()
    recipe = load_recipe()
    # Before there are several processes that could write it.
    tokenizer = open_tokenizer(arguments.folder, recipe.config)
    if arguments.processes > 1 and RANK not in os.environ and not arguments.export:
        command = [sys.executable, "-m", "benchmarks.shapes.train", *sys.argv[1:]]
        sys.exit(abs(run_ring(command, arguments.processes)))
    use_host_math()
    mx.random.seed(1)
    pupil = Pupil(recipe)
    names = [stage.name for stage in recipe.stages]
    if arguments.weights:
        restore(pupil, arguments.weights)
    if arguments.export:
        recall(recipe, pupil, tokenizer, arguments.folder)
        export(pupil.mm1, arguments.folder, arguments.export)
        return
    wanted = {name for stage in recipe.stages for name in stage.averaged}
    for stage in recipe.stages[names.index(arguments.stage or names[0]) :]:
        trainer = make_trainer(stage, recipe, pupil, tokenizer, arguments.folder)
        if not trainer.resume():
            show_places(pupil.mm1, stage.position_scale)
        trainer.saved = partial(
            keep, trainer, pupil, stage, arguments.folder, arguments.keep, wanted
        )
        keep_start(trainer)
        if trainer.step < stage.end:
            trainer.run(report, watch=partial(end, trainer, stage))
        average(pupil, stage, arguments.folder)


def end(trainer: Trainer[Any, Any], stage: Stage, moment: Moment) -> None:
    """Have a stage end where it did: a run stops behind the step that is under way."""
    if moment.step == stage.end - 1:
        trainer.stop()


def recall(recipe: Recipe, pupil: Pupil, tokenizer: Tokenizer, folder: Path) -> None:
    """Give a pupil what the run in a folder has made, which must be all of it."""
    last = recipe.stages[-1]
    trainer = make_trainer(last, recipe, pupil, tokenizer, folder)
    if not trainer.resume():
        sys.exit(f"error: {folder / last.name} holds no checkpoint: train first")
    if trainer.step < last.end:
        sys.exit(
            f"error: {last.name} stands at step {trainer.step:,} of "
            f"{last.end:,}: give the command without --export to go on"
        )
    average(pupil, last, folder)


def keep(
    trainer: Trainer[Any, Any],
    pupil: Pupil,
    stage: Stage,
    folder: Path,
    every: int,
    wanted: Collection[str],
) -> None:
    """Keep the weights of this step, beside the checkpoints, if it is one to keep.

    Those are the ones that a mean is to be of, and with ``every`` the steps at its
    multiples and the stage's last.
    """
    step = trainer.step
    name = kept_name(stage, step)
    due = every and step and (step % every == 0 or step == stage.end)
    path = kept_path(folder, name)
    if path.is_file() or not (due or name in wanted):
        return
    path.parent.mkdir(exist_ok=True)
    weights = tree_flatten(tree_map(lambda x: x.astype(mx.float16), pupil.parameters()))
    # In one go: whoever finds it finds all of it.
    unfinished = path.with_suffix(".partial.safetensors")
    mx.save_safetensors(str(unfinished), dict(weights))
    unfinished.replace(path)


def keep_start(trainer: Trainer[Any, Any]) -> None:
    """Keep what stands before the first step, or what a stop left to be kept."""
    if trainer.group.rank() == 0:
        trainer.saved()


def kept_name(stage: Stage, step: int) -> str:
    """What the weights of a step are called."""
    return f"{stage.name}-{step:06}"


def kept_path(folder: Path, name: str) -> Path:
    """Where weights are kept."""
    return folder / "kept" / f"{name}.safetensors"


def average(pupil: Pupil, stage: Stage, folder: Path) -> None:
    """Give a pupil the mean of weights that were kept, if its stage is to leave that.

    Source: arXiv 1803.05407.
    """
    paths = [kept_path(folder, name) for name in stage.averaged]
    # One process writes them, maybe just now; what it has not written it never will.
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    if missing := [path for path in paths if not path.is_file()]:
        sys.exit(f"error: {missing[0]} is missing: its stage keeps it")
    if paths:
        held = [cast(dict[str, mx.array], mx.load(str(path))) for path in paths]
        pupil.load_weights(
            [
                (name, mx.stack([x[name].astype(mx.float32) for x in held]).mean(0))
                for name in held[0]
            ]
        )


def restore(pupil: Pupil, path: Path) -> None:
    """Give a pupil the weights that were kept of one."""
    weights = cast(dict[str, mx.array], mx.load(str(path)))
    pupil.load_weights([(name, x.astype(mx.float32)) for name, x in weights.items()])


def make_trainer(
    stage: Stage, recipe: Recipe, pupil: Pupil, tokenizer: Tokenizer, folder: Path
) -> Trainer[Any, Any]:
    """The trainer of one stage, which keeps its checkpoint in a folder of its own."""
    for part in (pupil.mm1.vision, pupil.heads):
        part.freeze() if stage.freeze_vision else part.unfreeze()
    place = folder / stage.name
    if stage.task == "patches":
        # The first stage trains the model's own encoder.
        classifier = PatchClassifier(pupil.mm1.vision, pupil.heads)
        batches = Patches(recipe, stage)
        return Trainer(classifier, encoder_loss, batches, stage.train, place)
    talks = Conversations(recipe, stage, tokenizer)
    return Trainer(pupil, joint_loss, talks, stage.train, place)


def show_places(mm1: MM1, scale: float) -> None:
    """Tell the connector where the patches are: by itself it hardly learns that."""
    connector = mm1.connector
    rows, width = connector.position_embedding.shape
    grid = math.isqrt(rows)
    places = scale * sine_cosine_positions(grid, width)
    connector.position_embedding = connector.position_embedding + places


def report(line: dict[str, Any]) -> None:
    print(" ".join(f"{key} {value:.5g}" for key, value in line.items()), flush=True)


def export(model: MM1, folder: Path, out: Path) -> None:
    """Write the model in half precision, with its tokenizer and two pictures."""
    source = {
        "name": "mm1-tiny",
        "recipe": "benchmarks/shapes/recipe.json",
        "licence": "MIT",
    }
    with CheckpointWriter(out, model.config, source, overwrite=True) as writer:
        for name, tensor in model.tensors().items():
            writer.add(name, tensor.astype(mx.float16))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            writer.add_file(name, folder / name)
    # Beside the model, no part of it.
    for name, content in shipped_pictures().items():
        (out / name).write_bytes(content)


if __name__ == "__main__":
    main()
