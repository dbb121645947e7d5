"""The first Gemma computes what transformers computes, alone and inside LLaVA."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

torch = pytest.importorskip("torch")
import decoders  # noqa: E402
from decoders import sizes  # noqa: E402
from transformers import GemmaConfig, GemmaForCausalLM  # noqa: E402

from mm1_mlx.checkpoint import load_model  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402

pytestmark = pytest.mark.reference

GEMMA = (GemmaConfig, GemmaForCausalLM)
TINY = sizes("gemma", head_dim=14, num_key_value_heads=1)
CASES = {
    "one key": (0, TINY),
    "all heads, the old name of the activation, biases, untied": (
        0,
        TINY
        | {
            "num_key_value_heads": 4,
            "hidden_act": "gelu",
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    seed, values = CASES[name]
    model = decoders.reference(GEMMA, values, seed)
    state = decoders.state_of(model)
    decoders.check(tmp_path, decoders.forward_of(model), state, values)


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    values = TINY | {"num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 32}
    state = decoders.state_of(decoders.reference(GEMMA, values, 0))
    assert decoders.check_swaps(tmp_path, state, values) == 21 + 1


def test_norms_are_stored_as_what_they_multiply_by(tmp_path: Path) -> None:
    state = decoders.state_of(decoders.reference(GEMMA, TINY, 0))
    decoders.save(tmp_path / "in", state, TINY)
    convert(str(tmp_path / "in"), tmp_path / "out")
    tensors = load_model(tmp_path / "out").tensors()
    for name in ("norm.weight", "layers.1.post_attention_layernorm.weight"):
        expected = mx.array(state[f"model.{name}"].numpy()) + 1
        assert mx.array_equal(tensors[f"decoder.{name}"], expected)


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    values = TINY | decoders.MARKED
    assert decoders.config_of(tmp_path, values) == decoders.expected(
        num_key_value_heads=1,
        head_dim=14,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        hidden_act="gelu_tanh",
        embedding_scale=32**0.5,
    )


def test_what_the_source_leaves_out_is_gemma_7b_s(tmp_path: Path) -> None:
    config = decoders.config_of(tmp_path, {"model_type": "gemma"})
    assert (config.rope_theta, config.rms_norm_eps) == (10_000, 1e-6)
    assert (config.hidden_act, config.head_dim) == ("gelu_tanh", 256)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        ({"hidden_act": "gelu"}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu"}, "gelu"),
        ({"hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"hidden_act": "silu"}, "silu"),
    ],
)
def test_activations_mean_what_transformers_means(
    fields: dict[str, Any], activation: str, tmp_path: Path
) -> None:
    assert decoders.config_of(tmp_path, TINY | fields).hidden_act == activation


def test_gemma_2b_fits(tmp_path: Path) -> None:
    values = {
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    }
    shapes = decoders.shapes_of(GEMMA, values)
    values |= {"model_type": "gemma"}  # type: ignore[dict-item]
    assert decoders.count_parameters(tmp_path, values, shapes) == 2_506_172_416
