"""OLMoE computes what transformers computes, in the layouts of the hub, of memory and of mlx-lm."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import decoders  # noqa: E402
from decoders import sizes  # noqa: E402
from transformers import OlmoeConfig, OlmoeForCausalLM  # noqa: E402

from mm1_mlx.config import MoEConfig  # noqa: E402
from mm1_mlx.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

OLMOE = (OlmoeConfig, OlmoeForCausalLM)
TINY = sizes("olmoe", num_experts=12, num_experts_per_tok=8, eos_token_id=2)
CASES = {
    "8 of 12 experts": (1, TINY),
    "2 of 4 experts, normalised, tied, biases": (
        0,
        TINY
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "num_key_value_heads": 4,
        },
    ),
}


def hub_layout(state: dict[str, Any]) -> dict[str, Any]:
    """The fused experts in the many matrices that the hub's checkpoints have."""
    names = {}
    for name, x in state.items():
        block = name.partition("gate_up_proj")[0].partition("down_proj")[0]
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(x):
                gate, up = expert.chunk(2)
                names |= {f"{block}{i}.gate_proj.weight": gate}
                names |= {f"{block}{i}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            names |= {f"{block}{i}.down_proj.weight": y for i, y in enumerate(x)}
        else:
            names[name] = x
    return names


def mlx_layout(state: dict[str, Any]) -> dict[str, Any]:
    """The stacked experts that mlx-lm saves."""
    names = {}
    for name, x in state.items():
        block = name.partition("mlp.experts.")[0] + "mlp."
        if name.endswith("experts.gate_up_proj"):
            gate, up = x.chunk(2, dim=1)
            names[f"{block}switch_mlp.gate_proj.weight"] = gate
            names[f"{block}switch_mlp.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            names[f"{block}switch_mlp.down_proj.weight"] = x
        else:
            names[name] = x
    return names


LAYOUTS: dict[str, Any] = {"hub": hub_layout, "fused": dict, "mlx-lm": mlx_layout}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, layout: Any, tmp_path: Path
) -> None:
    seed, values = CASES[name]
    model = decoders.reference(OLMOE, values, seed)
    state = layout(decoders.state_of(model))
    decoders.check(tmp_path, decoders.forward_of(model), state, values)


# Square experts and as many keys as queries, so that many tensors can change places.
SQUARE = TINY | {"intermediate_size": 32, "num_key_value_heads": 4}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_swap_of_two_rules_is_noticed(layout: Any, tmp_path: Path) -> None:
    values = SQUARE | {"attention_bias": True}
    state = decoders.state_of(decoders.reference(OLMOE, values, 0))
    # Four matrices; three of experts; four norms and four biases; both tables.
    assert decoders.check_swaps(tmp_path, layout(state), values) == 6 + 3 + 28 + 1


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    values = TINY | decoders.MARKED
    assert decoders.config_of(tmp_path, values) == decoders.expected(
        qk_norm="full",
        moe=MoEConfig(
            num_experts=12, experts_per_token=8, every=1, offset=0, norm_topk_prob=False
        ),
    )


def test_what_the_source_leaves_out_is_olmoe_1b_7b_s(tmp_path: Path) -> None:
    config = decoders.config_of(tmp_path, {"model_type": "olmoe"})
    assert config.moe is not None
    assert not config.moe.norm_topk_prob
    assert (config.moe.num_experts, config.moe.experts_per_token) == (64, 8)
    assert (config.rope_theta, config.rms_norm_eps) == (10_000, 1e-5)
    assert config.hidden_act == "silu"


def test_clipped_projections_are_refused(tmp_path: Path) -> None:
    message = "clip_qkv: 8.0 is not supported; supported: leaving it out"
    with pytest.raises(ConfigError, match=message):
        decoders.config_of(tmp_path, TINY | {"clip_qkv": 8.0})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_olmoe_1b_7b_fits(layout: Any, tmp_path: Path) -> None:
    values = {"model_type": "olmoe", "intermediate_size": 1024}
    shapes = decoders.shapes_of(OLMOE, {"intermediate_size": 1024}, layout)
    assert decoders.count_parameters(tmp_path, values, shapes) == 6_919_161_856
