"""mm1_mlx, as ``compare.py`` asks it."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import worker

from mm1_mlx import Ask, load, stream, stream_batch
from mm1_mlx.answer import Settings
from mm1_mlx.shots import Shot

runtime: Any = None


def open_model(model_path: str) -> None:
    """Load a model; what the one before kept is gone."""
    global runtime
    if runtime is not None:
        runtime.close()
    runtime = load(model_path)


def ask(
    prompt: str,
    images: list[str] = [],  # noqa: B006
    tokens: int = 1,
    fresh: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """One answer."""
    if fresh:
        runtime.forget()
    pieces = stream(runtime, prompt, images, max_tokens=tokens, **options)
    return worker.timed(p.token for p in pieces if p.token is not None)


def shots(
    examples: list[list[str]], prompt: str, image: str | None, fresh: bool
) -> dict[str, Any]:
    """One answer behind solved examples: image, question, answer."""
    held = [Shot((image,), answer, question) for image, question, answer in examples]
    images = [image] if image else []
    return ask(prompt, images, fresh=fresh, shots=held, shot_style="chat")


def encode(images: list[str]) -> float:
    """Seconds to encode pictures, decoded and resized."""
    import mlx.core as mx

    from mm1_mlx.image import load_pictures

    pictures = load_pictures(images, runtime.config.image)
    start = time.perf_counter()
    work = runtime._worker.submit(lambda: mx.eval(runtime.model.encode(pictures)))
    work.result()
    return time.perf_counter() - start


def batch(prompts: list[list[str]], tokens: int) -> dict[str, Any]:
    """All answers together: tokens per second once all prompts are read, and the tokens."""
    runtime.forget()
    settings = Settings(max_tokens=tokens)
    asks = [Ask(prompt, [image], settings) for prompt, image in prompts]
    said: list[list[int]] = [[] for _ in asks]
    begun = 0.0
    decoded = 0
    for number, piece in stream_batch(runtime, asks, size=len(asks)):
        if piece.token is None:
            continue
        said[number].append(piece.token)
        if begun:
            decoded += 1
        elif all(said):
            begun = time.perf_counter()
    return {"rate": decoded / (time.perf_counter() - begun), "tokens": said}


def count(size: int, text: int) -> dict[str, int]:
    """Matrix products and softmax elements of a first token about one picture."""
    import mlx.core as mx

    from mm1_mlx.kernels import blocked, exponential
    from mm1_mlx.memory.prefixes import KVPrecision
    from mm1_mlx.prefill import Context, prefill
    from mm1_mlx.prompt import Prompt

    model = runtime.model
    softmax = 0
    exp2, exponential_, evaluate = blocked.exp2, exponential._exp2, mx.eval

    def seen(x: mx.array) -> mx.array:
        nonlocal softmax
        softmax += x.size
        return exp2(x)

    def first(pixels: mx.array) -> list[mx.array]:
        tokens = model.connector(model.vision(pixels))[0]
        words = mx.zeros((text, tokens.shape[1]))
        embeddings = mx.concatenate([words, tokens])
        prompt = Prompt((0,) * embeddings.shape[0])
        context = Context(prompt, model.make_cache(), KVPrecision(), 0, embeddings)
        logits = prefill(model, context)
        return [logits, *(x for layer in context.cache for x in layer.state[:2])]

    # A gradient's rule cannot be traced, softmaxes here are made of plain operations,
    # and what is traced is never evaluated.
    blocked.exp2, exponential._exp2 = seen, exponential._power
    mx.eval = lambda *_: None
    try:
        counts = worker.count_products(first, mx.zeros((1, size, size, 3)))
    finally:
        blocked.exp2, exponential._exp2, mx.eval = exp2, exponential_, evaluate
    # Those of few queries are mlx's own.
    return counts | {"softmax_elements": counts["softmax_elements"] + softmax}


def train(
    rows: list[dict[str, Any]], batch: int, rank: int, length: int, scale: float
) -> list[float]:
    """Seconds of every step of LoRA on all linear layers of the decoder's blocks."""
    from mm1_mlx.train.job import Job

    steps = len(rows) // batch
    given = {
        "batch_size": batch,
        "micro_batches": 1,
        "trained": (),
        "adapter_rank": rank,
        "adapter_scale": scale,
        "max_length": length,
        "truncate": True,
        "steps": steps,
        "warmup_steps": 0,
        "decay_steps": 0,
        "learning_rate": worker.TRAINING_RATE,
        "weight_decay": 0.01,
        "precision": "float32",
        "outside": True,
        "log_every": 1,
        "save_every": 10_000,
    }
    path = runtime.path
    # Training loads what it trains.
    runtime.close()
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        job = Job(path, Path(folder) / "run", "sft", given | {"data": (str(data),)})
        job.run(lambda line: seconds.append(line["seconds_per_step"]))
    return seconds


TASKS = {
    "train": train,
    "count": count,
    "open": open_model,
    "ask": ask,
    "shots": shots,
    "encode": encode,
    "batch": batch,
    "peak": worker.peak,
}

if __name__ == "__main__":
    worker.serve(TASKS)
