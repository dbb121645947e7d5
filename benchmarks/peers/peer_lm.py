"""mlx-lm, as ``compare.py`` asks it: decoders alone."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import worker

worker.preload()

import mlx.core as mx  # noqa: E402
from mlx_lm import load, stream_generate  # noqa: E402

model: Any = None
tokenizer: Any = None


def open_model(model_path: str) -> None:
    """Load a model."""
    global model, tokenizer
    model, tokenizer = load(model_path)
    mx.eval(model.parameters())


def ask(prompt: str, tokens: int = 1) -> dict[str, Any]:
    """One answer to a text that is taken as it is."""
    pieces = stream_generate(model, tokenizer, prompt, max_tokens=tokens)
    return worker.timed(int(piece.token) for piece in pieces)


def train(
    texts: list[str], batch: int, rank: int, length: int, scale: float
) -> list[float]:
    """Seconds of every step of LoRA on all linear layers of all blocks."""
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback
    from mlx_lm.tuner.trainer import train as run
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    model.freeze()
    options = {"rank": rank, "scale": scale, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), options)
    rows = [(tokenizer.encode(text)[:length], 0) for text in texts]
    seconds: list[float] = []

    class Report(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            seconds.append(1 / train_info["iterations_per_second"])

    with tempfile.TemporaryDirectory() as folder:
        run(
            model,
            optimizers.AdamW(learning_rate=worker.TRAINING_RATE),
            rows,
            args=TrainingArgs(
                batch_size=batch,
                iters=len(rows) // batch,
                steps_per_report=1,
                steps_per_save=10_000,
                max_seq_length=length,
                adapter_file=f"{folder}/adapters.safetensors",
            ),
            training_callback=Report(),
        )
    return seconds


TASKS = {"open": open_model, "ask": ask, "train": train, "peak": worker.peak}

if __name__ == "__main__":
    worker.serve(TASKS)
