"""mlx-vlm, as ``compare.py`` asks it."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import worker

worker.preload()

import mlx.core as mx  # noqa: E402
from mlx_vlm import load, stream_generate  # noqa: E402
from mlx_vlm.models.cache import make_prompt_cache  # noqa: E402

model: Any = None
processor: Any = None
state: Any = None


def open_model(model_path: str) -> None:
    """Load a model."""
    global model, processor, state
    model, processor = load(model_path)
    mx.eval(model.parameters())
    state = None


def ask(
    prompt: str,
    images: list[str] = [],  # noqa: B006
    tokens: int = 1,
    keep: bool = False,
) -> dict[str, Any]:
    """One answer; with ``keep`` as a caller asks who keeps the prompt's cache by hand."""
    global state
    # Pictures before the text, as the others are asked: a second question then begins
    # like the first.
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=False,
    )
    options: dict[str, Any] = {}
    if keep:
        from mlx_vlm.generate import PromptCacheState

        state = state or PromptCacheState()
        options["prompt_cache_state"] = state
    pieces = stream_generate(
        model, processor, text, image=images or None, max_tokens=tokens,
        temperature=0.0, **options,
    )  # fmt: skip
    return worker.timed(int(piece.token) for piece in pieces)


def encode(images: list[str]) -> float:
    """Seconds to encode pictures, decoded and resized."""
    from PIL import Image

    pixels = mx.concatenate(
        [
            mx.array(
                processor.image_processor(Image.open(path).convert("RGB"))[
                    "pixel_values"
                ][0]
            )[None]
            for path in images
        ]
    )
    mx.eval(pixels)
    start = time.perf_counter()
    features = model.vision_tower(
        pixels.transpose(0, 2, 3, 1), output_hidden_states=True
    )[-1][model.vision_feature_layer]
    mx.eval(model.multi_modal_projector(features[:, 1:]))
    return time.perf_counter() - start


def count(size: int, text: int) -> dict[str, int]:
    """Matrix products and softmax elements of a first token about one picture.

    As ``stream_generate`` does it: all positions but the last fill the cache, whose
    logits are never computed, then the last one is run.
    """
    config = model.config
    places = (size // config.vision_config.patch_size) ** 2
    ids = mx.array([[config.image_token_index] * places + [5] * text])

    def first(pixels: mx.array) -> list[mx.array]:
        cache = make_prompt_cache(model.language_model)
        inputs = model.get_input_embeddings(ids, pixels).inputs_embeds
        for some in (slice(0, -1), slice(-1, None)):
            out = model.language_model(
                ids[:, some], inputs_embeds=inputs[:, some], cache=cache
            )
        return [out.logits[:, -1], *(x for layer in cache for x in layer.state)]

    return worker.count_products(first, mx.zeros((1, 3, size, size)))


def train(
    rows: list[dict[str, Any]], batch: int, rank: int, length: int, scale: float
) -> list[float]:
    """Seconds of every step of LoRA on all linear layers of the language model."""
    import mlx.optimizers as optimizers
    from mlx_vlm.trainer.api import Trainer
    from mlx_vlm.trainer.common.model import prepare_model_for_training
    from mlx_vlm.trainer.vlm.config import VLMTrainingArgs

    mx.random.seed(0)
    prepare_model_for_training(
        model, lora_rank=rank, lora_alpha=rank * scale, verbose=False
    )
    seconds: list[float] = []

    class Report:
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            seconds.append(1 / train_info["iterations_per_second"])

    with tempfile.TemporaryDirectory() as folder:
        arguments = VLMTrainingArgs(
            batch_size=batch,
            iters=len(rows) // batch,
            steps_per_report=1,
            steps_per_eval=None,
            steps_per_save=10_000,
            max_seq_length=length,
            # As ours: the answer alone.
            train_on_completions=True,
            adapter_file=f"{folder}/adapters.safetensors",
        )
        Trainer(
            model,
            arguments,
            train_dataset=rows,
            processing_class=processor,
            optimizer=optimizers.AdamW(learning_rate=worker.TRAINING_RATE),
            training_callback=Report(),
        ).train()
    return seconds


TASKS = {
    "count": count,
    "open": open_model,
    "ask": ask,
    "encode": encode,
    "train": train,
    "peak": worker.peak,
}

if __name__ == "__main__":
    worker.serve(TASKS)
