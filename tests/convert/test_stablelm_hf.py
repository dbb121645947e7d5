"""StableLM computes what transformers computes."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import decoders  # noqa: E402
from decoders import VOCABULARY, sizes  # noqa: E402
from transformers import StableLmConfig, StableLmForCausalLM  # noqa: E402

from mm1_mlx.config import DecoderConfig  # noqa: E402
from mm1_mlx.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

STABLELM = (StableLmConfig, StableLmForCausalLM)
TINY = sizes("stablelm", hidden_size=64, use_qkv_bias=True)
CASES = {
    "a quarter rotated, biases": (1, TINY),
    "half rotated, no biases, all heads": (
        0,
        TINY
        | {
            "partial_rotary_factor": 0.5,
            "use_qkv_bias": False,
            "num_key_value_heads": 4,
        },
    ),
    "all rotated, tied, as transformers 5 spells it": (
        0,
        TINY
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 3e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    seed, values = CASES[name]
    model = decoders.reference(STABLELM, values, seed)
    state = decoders.state_of(model)
    decoders.check(tmp_path, decoders.forward_of(model), state, values)


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    values = TINY | {"num_key_value_heads": 4, "intermediate_size": 64}
    state = decoders.state_of(decoders.reference(STABLELM, values, 0))
    # Seven matrices; three biases and two norms of two tensors each in a block; the
    # final norm's two; both tables.
    assert decoders.check_swaps(tmp_path, state, values) == 21 + 21 + 1 + 1


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    values = TINY | {"layer_norm_eps": 3e-6, "rope_theta": 12345.0}
    assert decoders.config_of(tmp_path, values) == DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        norm="layer",
        rms_norm_eps=3e-6,
        rope_theta=12345.0,
        rotary_dim=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        qkv_bias=True,
    )


def test_what_the_source_leaves_out_is_stablelm_3b_s(tmp_path: Path) -> None:
    config = decoders.config_of(tmp_path, {"model_type": "stablelm"})
    assert (config.rope_theta, config.rms_norm_eps) == (10_000, 1e-5)
    assert (config.hidden_act, config.qkv_bias) == ("silu", False)
    assert (config.head_dim, config.rotary_dim) == (80, 20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_layernorm": True}, "qk_layernorm: True is not supported"),
        ({"use_parallel_residual": True}, "use_parallel_residual: True is not"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5 of head_dim 16"),
        ({"partial_rotary_factor": "0.5"}, "partial_rotary_factor: '0.5' of head_dim"),
        (
            {
                "partial_rotary_factor": 0.5,
                "rope_parameters": {"partial_rotary_factor": 0.25},
            },
            "partial_rotary_factor: 0.5 is not supported; supported: 0.25",
        ),
    ],
)
def test_other_models_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        decoders.config_of(tmp_path, TINY | fields)


def test_stablelm_2_1_6b_fits(tmp_path: Path) -> None:
    values = {
        "vocab_size": 100_352,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "use_qkv_bias": True,
    }
    shapes = decoders.shapes_of(STABLELM, values)
    values |= {"model_type": "stablelm"}
    assert decoders.count_parameters(tmp_path, values, shapes) == 1_644_515_328
