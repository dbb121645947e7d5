"""A point is trained, on documents and on questions, by the project's trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402

from benchmarks.lessons.batches import Documents, Questions  # noqa: E402
from benchmarks.lessons.models import config_of, encoder_weights  # noqa: E402
from benchmarks.lessons.points import Point  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.tokenizer import Tokenizer  # noqa: E402
from mm1_mlx.train.config import TrainConfig  # noqa: E402
from mm1_mlx.train.loss import next_token_loss, sparse_loss  # noqa: E402
from mm1_mlx.train.record import read_log  # noqa: E402
from mm1_mlx.train.trainer import Trainer  # noqa: E402

# The last line of a stage's log, and the seconds of all its steps, also of those before
# a stop.
Trained = tuple[dict[str, Any], float]
# Streams of pictures, so that no two stages of a seed see the same ones.
DOCUMENTS, QUESTIONS = 0, 1
STREAMS = 2
# Shares of a stage's steps.
WARMUP, DECAY = 0.1, 0.4


def settings(steps: int, seed: int) -> TrainConfig:
    """A stage of so many steps."""
    return TrainConfig(
        steps=steps,
        seed=seed,
        optimizer="muon",
        learning_rate=0.002,
        matrix_learning_rate=0.02,
        warmup_steps=round(WARMUP * steps),
        decay_steps=round(DECAY * steps),
        final_fraction=0.05,
        save_every=100,
        log_every=25,
    )


def stream(seed: int, stage: int) -> int:
    """The seed of a stage's batches."""
    return STREAMS * seed + stage


def stages(point: Point, seed: int) -> dict[str, TrainConfig]:
    """What a point goes through."""
    made = (
        ("documents", point.pretrain_steps, DOCUMENTS),
        ("questions", point.question_steps, QUESTIONS),
    )
    return {name: settings(n, stream(seed, stage)) for name, n, stage in made if n}


def train(
    point: Point,
    seed: int,
    tokenizer: Tokenizer,
    folder: Path,
) -> tuple[MM1, dict[str, Trained]]:
    """A point's model with an encoder that stays as it is, and its stages."""
    config = config_of(point)
    assert config.vision is not None
    mx.random.seed(stream(seed, DOCUMENTS))
    model = MM1(config)
    model.vision.load_weights(list(encoder_weights(config.vision).items()))
    model.vision.freeze()
    loss: Any = sparse_loss if point.experts else next_token_loss
    logs = {}
    for name, made in stages(point, seed).items():
        batches: Any = Questions(config, tokenizer, made.seed)
        if name == "documents":
            batches = Documents(config, tokenizer, made.seed, point.mix)
        logs[name] = _run(Trainer(model, loss, batches, made, folder / name))
    return model, logs


def _run(trainer: Trainer[Any, Any]) -> Trained:
    """Train to the end, or find it done."""
    trainer.run(lambda _: None)
    lines = read_log(trainer.folder)
    seconds, before = 0.0, 0
    for line in lines:
        seconds += (line["step"] - before) * line["seconds_per_step"]
        before = line["step"]
    return lines[-1], round(seconds, 1)
