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

from benchmarks.shapes.conversations import (  # noqa: E402
    Conversations,
    JointBatch,
    Tutored,
    joint_loss,
)
from benchmarks.shapes.patches import (  # noqa: E402
    PatchClassifier,
    Patches,
    encoder_loss,
)
from benchmarks.shapes.pictures import shipped_pictures  # noqa: E402
from benchmarks.shapes.recipe import load_recipe, open_tokenizer  # noqa: E402
from mm1_mlx.checkpoint import CheckpointWriter  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.train.trainer import Trainer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the run is kept")
    parser.add_argument("--export", type=Path, help="write the model here and stop")
    arguments = parser.parse_args()
    recipe = load_recipe()
    mx.random.seed(recipe.train.seed)
    tokenizer = open_tokenizer(arguments.folder, recipe.config)
    mm1 = MM1(recipe.config)
    encoder = PatchClassifier(recipe)
    trainer = Trainer(
        Tutored(mm1, encoder.heads, recipe.patch_weight),
        joint_loss,
        Conversations(recipe, tokenizer),
        recipe.train,
        arguments.folder / "joint",
    )
    resumed = trainer.resume()
    if arguments.export:
        export(trainer, arguments.folder, arguments.export)
        return
    if not resumed:
        stage = arguments.folder / "encoder"
        Trainer(encoder, encoder_loss, Patches(recipe), recipe.pretrain, stage).run(
            report
        )
        mm1.vision.update(encoder.vision.parameters())
    trainer.run(report)


def report(line: dict[str, Any]) -> None:
    print(" ".join(f"{key} {value:.5g}" for key, value in line.items()), flush=True)


def export(trainer: Trainer[Tutored, JointBatch], folder: Path, out: Path) -> None:
    """Write the model in half precision, with its tokenizer and two pictures."""
    source = {
        "name": "mm1-tiny",
        "recipe": "benchmarks/shapes/recipe.json",
        "licence": "MIT",
    }
    model = trainer.model.mm1
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
