"""A LLaVA that mlx-vlm quantized computes what transformers computes with its weights.

The oracle is transformers' model whose every packed weight was unpacked by
``mx.dequantize``: quantization itself loses nothing here.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import sources

torch = pytest.importorskip("torch")
from parity import (  # noqa: E402
    Prompt,
    check_parity,
    our_logits,
    pictures,
    reinitialise,
    undetected_swaps,
)
from transformers import LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from mm1_mlx.checkpoint import load_config, load_model  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402

pytestmark = pytest.mark.reference

VOCABULARY = 97
IMAGE_ID = 96
SIZE = 24
PACKING = {"group_size": 32, "bits": 4, "mode": "affine"}
# Widths are equal across the parts, so that mutated rules can swap many tensors.
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIG = {
    "model_type": "llava",
    "image_token_index": IMAGE_ID,
    "text_config": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 4,
        "eos_token_id": 2,
        **WIDTHS,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": SIZE,
        "patch_size": 8,
        **WIDTHS,
    },
}


def published(name: str) -> str:
    """The name that mlx-vlm keeps for a tensor of transformers 5's model."""
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


def packed_source(folder: Path, seed: int = 0) -> tuple[Path, Any]:
    """A folder as mlx-vlm writes it, and transformers' model of its unpacked weights."""
    values = {key: x for key, x in CONFIG.items() if key != "model_type"}
    model = LlavaForConditionalGeneration(LlavaConfig(**values)).eval()
    reinitialise(model, seed)
    tensors: sources.Tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x, module = mx.array(parameter.numpy()), published(name)
            if x.ndim == 4:
                tensors[module] = x.transpose(0, 2, 3, 1)
            elif x.ndim == 2:
                parts = mx.quantize(x, **PACKING)
                unpacked = np.array(mx.dequantize(*parts, **PACKING))
                parameter.copy_(torch.from_numpy(unpacked))
                for leaf, part in zip(
                    ("weight", "scales", "biases"), parts, strict=True
                ):
                    tensors[f"{module.removesuffix('.weight')}.{leaf}"] = part
            else:
                tensors[module] = x
    return sources.write(folder, CONFIG | {"quantization": PACKING}, tensors), model


def prompt_of(out: Path) -> Prompt:
    return Prompt.make(VOCABULARY, load_config(out).num_image_tokens, IMAGE_ID)


def test_logits_and_greedy_tokens_equal_transformers(tmp_path: Path) -> None:
    folder, model = packed_source(tmp_path / "in")
    convert(str(folder), tmp_path / "out")

    def forward(tokens: list[int], pixels: Any) -> Any:
        with torch.no_grad():
            ids = torch.tensor([tokens])
            return model(input_ids=ids, pixel_values=pixels).logits[0]

    prompt = prompt_of(tmp_path / "out")
    check_parity(tmp_path / "out", forward, prompt, pictures(SIZE))
    weights = load_model(tmp_path / "out").tensors()
    bare = {name for name, x in weights.items() if x.ndim == 2 and x.dtype != mx.uint32}
    # All that is packed in the source is packed in ours, but for one bare array.
    assert {x for x in bare if not x.endswith((".scales", ".biases"))} == {
        "vision.position_embedding"
    }


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    folder, _ = packed_source(tmp_path / "in")
    convert(str(folder), tmp_path / "out")
    prompt, pixels = prompt_of(tmp_path / "out"), pictures(SIZE)[0]
    count, unnoticed = undetected_swaps(
        folder, tmp_path / "out", lambda m: our_logits(m, prompt, pixels)
    )
    assert count > 100
    assert unnoticed == []
