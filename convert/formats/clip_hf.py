"""Image encoders of CLIP: ``CLIPVisionModel``, and the vision half of ``CLIPModel``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/clip/modeling_clip.py
"""

from typing import Any

from mm1_mlx.config import MM1Config, VisionConfig
from mm1_mlx.errors import ConfigError

from ..fields import Fields
from ..picture import image_section
from ..rules import Table, conv
from ..source import Source

# CLIPVisionConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LEAVES = [
    f"{name}.{kind}"
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("self_attn.out_proj", "layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"),
    )
    for kind in ("weight", "bias")
]


def table(prefix: str) -> Table:
    """The vision tower's rules, for names that start with ``prefix``."""
    embeddings = f"{prefix}embeddings."
    names: Table = {
        f"{embeddings}class_embedding": "vision.class_embedding",
        f"{embeddings}patch_embedding.weight": conv("vision.patch_embedding.weight"),
        f"{embeddings}position_embedding.weight": "vision.position_embedding",
        f"{embeddings}position_ids": None,
        # The typo is the source's.
        f"{prefix}pre_layrnorm.weight": "vision.pre_layernorm.weight",
        f"{prefix}pre_layrnorm.bias": "vision.pre_layernorm.bias",
        f"{prefix}post_layernorm.weight": "vision.post_layernorm.weight",
        f"{prefix}post_layernorm.bias": "vision.post_layernorm.bias",
    }
    for leaf in LEAVES:
        names[f"{prefix}encoder.layers.{{}}.{leaf}"] = f"vision.layers.{{}}.{leaf}"
    return names


TEXT_TOWER = [
    "logit_scale",
    "visual_projection.weight",
    "text_projection.weight",
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.embeddings.position_ids",
    "text_model.final_layer_norm.weight",
    "text_model.final_layer_norm.bias",
    *(f"text_model.encoder.layers.{{}}.{leaf}" for leaf in LEAVES),
]
# transformers 5 saves a CLIPVisionModel without the prefix.
RULES: Table = {
    **table("vision_model."),
    **table(""),
    **dict.fromkeys(TEXT_TOWER),
}


def rules(source: Source) -> Table:  # noqa: ARG001
    """Every tensor name that a CLIP model may have."""
    return RULES


def detect(source: Source) -> bool:
    """Whether the source is a CLIP model or its vision half."""
    return source.config.get("model_type") in ("clip", "clip_vision_model")


def config(source: Source) -> MM1Config:
    """The encoder as MM1 uses it: the last block, normalised, without the class token."""
    values = source.config
    if values["model_type"] == "clip":
        # The second spelling is older and wins in transformers too.
        sections = (values.get("vision_config"), values.get("vision_config_dict"))
        new, old = (Fields(x or {}, "CLIPConfig.vision_config") for x in sections)
        values = new.values | old.values
    vision = vision_config(values)
    return MM1Config(vision=vision, image=image_section(source, vision.image_size))


def vision_config(values: Any, **chosen: Any) -> VisionConfig:
    """The encoder of a CLIPVisionConfig, with what the caller chose of its features.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "CLIPVisionConfig", DEFAULTS)
    fields.expect("model_type", "clip_vision_model", "clip")
    fields.expect("num_channels", 3)
    sizes = {key: _square(fields, key) for key in ("image_size", "patch_size")}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    section = VisionConfig.from_dict(
        {
            **sizes,
            **{name: fields.integer(name) for name in (*names, "num_attention_heads")},
            "hidden_act": fields.activation("hidden_act"),
            "layer_norm_eps": fields.require("layer_norm_eps"),
            **chosen,
        }
    )
    # What only the text half has, and old configs repeat here.
    fields.finish(("vocab_size", "max_position_embeddings", "tie_word_embeddings"))
    return section


def _square(fields: Fields, key: str) -> int:
    value = fields.require(key)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if type(value) is not int:
        raise ConfigError(
            f"{fields.where}.{key}: {value!r} is not one side of a square"
        )
    return value
