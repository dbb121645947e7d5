"""Train the embedded model: ``python -m benchmarks.shapes.train runs/tiny``.

A run that was stopped continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402

from benchmarks.shapes.pictures import shipped_pictures  # noqa: E402
from benchmarks.shapes.pretrain import PatchBatches, PatchClassifier, patch_loss  # noqa: E402
from benchmarks.shapes.recipe import Batches, Recipe, load_recipe, open_tokenizer  # noqa: E402
from mm1_mlx.checkpoint import CheckpointWriter  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.models.vision import CLIPEncoder  # noqa: E402
from mm1_mlx.train.loss import next_token_loss  # noqa: E402
from mm1_mlx.train.sample import Batch  # noqa: E402
from mm1_mlx.train.trainer import Trainer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the run is kept")
    parser.add_argument("--export", type=Path, help="write the model here and stop")
    arguments = parser.parse_args()
    recipe = load_recipe()
    mx.random.seed(recipe.train.seed)
    model = MM1(recipe.config)
    tokenizer = open_tokenizer(arguments.folder, recipe.config)
    trainer = Trainer(
        model,
        next_token_loss,
        Batches(recipe, tokenizer),
        recipe.train,
        arguments.folder / "joint",
    )
    if arguments.export:
        trainer.resume()
        export(trainer, arguments.folder, arguments.export)
    else:
        if not trainer.resume():
            model.vision.update(pretrain(recipe, arguments.folder).parameters())
        trainer.run(report)


def pretrain(recipe: Recipe, folder: Path) -> CLIPEncoder:
    """The encoder after its own stage."""
    classifier = PatchClassifier(recipe.config.vision)
    batches = PatchBatches(recipe)
    stage = folder / "encoder"
    Trainer(classifier, patch_loss, batches, recipe.pretrain, stage).run(report)
    return classifier.vision


def report(line: dict[str, Any]) -> None:
    print(" ".join(f"{key} {value:.5g}" for key, value in line.items()), flush=True)


def export(trainer: Trainer[MM1, Batch], folder: Path, out: Path) -> None:
    """Write the model in half precision, with its tokenizer and two pictures."""
    source = {
        "name": "mm1-tiny",
        "recipe": "benchmarks/shapes/recipe.json",
        "steps": trainer.step,
        "licence": "MIT",
    }
    config = trainer.model.config
    with CheckpointWriter(out, config, source, overwrite=True) as writer:
        for name, tensor in trainer.model.tensors().items():
            writer.add(name, tensor.astype(mx.float16))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            writer.add_file(name, folder / name)
        for name, content in shipped_pictures().items():
            writer.add_file(name, content)


if __name__ == "__main__":
    main()
