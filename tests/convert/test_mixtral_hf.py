"""Mixtral computes what transformers computes, in the layouts of the hub, of memory and of mlx-lm."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import decoders  # noqa: E402
from decoders import VOCABULARY, sizes  # noqa: E402
from transformers import MixtralConfig, MixtralForCausalLM  # noqa: E402

from mm1_mlx.config import MoEConfig  # noqa: E402
from mm1_mlx.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

MIXTRAL = (MixtralConfig, MixtralForCausalLM)
TINY = sizes("mixtral", num_local_experts=4, num_experts_per_tok=2)
CASES = {
    "2 of 4 experts": (0, TINY),
    "3 of 5 experts, tied, window of 5": (
        1,
        TINY
        | {
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "tie_word_embeddings": True,
            "sliding_window": 5,
        },
    ),
}


def hub_layout(state: dict[str, Any]) -> dict[str, Any]:
    """The fused experts in the many matrices that the hub's checkpoints have."""
    names = {}
    for name, x in state.items():
        block = name.partition("mlp.experts.")[0] + "block_sparse_moe.experts."
        if name.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(x):
                names[f"{block}{i}.w1.weight"], names[f"{block}{i}.w3.weight"] = (
                    expert.chunk(2)
                )
        elif name.endswith("experts.down_proj"):
            names |= {f"{block}{i}.w2.weight": expert for i, expert in enumerate(x)}
        else:
            names[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = x
    return names


def mlx_layout(state: dict[str, Any]) -> dict[str, Any]:
    """The stacked experts that mlx-lm saves."""
    names = {}
    for name, x in state.items():
        block = name.partition("mlp.experts.")[0] + "block_sparse_moe."
        if name.endswith("experts.gate_up_proj"):
            gate, up = x.chunk(2, dim=1)
            names[f"{block}switch_mlp.gate_proj.weight"] = gate
            names[f"{block}switch_mlp.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            names[f"{block}switch_mlp.down_proj.weight"] = x
        else:
            names[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = x
    return names


LAYOUTS: dict[str, Any] = {"hub": hub_layout, "fused": dict, "mlx-lm": mlx_layout}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, layout: Any, tmp_path: Path
) -> None:
    seed, values = CASES[name]
    model = decoders.reference(MIXTRAL, values, seed)
    state = layout(decoders.state_of(model))
    decoders.check(tmp_path, decoders.forward_of(model), state, values)


def test_a_folder_that_transformers_saved_converts(tmp_path: Path) -> None:
    model = decoders.reference(MIXTRAL, TINY, 0)
    model.save_pretrained(tmp_path / "in")
    decoders.convert(str(tmp_path / "in"), tmp_path / "out")
    prompt = decoders.Prompt.make(VOCABULARY)
    forward = decoders.forward_of(model)
    decoders.check_parity(tmp_path / "out", forward, prompt, [None])


# Square experts and as many keys as queries, so that many tensors can change places.
SQUARE = TINY | {"intermediate_size": 32, "num_key_value_heads": 4}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_swap_of_two_rules_is_noticed(layout: Any, tmp_path: Path) -> None:
    state = decoders.state_of(decoders.reference(MIXTRAL, SQUARE, 0))
    # Queries, keys, values and outputs; three of experts; two of norms; both tables.
    assert decoders.check_swaps(tmp_path, layout(state), SQUARE) == 6 + 3 + 1 + 1


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    values = TINY | decoders.MARKED
    values |= {"sliding_window": 77, "router_aux_loss_coef": 0.02}
    assert decoders.config_of(tmp_path, values) == decoders.expected(
        max_position_embeddings=131_072,
        sliding_window=77,
        moe=MoEConfig(num_experts=4, experts_per_token=2, every=1, offset=0),
    )


def test_what_the_source_leaves_out_is_mixtral_8x7b_s(tmp_path: Path) -> None:
    config = decoders.config_of(tmp_path, {"model_type": "mixtral"})
    assert config.rope_theta == 1e6
    assert config.rms_norm_eps == 1e-5
    assert config.hidden_act == "silu"


def test_another_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="experts are SwiGLU; hidden_act 'gelu'"):
        decoders.config_of(tmp_path, TINY | {"hidden_act": "gelu"})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_mixtral_8x7b_fits(layout: Any, tmp_path: Path) -> None:
    values = {"model_type": "mixtral"}
    shapes = decoders.shapes_of(MIXTRAL, {}, layout)
    assert decoders.count_parameters(tmp_path, values, shapes) == 46_702_792_704
