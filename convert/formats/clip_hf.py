"""CLIP as transformers stores it: ``CLIPModel``, and ``CLIPVisionModel`` alone.

Apple's VeCLIP and VeCap-DFN are in this format, too; ``convert/shared/veclip.py`` says how their
pictures are made. Texts need the tokenizer's files beside the source, which their archives
lack: T5's.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/clip/modeling_clip.py
"""

from typing import Any

from mm1_mlx.config import MM1Config, VisionConfig
from mm1_mlx.errors import ConfigError

from ..rules import Table, conv
from ..shared import clip_text, veclip
from ..shared.fields import Fields
from ..shared.picture import image_section
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
    for leaf in clip_text.LEAVES:
        names[f"{prefix}encoder.layers.{{}}.{leaf}"] = f"vision.layers.{{}}.{leaf}"
    return names


# transformers 5 saves a CLIPVisionModel without the prefix.
RULES: Table = {
    **table("vision_model."),
    **table(""),
    **clip_text.table("text_model."),
    "visual_projection.weight": "vision.projection.weight",
    "text_projection.weight": "text.projection.weight",
    "logit_scale": "text.logit_scale",
}


def rules(source: Source) -> Table:  # noqa: ARG001
    """Every tensor name that a CLIP model may have."""
    return RULES


def detect(source: Source) -> bool:
    """Whether the source is a CLIP model or its vision half."""
    return source.config.get("model_type") in ("clip", "clip_vision_model")


def config(source: Source) -> MM1Config:
    """Both towers, or the encoder as MM1 uses it: the last block, normalised, no class."""
    values, text, projection = source.config, None, None
    if values["model_type"] == "clip":
        values, text, projection = clip_text.towers(values)
    elif "CLIPVisionModelWithProjection" in str(values.get("architectures")):
        projection = clip_text.projection_size(values)
    vision = vision_config(values, projection_size=projection)
    size = vision.image_size
    image = veclip.image_section(source, size, text) or image_section(source, size)
    return MM1Config(vision=vision, text=text, image=image)


def vision_config(values: Any, **chosen: Any) -> VisionConfig:
    """The encoder of a CLIPVisionConfig, with what the caller chose of its features.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "CLIPVisionConfig", DEFAULTS)
    fields.expect("model_type", "clip_vision_model", "clip")
    fields.expect("num_channels", 3)
    sizes = {key: square(fields, key) for key in ("image_size", "patch_size")}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    section = VisionConfig.from_dict(
        {
            **sizes,
            **{name: fields.integer(name) for name in (*names, "num_attention_heads")},
            "hidden_act": fields.activation("hidden_act"),
            "layer_norm_eps": fields.require("layer_norm_eps"),
            "interpolation": "bicubic",
            **chosen,
        }
    )
    # What only the text half has, and old configs repeat here; and whether mlx-vlm packed
    # the encoder, too, which the tensors say.
    text = ("vocab_size", "max_position_embeddings", "tie_word_embeddings")
    fields.finish((*text, "skip_vision"))
    return section


def square(fields: Fields, key: str) -> int:
    """The field's value, one side of a square.

    Raises:
        ConfigError: it is something else.
    """
    value = fields.require(key)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        value = value[0]
    if type(value) is not int:
        raise ConfigError(
            f"{fields.where}.{key}: {value!r} is not one side of a square"
        )
    return value
