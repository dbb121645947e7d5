"""mlx-lm, as ``compare.py`` asks it: decoders alone."""

from __future__ import annotations

import sys
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


TASKS = {"open": open_model, "ask": ask, "peak": worker.peak}

if __name__ == "__main__":
    worker.serve(TASKS)
