"""LLaVA in transformers' layouts computes what transformers computes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from parity import (  # noqa: E402
    Prompt,
    State,
    check_parity,
    our_logits,
    pictures,
    reinitialise,
    save,
    state_of,
    undetected_swaps,
)
from transformers import LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from mm1_mlx.checkpoint import load_config  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402

pytestmark = pytest.mark.reference

VOCABULARY = 97
IMAGE_ID = 96
# Draws whose greedy tokens are diverse and leave out the image token, which the
# reference takes for a picture.
SEEDS = {
    "llama, 2 queries a key, wide heads, layer -1, class token": 1,
    "qwen2, tied": 3,
    "qwen3, wide heads": 2,
}


def llava(
    text: dict[str, Any], vision: dict[str, Any], **fields: Any
) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": IMAGE_ID,
        "text_config": {"vocab_size": VOCABULARY, "eos_token_id": 2} | text,
        "vision_config": {"model_type": "clip_vision_model"} | vision,
        **fields,
    }


# Widths are equal across the parts, so that mutated rules can swap many tensors.
EQUAL = llava(
    {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
    },
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
)
CASES = {
    "llama, all heads, layer -2": EQUAL,
    "llama, 2 queries a key, wide heads, layer -1, class token": llava(
        {
            "model_type": "llama",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {
            "hidden_size": 36,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 42,
            "patch_size": 14,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "mistral, 3 queries a key, no projector bias": llava(
        {
            "model_type": "mistral",
            "hidden_size": 36,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_window": None,
        },
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 35,
            "patch_size": 7,
        },
        multimodal_projector_bias=False,
        projector_hidden_act="gelu_pytorch_tanh",
        vision_feature_layer=-3,
    ),
    "qwen2, tied": llava(
        {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 24,
            "patch_size": 8,
        },
        tie_word_embeddings=True,
    ),
    "qwen3, wide heads": llava(
        {
            "model_type": "qwen3",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 24,
        },
        {
            "hidden_size": 20,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        # The first of three hidden states past the embeddings.
        vision_feature_layer=1,
    ),
}


def reference(config: dict[str, Any], seed: int = 0) -> Any:
    model = LlavaForConditionalGeneration(LlavaConfig(**copy.deepcopy(config))).eval()
    tied = config.get("tie_word_embeddings", False)
    # A tied head repeats its last token for ever where embeddings dominate.
    reinitialise(model, seed, embedding=0.03 if tied else 1.0)
    model.tie_weights()
    return model


def forward_of(model: Any) -> Callable[..., Any]:
    def forward(tokens: list[int], pixels: Any) -> Any:
        with torch.no_grad():
            ids = torch.tensor([tokens])
            return model(input_ids=ids, pixel_values=pixels).logits[0]

    return forward


def prompt_of(out: Path) -> Prompt:
    return Prompt.make(VOCABULARY, load_config(out).num_image_tokens, IMAGE_ID)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    model = reference(config, SEEDS.get(name, 0))
    save(tmp_path / "in", state_of(model, config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    size = config["vision_config"]["image_size"]
    check_parity(
        tmp_path / "out", forward_of(model), prompt_of(tmp_path / "out"), pictures(size)
    )


def published(name: str) -> str:
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


LAYOUTS = {
    "published": published,
    "transformers 4.52": lambda n: n.replace("tower.", "tower.vision_model."),
    "transformers 5": lambda n: n,
    "saved by transformers 5": lambda n: published(n).replace(".vision_model.", "."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_layout_gives_the_same_model(layout: str, tmp_path: Path) -> None:
    model = reference(EQUAL)
    state: State = {LAYOUTS[layout](n): x for n, x in model.state_dict().items()}
    save(tmp_path / "in", state, EQUAL, shards=3)
    convert(str(tmp_path / "in"), tmp_path / "out")
    check_parity(
        tmp_path / "out",
        forward_of(model),
        prompt_of(tmp_path / "out"),
        pictures(28)[:1],
    )


def test_a_folder_that_transformers_saved_converts(tmp_path: Path) -> None:
    model = reference(EQUAL)
    model.save_pretrained(tmp_path / "in")
    report = convert(str(tmp_path / "in"), tmp_path / "out")
    check_parity(
        tmp_path / "out", forward_of(model), prompt_of(tmp_path / "out"), pictures(28)
    )
    # The last block lies past the feature layer: 16 tensors, and the final norm's 2.
    assert len(report.dropped[str(tmp_path / "in")]) == 18


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    model = reference(EQUAL)
    folder = save(tmp_path / "in", state_of(model, EQUAL), EQUAL)
    convert(str(folder), tmp_path / "out")
    prompt, pixels = prompt_of(tmp_path / "out"), pictures(28)[0]
    count, unnoticed = undetected_swaps(
        folder, tmp_path / "out", lambda m: our_logits(m, prompt, pixels)
    )
    assert count > 100
    assert unnoticed == []
