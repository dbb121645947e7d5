"""transformers on torch's CPU build, as ``compare.py`` asks it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import worker
from transformers import AutoProcessor, LlavaForConditionalGeneration

model: Any = None
processor: Any = None


def open_model(model_path: str) -> None:
    """Load a model."""
    global model, processor
    model = LlavaForConditionalGeneration.from_pretrained(
        model_path, dtype=torch.float32
    ).eval()
    processor = AutoProcessor.from_pretrained(model_path, use_fast=False)


@torch.inference_mode()
def ask(prompt: str, images: list[str], tokens: int = 1) -> dict[str, Any]:
    """One answer; the first token's time is that of an answer of one token."""
    from PIL import Image

    start = time.perf_counter()
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
    )
    pictures = [Image.open(path).convert("RGB") for path in images]
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    seconds = time.perf_counter() - start
    said = out[0, inputs["input_ids"].shape[1] :].tolist()
    return {"first": seconds, "rate": 0.0, "total": seconds, "tokens": said}


@torch.inference_mode()
def encode(images: list[str]) -> float:
    """Seconds to encode pictures, decoded and resized."""
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in images]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    start = time.perf_counter()
    model.get_image_features(pixels)
    return time.perf_counter() - start


TASKS = {"open": open_model, "ask": ask, "encode": encode, "peak": worker.peak}

if __name__ == "__main__":
    worker.serve(TASKS)
