"""Phi-3-mini computes what transformers computes."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import decoders  # noqa: E402
from decoders import sizes  # noqa: E402
from transformers import Phi3Config, Phi3ForCausalLM  # noqa: E402

from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

PHI3 = (Phi3Config, Phi3ForCausalLM)
TINY = sizes("phi3")
CASES = {
    "2 queries a key": (0, TINY),
    "all heads, window of 5": (
        0,
        TINY | {"num_key_value_heads": 4, "sliding_window": 5},
    ),
    "one key, tied": (
        0,
        TINY | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    seed, values = CASES[name]
    model = decoders.reference(PHI3, values, seed)
    state = decoders.state_of(model)
    decoders.check(tmp_path, decoders.forward_of(model), state, values)


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    values = TINY | {"num_key_value_heads": 4, "intermediate_size": 32}
    state = decoders.state_of(decoders.reference(PHI3, values, 0))
    # Those within the fused matrices too.
    assert decoders.check_swaps(tmp_path, state, values) == 21 + 1 + 1


def test_a_fused_matrix_of_other_heads_is_refused(tmp_path: Path) -> None:
    state = decoders.state_of(decoders.reference(PHI3, TINY, 0))
    decoders.save(tmp_path / "in", state, TINY | {"num_key_value_heads": 1})
    message = r"qkv_proj.weight' has shape \[64, 32\], which does not make"
    with pytest.raises(CheckpointError, match=message):
        decoders.convert(str(tmp_path / "in"), tmp_path / "out")


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    values = TINY | decoders.MARKED
    values |= {"sliding_window": 2047, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    assert decoders.config_of(tmp_path, values) == decoders.expected(
        sliding_window=2047,
    )


def test_what_the_source_leaves_out_is_phi_3_mini_s(tmp_path: Path) -> None:
    config = decoders.config_of(tmp_path, {"model_type": "phi3"})
    assert (config.rope_theta, config.rms_norm_eps) == (10_000, 1e-5)
    assert (config.hidden_act, config.head_dim) == ("silu", 96)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
            "type 'longrope' is not supported",
        ),
        ({"rope_scaling": {"type": "su"}}, "type 'su' is not supported"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor: 0.75 is not"),
    ],
)
def test_other_models_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        decoders.config_of(tmp_path, TINY | fields)


def test_phi_3_mini_fits(tmp_path: Path) -> None:
    shapes = decoders.shapes_of(PHI3, {})
    values = {"model_type": "phi3", "num_key_value_heads": 32, "sliding_window": 2047}
    assert decoders.count_parameters(tmp_path, values, shapes) == 3_821_079_552
