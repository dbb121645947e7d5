"""OpenELM computes what Apple's modelling code says.

transformers has no OpenELM; the oracle is ``openelm_oracle.py``, in plain PyTorch, from
Apple's code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import decoders  # noqa: E402
from decoders import VOCABULARY  # noqa: E402
from openelm_oracle import OpenELM  # noqa: E402
from parity import reinitialise  # noqa: E402

from mm1_mlx.config import DecoderConfig, LayerSizes  # noqa: E402
from mm1_mlx.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

TINY = {
    "model_type": "openelm",
    "vocab_size": VOCABULARY,
    "model_dim": 32,
    "head_dim": 8,
    "num_transformer_layers": 3,
    "num_query_heads": [2, 4, 6],
    "num_kv_heads": [1, 1, 3],
    "ffn_multipliers": [0.5, 1.0, 1.26],
    "ffn_dim_divisor": 8,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "qkv_multipliers": [0.5, 1.0],
    "num_gqa_groups": 2,
    "rope_max_length": 4096,
}
INNER = [16, 32, 40]
# By name: the draw, whose greedy tokens are diverse, the config, and the widths.
CASES: dict[str, tuple[int, dict[str, Any], list[int]]] = {
    "as published": (0, TINY, INNER),
    "no norms of heads, untied, another base": (
        0,
        TINY
        | {
            "normalize_qk_projections": False,
            "share_input_output_layers": False,
            "rope_freq_constant": 500,
        },
        INNER,
    ),
}


def reference(values: dict[str, Any], inner: list[int], seed: int) -> OpenELM:
    model = OpenELM(values, inner)
    tied = values["share_input_output_layers"]
    reinitialise(model, seed, embedding=0.03 if tied else 1.0)
    return model


def forward_of(model: OpenELM) -> Callable[..., Any]:
    def forward(tokens: list[int], _: Any) -> Any:
        with torch.no_grad():
            return model(torch.tensor(tokens))

    return forward


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_the_oracle(name: str, tmp_path: Path) -> None:
    seed, values, inner = CASES[name]
    model = reference(values, inner, seed)
    decoders.check(tmp_path, forward_of(model), model.state_dict(), values)


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    # Every block alike and square, so that many tensors can change places.
    values = TINY | {"num_query_heads": [4] * 3, "num_kv_heads": [4] * 3}
    values |= {"ffn_multipliers": [1.0] * 3, "share_input_output_layers": False}
    model = reference(values, [32] * 3, 0)
    # Seven matrices; two norms of heads and two of blocks; both tables.
    count = decoders.check_swaps(tmp_path, model.state_dict(), values)
    assert count == 21 + 1 + 1 + 1


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    values = TINY | {"rope_freq_constant": 12345, "max_context_length": 77}
    sizes = zip([2, 4, 6], [1, 1, 3], INNER, strict=True)
    assert decoders.config_of(tmp_path, values) == DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=12345.0,
        max_position_embeddings=77,
        tie_word_embeddings=True,
        qk_norm="head",
        layer_sizes=tuple(
            LayerSizes(
                num_attention_heads=heads, num_key_value_heads=keys, intermediate_size=h
            )
            for heads, keys, h in sizes
        ),
    )


def test_what_the_source_leaves_out_is_upstream_s(tmp_path: Path) -> None:
    lists = {"num_query_heads": [16] * 12, "num_kv_heads": [16] * 12}
    lists["ffn_multipliers"] = [4] * 12
    config = decoders.config_of(tmp_path, {"model_type": "openelm"} | lists)
    assert (config.rope_theta, config.rms_norm_eps) == (10_000, 1e-6)
    assert (config.hidden_act, config.head_dim) == ("silu", 128)
    assert (config.qk_norm, config.tie_word_embeddings) == (None, False)
    assert config.intermediate_size == 8192


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_with_glu": False}, "ffn_with_glu: False is not supported"),
        ({"normalization_layer_name": "layer_norm"}, "'layer_norm' is not supported"),
        (
            {"num_query_heads": [2, 4]},
            r"num_query_heads: \[2, 4\] is not a list of one",
        ),
        ({"num_kv_heads": None}, "field 'num_kv_heads' is missing"),
        (
            {"ffn_multipliers": [0.5, "1", 2]},
            "ffn_multipliers: .* is not a list of one",
        ),
        (
            {"num_query_heads": [2.5, 4, 6]},
            "num_attention_heads: expected int, got 2.5",
        ),
        ({"num_kv_heads": [1, 3, 3]}, "num_attention_heads 4 is not a multiple of"),
        ({"ffn_dim_divisor": 0}, "ffn_dim_divisor: 0 is below 1"),
        (
            {"ffn_dim_divisor": 10**400},
            "ffn_dim_divisor: 10*... is larger than any model's",
        ),
        ({"model_dim": 10**400}, "model_dim: 10*... is larger than any model's"),
        ({"activation_fn_name": "relu"}, "activation 'relu' is not supported"),
    ],
)
def test_other_models_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        decoders.config_of(tmp_path, TINY | fields)


# The published sizes: heads and multipliers as the config.json files of apple/OpenELM-*
# list them, which are evenly spaced from 0.5 to 4, rounded to two places.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "270M": (
        {
            "model_dim": 1280,
            "head_dim": 64,
            "num_query_heads": [12] * 5 + [16] * 7 + [20] * 4,
        },
        271_527_168,
    ),
    "450M": (
        {
            "model_dim": 1536,
            "head_dim": 64,
            "num_query_heads": [12] * 3 + [16] * 7 + [20] * 6 + [24] * 4,
        },
        457_179_136,
    ),
    "1.1B": (
        {
            "model_dim": 2048,
            "head_dim": 64,
            "num_query_heads": [16] * 3 + [20] * 7 + [24] * 8 + [28] * 6 + [32] * 4,
        },
        1_079_891_456,
    ),
    "3B": (
        {
            "model_dim": 3072,
            "head_dim": 128,
            "num_query_heads": [12] * 4 + [16] * 14 + [20] * 12 + [24] * 6,
        },
        3_036_647_424,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fit(name: str, tmp_path: Path) -> None:
    fields, parameters = PUBLISHED[name]
    count = len(fields["num_query_heads"])
    step = 3.5 / (count - 1)
    values = fields | {
        "model_type": "openelm",
        "num_transformer_layers": count,
        "num_kv_heads": [heads // 4 for heads in fields["num_query_heads"]],
        "ffn_multipliers": [round(0.5 + step * i, 2) for i in range(count)],
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    }
    config = decoders.config_of(tmp_path / "config", values)
    assert config.layer_sizes is not None
    values["vocab_size"] = config.vocab_size
    with torch.device("meta"):
        model = OpenELM(values, [s.intermediate_size for s in config.layer_sizes])
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    assert decoders.count_parameters(tmp_path, values, shapes) == parameters
