"""MoE-LLaVA computes what its parts compute in transformers and plain PyTorch.

transformers has StableLM and CLIP; in place of some of StableLM's MLPs stands a loop over
every token and its two best experts, written from DeepSpeed's ``top2gating`` without its
noise and its capacity.
"""

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import llava_oracle  # noqa: E402
from llava_oracle import IMAGE_ID, SIDE, VOCABULARY, WIDTH  # noqa: E402
from parity import State, save  # noqa: E402
from transformers import StableLmConfig, StableLmForCausalLM  # noqa: E402
from transformers.models.stablelm.modeling_stablelm import StableLmMLP  # noqa: E402

from mm1_mlx.checkpoint import load_config  # noqa: E402
from mm1_mlx.config import MoEConfig  # noqa: E402
from mm1_mlx.convert import Source, convert, detect_format  # noqa: E402
from mm1_mlx.convert.formats import moe_llava  # noqa: E402
from mm1_mlx.convert.shared import llava  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MOE = {
    "capacity_factor": 1.5,
    "ep_size": 1,
    "eval_capacity_factor": 2.0,
    "min_capacity": 0,
    "moe_enable": True,
    "moe_layers_idx": [0, 2],
    "moe_mode": "sparse",
    "num_experts": [4, 4],
    "router_aux_loss_coef": 0.01,
    "top_k_experts": 2,
    "train_modules": ["gate_proj", "up_proj", "down_proj", "wg"],
    "use_residual": False,
}
# As the hub's config.json of MoE-LLaVA-StableLM-1.6B-4e has it, but small.
CONFIG = SIZES | {
    "model_type": "moe_llava_stablelm",
    "architectures": ["MoELLaVAStablelmForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "image_projector_type": "mlp2x_gelu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128,
    "mm_hidden_size": WIDTH,
    "mm_image_tower": "openai/tiny",
    "mm_projector_lr": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_video_tower": None,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "moe": MOE,
    "norm_eps": 3e-6,
    "num_heads": 4,
    "rope_pct": 0.25,
    "rope_theta": 12345.0,
    "rotary_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    "use_qkv_bias": True,
    "video_projector_type": "linear",
    "video_global_proj": False,
    "video_temproal_proj": False,
    "video_spatial_proj": False,
}


class Sparse(torch.nn.Module):
    """Every token by itself through its two best experts, under DeepSpeed's names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.deepspeed_moe = torch.nn.Module()
        gate = self.deepspeed_moe.gate = torch.nn.Module()
        gate.wg = torch.nn.Linear(WIDTH, 4, bias=False)
        experts = self.deepspeed_moe.experts = torch.nn.Module()
        experts.deepspeed_experts = torch.nn.ModuleList(
            StableLmMLP(config) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = []
        for token in x.flatten(0, -2):
            shares = self.deepspeed_moe.gate.wg(token).softmax(dim=-1)
            first = int(shares.argmax())
            others = shares.clone()
            others[first] = float("-inf")
            second = int(others.argmax())
            both = shares[first] + shares[second]
            experts = self.deepspeed_moe.experts.deepspeed_experts
            rows.append(
                experts[first](token) * shares[first] / both
                + experts[second](token) * shares[second] / both
            )
        return torch.stack(rows).reshape(x.shape)


@pytest.fixture(autouse=True)
def tiny_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llava.TOWERS, "tiny", VISION)


def reference(seed: int = 1, sparse: tuple[int, ...] = (0, 2)) -> tuple[Any, State]:
    """The forward pass, and the tensors as a checkpoint names them."""
    clip = llava_oracle.clip(VISION)
    decoder = StableLmForCausalLM(
        StableLmConfig(
            **SIZES,
            use_qkv_bias=True,
            layer_norm_eps=3e-6,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 12345.0,
                "partial_rotary_factor": 0.25,
            },
        )
    ).eval()
    for i in sparse:
        decoder.model.layers[i].mlp = Sparse(decoder.config)
    projector = llava_oracle.mlp(WIDTH, WIDTH)
    llava_oracle.renew((clip, decoder, projector), seed)
    state = dict(decoder.state_dict())
    state |= {moe_llava.PROJECTOR + k: v for k, v in projector.state_dict().items()}
    state |= llava_oracle.tower(clip, "model.image_tower.image_tower.")
    forward = llava_oracle.forward_of(
        lambda pixels: llava_oracle.project(clip, projector, pixels, -2),
        decoder,
        IMAGE_ID,
    )
    return forward, state


def test_logits_and_greedy_tokens_equal_the_oracle(tmp_path: Path) -> None:
    forward, state = reference()
    llava_oracle.check(save(tmp_path / "in", state, CONFIG, shards=2), forward)


# The first layer says which rules there are to swap: experts', or a dense layer's.
@pytest.mark.parametrize("sparse", [(0, 2), (1, 3)])
def test_every_swap_of_two_rules_is_noticed(
    sparse: tuple[int, int], tmp_path: Path
) -> None:
    _, state = reference(sparse=sparse)
    config = CONFIG | {"moe": MOE | {"moe_layers_idx": list(sparse)}}
    assert llava_oracle.check_swaps(save(tmp_path / "in", state, config)) > 100


def test_an_encoder_that_lies_elsewhere_is_asked_for(tmp_path: Path) -> None:
    _, state = reference()
    own = {k: v for k, v in state.items() if ".image_tower." not in k}
    save(tmp_path / "in", own, CONFIG)
    with pytest.raises(CheckpointError, match="add --vision openai/tiny"):
        convert(str(tmp_path / "in"), tmp_path / "out")


def read(tmp_path: Path, **changes: Any) -> Any:
    values = copy.deepcopy(CONFIG) | changes
    source = Source(str(save(tmp_path / "in", {}, values)))
    return detect_format(source).config(source)


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    made = read(tmp_path)
    decoder = made.decoder
    assert (decoder.rms_norm_eps, decoder.rope_theta) == (3e-6, 12345.0)
    assert (decoder.norm, decoder.rotary_dim, decoder.qkv_bias) == ("layer", 2, True)
    assert decoder.hidden_act == "silu"
    assert decoder.moe == MoEConfig(num_experts=4, every=2, offset=0)
    assert (made.vision.feature_layer, made.vision.drop_cls) == (-2, True)
    assert made.vision.hidden_act == "quick_gelu"
    assert made.connector.hidden_act == "gelu"
    assert made.image.resize == "pad"
    assert made.prompt.template == "stablelm"
    assert made.prompt.eos_token_ids == (2,)


def test_what_the_source_leaves_out_is_stablelm_epoch_s(tmp_path: Path) -> None:
    values = copy.deepcopy(CONFIG)
    for key in ("norm_eps", "rope_pct", "rope_theta", "use_qkv_bias", "eos_token_id"):
        del values[key]
    source = Source(str(save(tmp_path / "in", {}, values)))
    made = detect_format(source).config(source)
    decoder = made.decoder
    assert decoder is not None
    assert (decoder.rms_norm_eps, decoder.rope_theta) == (1e-5, 10_000)
    assert (decoder.rotary_dim, decoder.qkv_bias) == (2, True)
    assert made.prompt is not None
    assert made.prompt.eos_token_ids == (2,)


def test_two_names_of_a_field_may_agree(tmp_path: Path) -> None:
    decoder = read(tmp_path, layer_norm_eps=3e-6, partial_rotary_factor=0.25).decoder
    assert (decoder.rms_norm_eps, decoder.rotary_dim) == (3e-6, 2)


@pytest.mark.parametrize(
    ("layers", "every", "offset"),
    [([1, 3], 2, 1), ([0, 1, 2, 3], 1, 0), ([2], 4, 2), ([0, 3], 3, 0)],
)
def test_every_nth_layer_is_sparse(
    layers: list[int], every: int, offset: int, tmp_path: Path
) -> None:
    moe = MOE | {"moe_layers_idx": layers, "num_experts": [3] * len(layers)}
    made = read(tmp_path, moe=moe).decoder.moe
    assert (made.num_experts, made.every, made.offset) == (3, every, offset)


def moe(**changes: Any) -> dict[str, Any]:
    return {"moe": MOE | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "moe_llava_phi"},
            "the decoder of 'moe_llava_phi' is none that",
        ),
        ({"model_type": "moe_llava_qwen"}, "decoder of 'moe_llava_qwen' is none that"),
        (
            {"mm_image_tower": "google/siglip-so400m-patch14-384"},
            "is a SigLIP encoder, which does not run here; take the checkpoint without",
        ),
        ({"mm_image_tower": "laion/big"}, "mm_vision_tower: 'big' is not supported"),
        ({"mm_video_tower": "LanguageBind_Video_merge"}, "mm_video_tower: 'LanguageB"),
        (
            {"image_projector_type": "qformer4_36"},
            "mm_projector_type: 'qformer4_36' is",
        ),
        ({"rotary_scaling_factor": 2.0}, "rotary_scaling_factor: 2.0 is not supported"),
        (
            {"layer_norm_eps": 1e-3},
            r"norm_eps 3e-06 and layer_norm_eps 0.001 are two n",
        ),
        ({"partial_rotary_factor": 0.5}, "rope_pct 0.25 and partial_rotary_factor 0.5"),
        ({"use_qkv_bias": "no"}, "use_qkv_bias: expected true or false, got 'no'"),
        ({"surprise": 1}, r"field\(s\) \['surprise'\] are not known here"),
        (moe(use_residual=True), r"moe.use_residual: True is not supported"),
        (moe(top_k_experts=1), r"moe.top_k_experts: 1 is not supported"),
        (moe(moe_enable=False), r"moe.moe_enable: False is not supported"),
        (moe(surprise=1), r"moe: field\(s\) \['surprise'\] are not known here"),
        (
            moe(moe_layers_idx=[0, 1]),
            r"moe_layers_idx: \[0, 1\] is not every n-th of 4",
        ),
        (moe(moe_layers_idx=[0, 3, 2]), r"moe_layers_idx: \[0, 3, 2\] is not every n"),
        (moe(moe_layers_idx=[2, 3]), r"moe_layers_idx: \[2, 3\] is not every n-th"),
        (moe(moe_layers_idx=[]), r"moe_layers_idx: \[\] is not every n-th"),
        (moe(moe_layers_idx=None), "field 'moe_layers_idx' is missing"),
        (moe(num_experts=[4, 8]), r"num_experts: \[4, 8\] is not one number for each"),
        (moe(num_experts=[4]), r"num_experts: \[4\] is not one number for each of 2"),
    ],
)
def test_what_is_not_understood_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_the_converted_config_reads_back(tmp_path: Path) -> None:
    _, state = reference()
    save(tmp_path / "in", state, CONFIG)
    convert(str(tmp_path / "in"), tmp_path / "out")
    made = load_config(tmp_path / "out")
    assert made.num_image_tokens == 16
