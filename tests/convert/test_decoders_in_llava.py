"""Decoders of every format serve inside LLaVA, as ``convert/shared/language.py`` finds them.

The oracle is transformers' LLaVA. For Gemma the pictures are scaled as the text is:
transformers did so for as long as the public LLaVA-Gemma models were trained, and scales
text alone since https://github.com/huggingface/transformers/pull/44432.
"""

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import decoders  # noqa: E402
from decoders import VOCABULARY  # noqa: E402
from parity import Prompt, check_parity, pictures  # noqa: E402
from transformers import LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from mm1_mlx.checkpoint import load_config  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402

pytestmark = pytest.mark.reference

IMAGE_ID = 100
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
# By kind: the draw, whose greedy tokens are diverse and leave out the image token, which
# the reference takes for a picture; and what a decoder's config adds.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma": (0, {"head_dim": 8, "tie_word_embeddings": False}),
    "mixtral": (2, {"num_local_experts": 4}),
    "olmoe": (0, {"num_experts": 12, "eos_token_id": 2}),
    "phi3": (0, {"eos_token_id": 2}),
    "stablelm": (0, {"use_qkv_bias": True}),
}


def llava(kind: str) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "image_token_index": IMAGE_ID,
        "text_config": decoders.sizes(kind, **KINDS[kind][1]),
        "vision_config": VISION,
    }


def reference(kind: str) -> Any:
    classes = (LlavaConfig, LlavaForConditionalGeneration)
    model = decoders.reference(classes, copy.deepcopy(llava(kind)), KINDS[kind][0])
    if kind == "gemma":
        model.model.multi_modal_projector.register_forward_hook(
            lambda *args: args[-1] * 32**0.5
        )
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_transformers(kind: str, tmp_path: Path) -> None:
    model = reference(kind)
    decoders.save(tmp_path / "in", decoders.state_of(model), llava(kind))
    convert(str(tmp_path / "in"), tmp_path / "out")

    def forward(tokens: list[int], pixels: Any) -> Any:
        with torch.no_grad():
            ids = torch.tensor([tokens])
            return model(input_ids=ids, pixel_values=pixels).logits[0]

    count = load_config(tmp_path / "out").num_image_tokens
    prompt = Prompt.make(VOCABULARY, count, IMAGE_ID)
    check_parity(tmp_path / "out", forward, prompt, pictures(24))
