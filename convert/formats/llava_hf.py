"""LLaVA-1.5 as transformers stores it: ``LlavaForConditionalGeneration``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/llava/modeling_llava.py

Names changed over the years: published checkpoints have ``vision_tower.vision_model.``
and ``language_model.model.``, transformers 4.52 moved everything but the head under
``model.``, and 5 dropped the inner ``vision_model.``. All of them are read.
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MLPConfig, MM1Config, VisionConfig
from mm1_mlx.errors import ConfigError

from ..rules import Table
from ..shared import language
from ..shared.fields import Fields
from ..shared.picture import image_section
from ..shared.text import prompt_section
from ..source import Source
from . import clip_hf

# LlavaConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
# What follows from the parts' sizes, or acts in training or on pictures.
IGNORED = ("image_seq_length", "vocab_size", "ignore_index", "image_aspect_ratio")


def detect(source: Source) -> bool:
    """Whether the source is LLaVA in transformers' layout, not in LLaVA's own."""
    config = source.config
    return config.get("model_type") == "llava" and "mm_vision_tower" not in config


def rules(source: Source) -> Table:
    """The tensor names of the whole model, in every layout."""
    text = source.config.get("text_config")
    names = language.table(text, "language_model.model.", "language_model.")
    names |= language.table(text, "model.language_model.", "")
    for prefix in ("", "model."):
        names |= clip_hf.table(f"{prefix}vision_tower.vision_model.")
        names |= clip_hf.table(f"{prefix}vision_tower.")
        names |= {
            f"{prefix}multi_modal_projector.{leaf}": f"connector.{leaf}"
            for leaf in (
                *("linear_1.weight", "linear_1.bias"),
                *("linear_2.weight", "linear_2.bias"),
            )
        }
    return names


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(source.config, "LlavaConfig", DEFAULTS)
    vision, text = vision_section(fields), text_values(fields)
    decoder = language.decoder_config(text)
    connector = connector_section(fields, vision, decoder)
    fields.finish(IGNORED)
    return MM1Config(
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=image_section(source, vision.image_size),
        prompt=prompt_section(source, text, "llava"),
    )


def text_values(fields: Fields) -> dict[str, Any]:
    """The decoder's fields, defaults included.

    Raises:
        ConfigError: the decoder is none of ours.
    """
    values = language.values(fields.get("text_config"), f"{fields.where}.text_config")
    if fields.get("tie_word_embeddings"):
        values["tie_word_embeddings"] = True
    return values


def vision_section(fields: Fields) -> VisionConfig:
    """The encoder, with the features that the connector reads.

    Raises:
        ConfigError: the encoder is none of ours.
    """
    where = f"{fields.where}.vision_config"
    values = Fields(fields.require("vision_config"), where).values
    kind = values.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise ConfigError(
            f"{where}: model type {kind!r} is not supported; supported: "
            "'clip_vision_model'"
        )
    fields.expect("vision_feature_select_strategy", "default", "full")
    layer = fields.integer("vision_feature_layer")
    if layer >= 0:
        # Hidden states are the embeddings and every block's output.
        layer -= (
            Fields(values, where, clip_hf.DEFAULTS).integer("num_hidden_layers") + 1
        )
    return clip_hf.vision_config(
        values,
        feature_layer=layer,
        apply_post_norm=False,
        drop_cls=fields.require("vision_feature_select_strategy") == "default",
    )


def connector_section(
    fields: Fields, vision: VisionConfig, decoder: DecoderConfig, **chosen: Any
) -> MLPConfig:
    """The projector, with what the caller chose of it."""
    return MLPConfig.from_dict(
        {
            "input_size": vision.hidden_size,
            "num_features": vision.num_features,
            "hidden_size": decoder.hidden_size,
            "output_size": decoder.hidden_size,
            "hidden_act": fields.activation("projector_hidden_act"),
            "bias": fields.require("multimodal_projector_bias"),
            **chosen,
        }
    )
