"""Decoders of Llama, Mistral, Qwen2 and Qwen3 compute what transformers computes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from parity import (  # noqa: E402
    Prompt,
    check_parity,
    our_logits,
    reinitialise,
    save,
    state_of,
    undetected_swaps,
)
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mm1_mlx.checkpoint import load_config  # noqa: E402
from mm1_mlx.config import DecoderConfig, RopeScaling  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402

pytestmark = pytest.mark.reference

VOCABULARY = 101
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def decoder(
    kind: str, width: int, heads: int, keys: int, **fields: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": width + 8,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        **fields,
    }


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# By name: the seed, whose greedy tokens are diverse, and the config.
CASES = {
    "llama, all heads": (1, decoder("llama", 32, 4, 4, rms_norm_eps=1e-5)),
    "llama, 2 queries a key, tied, biases": (
        0,
        decoder(
            "llama",
            48,
            6,
            3,
            tie_word_embeddings=True,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "llama, 3 queries a key, wide heads, linear rope": (
        0,
        decoder(
            "llama",
            36,
            6,
            2,
            head_dim=14,
            rope_theta=5e5,
            rope_scaling={"type": "linear", "factor": 4.0},
        ),
    ),
    "llama, llama3 rope as transformers 4 spells it": (
        1,
        decoder("llama", 32, 2, 1, rope_scaling={"rope_type": "llama3"} | LLAMA3),
    ),
    "llama, llama3 rope as transformers 5 spells it": (
        0,
        decoder(
            "llama",
            32,
            2,
            2,
            rope_parameters={"rope_type": "llama3", "rope_theta": 3e4} | LLAMA3,
        ),
    ),
    "mistral, window of 5": (0, decoder("mistral", 32, 4, 2, sliding_window=5)),
    "qwen2, untied": (0, decoder("qwen2", 32, 4, 4, rope_theta=1e6)),
    "qwen2, tied, 7 queries a key": (
        1,
        decoder("qwen2", 56, 7, 1, tie_word_embeddings=True),
    ),
    "qwen2, window of 4": (
        0,
        decoder(
            "qwen2",
            32,
            4,
            2,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=0,
        ),
    ),
    "qwen3, untied": (0, decoder("qwen3", 32, 4, 4, head_dim=8)),
    "qwen3, tied, wide heads, biases": (
        0,
        decoder(
            "qwen3",
            32,
            2,
            1,
            head_dim=24,
            tie_word_embeddings=True,
            attention_bias=True,
        ),
    ),
}


def reference(config: dict[str, Any], seed: int) -> Any:
    config_class, model_class = CLASSES[config["model_type"]]
    model = model_class(config_class(**copy.deepcopy(config))).eval()
    tied = config.get("tie_word_embeddings", False)
    # A tied head repeats its last token for ever where embeddings dominate.
    reinitialise(model, seed, embedding=0.03 if tied else 1.0)
    model.tie_weights()
    return model


def forward_of(model: Any) -> Callable[..., Any]:
    def forward(tokens: list[int], _: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens])).logits[0]

    return forward


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    seed, config = CASES[name]
    model = reference(config, seed)
    save(tmp_path / "in", state_of(model, config), config)
    convert(str(tmp_path / "in"), tmp_path / "out")
    check_parity(tmp_path / "out", forward_of(model), Prompt.make(VOCABULARY), [None])


def test_a_folder_that_transformers_saved_converts(tmp_path: Path) -> None:
    model = reference(CASES["qwen3, tied, wide heads, biases"][1], 0)
    model.save_pretrained(tmp_path / "in")
    convert(str(tmp_path / "in"), tmp_path / "out")
    written = load_config(tmp_path / "out").decoder
    assert written is not None
    assert written.tie_word_embeddings


def config_of(values: dict[str, Any], tmp_path: Path) -> DecoderConfig:
    kind = values["model_type"]
    config_class, model_class = CLASSES[kind]
    model = model_class(config_class(**copy.deepcopy(values)))
    save(tmp_path / "in", state_of(model, values), values)
    convert(str(tmp_path / "in"), tmp_path / "out")
    config = load_config(tmp_path / "out").decoder
    assert config is not None
    return config


def test_eps_theta_and_activation_are_the_source_s(tmp_path: Path) -> None:
    values = decoder(
        "llama", 16, 2, 1, rms_norm_eps=3e-6, rope_theta=12345.0, hidden_act="gelu"
    )
    assert config_of(values, tmp_path) == DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        rms_norm_eps=3e-6,
        rope_theta=12345.0,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        hidden_act="gelu",
    )


def test_rope_scaling_is_the_source_s(tmp_path: Path) -> None:
    values = CASES["llama, llama3 rope as transformers 5 spells it"][1]
    config = config_of(values, tmp_path)
    assert config.rope_theta == 3e4
    assert config.rope_scaling == RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )


# Biased and norms equal in width, so that mutated rules can swap many tensors.
SWAPS = {
    "llama_hf": decoder("llama", 32, 4, 4, attention_bias=True, mlp_bias=True),
    "qwen_hf, 2": decoder("qwen2", 32, 4, 4),
    "qwen_hf, 3": decoder("qwen3", 32, 1, 1, head_dim=32, attention_bias=True),
}


@pytest.mark.parametrize("name", SWAPS)
def test_every_swap_of_two_rules_is_noticed(name: str, tmp_path: Path) -> None:
    config = SWAPS[name]
    model = reference(config, 0)
    folder = save(tmp_path / "in", state_of(model, config), config)
    convert(str(folder), tmp_path / "out")
    prompt = Prompt.make(VOCABULARY)
    count, unnoticed = undetected_swaps(
        folder, tmp_path / "out", lambda m: our_logits(m, prompt, None)
    )
    assert count > 10
    assert unnoticed == []
