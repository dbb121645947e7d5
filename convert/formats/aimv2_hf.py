"""AIMv2 (arXiv 2411.14402): transformers' ``Aimv2VisionModel``, and apple/ml-aim's layout.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/aimv2/modeling_aimv2.py
https://github.com/apple/ml-aim/blob/bd9e068/aim-v2/aim/v2/torch/models.py

Of an ``Aimv2Model`` the encoder is taken: its text tower and the head that pools its
patches are dropped. Apple's first repositories have the tensor names of ml-aim. A model
of native resolution (``is_native``, sincos positions) is read, and sees square tiles of
its ``image_size`` as the others do.
"""

from typing import Any

from mm1_mlx.config import MM1Config, VisionConfig

from ..rules import Table, conv
from ..shared.fields import Fields
from ..shared.picture import image_section
from ..source import Source
from . import aim, clip_hf

# Aimv2VisionConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
SIZES = (
    *("hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
NORMS = {"rms_norm1": "layer_norm1", "rms_norm2": "layer_norm2"}
LINEARS = {
    **{f"attention.{x}_proj": f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")},
    "ffn.gate_proj": "mlp.fc1",
    "ffn.down_proj": "mlp.fc2",
    "ffn.up_proj": "mlp.fc3",
}
HEAD = (
    *("cls_token", "output_proj.weight", "output_proj.bias"),
    *("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"),
)


def table(prefix: str) -> Table:
    """The vision tower's rules, for names that start with ``prefix``."""
    names: Table = {
        f"{prefix}embeddings.patch_embed.weight": conv("vision.patch_embedding.weight"),
        f"{prefix}embeddings.patch_embed.bias": "vision.patch_embedding.bias",
        f"{prefix}embeddings.rms_norm.weight": "vision.patch_layernorm.weight",
        f"{prefix}embeddings.position_embedding.weight": "vision.position_embedding",
        f"{prefix}embeddings.position_ids": None,
        f"{prefix}rms_norm.weight": "vision.post_layernorm.weight",
        **{f"{prefix}head.{leaf}": None for leaf in HEAD},
    }
    block = f"{prefix}encoder.layers.{{}}."
    for theirs, ours in NORMS.items():
        names[f"{block}{theirs}.weight"] = f"vision.layers.{{}}.{ours}.weight"
    for theirs, ours in LINEARS.items():
        for kind in ("weight", "bias"):
            names[f"{block}{theirs}.{kind}"] = f"vision.layers.{{}}.{ours}.{kind}"
    return names


def text_tower() -> Table:
    """What an ``Aimv2Model`` holds besides, dropped by name."""
    text = table("text_model.")
    return {
        **dict.fromkeys(name for name in text if "head." not in name),
        "text_model.embeddings.token_embedding.weight": None,
        **dict.fromkeys(("visual_projection.weight", "text_projection.weight")),
        "logit_scale": None,
    }


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the tower, in every layout."""
    return {**table("vision_model."), **table(""), **text_tower(), **aim.table()}


def detect(source: Source) -> bool:
    """Whether the source is an AIMv2, alone or with a text tower."""
    return source.config.get("model_type") in ("aimv2", "aimv2_vision_model")


def config(source: Source) -> MM1Config:
    """The encoder: the last block, normalised.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    vision = vision_config(source.config.get("vision_config") or source.config)
    return MM1Config(vision=vision, image=image_section(source, vision.image_size))


def vision_config(values: Any, **chosen: Any) -> VisionConfig:
    """The encoder of an Aimv2VisionConfig, with what the caller chose of its features.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "Aimv2VisionConfig", DEFAULTS)
    fields.expect("num_channels", 3)
    # ml-aim's word for the biases that transformers does not have.
    fields.expect("use_bias", False)
    section = VisionConfig.from_dict(
        {
            **{
                key: clip_hf.square(fields, key) for key in ("image_size", "patch_size")
            },
            **{name: fields.integer(name) for name in SIZES},
            "hidden_act": fields.activation("hidden_act"),
            "norm": "rms",
            "layer_norm_eps": fields.require("rms_norm_eps"),
            "class_token": False,
            "position": "sincos" if fields.get("is_native") else "learned",
            "interpolation": "bicubic",
            "patch_bias": True,
            "patch_norm": True,
            "pre_norm": False,
            "attention_bias": fields.boolean("qkv_bias"),
            "mlp_bias": fields.boolean("mlp_bias"),
            "gated_mlp": True,
            **chosen,
        }
    )
    # Whether there is a head, which is dropped; dropout acts in training.
    fields.finish(("use_head", "projection_dropout"))
    return section
