"""Honeybee with the C-Abstractor (arXiv 2312.06742), MM1's connector.

https://github.com/kakaobrain/honeybee/blob/68a8d84/honeybee/modeling_honeybee.py
"""

from typing import Any

from mm1_mlx.config import CAbstractorConfig, ImageConfig, MM1Config, VisionConfig
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from ..rules import Table
from ..shared import c_abstractor
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import clip_hf, llama_hf

# The language model's name, its width, and defaults of all configs.
IGNORED = ("lm_config", "hidden_size", "is_composition", "tie_word_embeddings")


def detect(source: Source) -> bool:
    """Whether the source is a Honeybee; its config.json names no model type."""
    keys = set(source.config)
    projectors = {"projector_config", "visual_projector_config"}
    unnamed = not source.config.get("model_type")
    return unnamed and "vision_config" in keys and bool(keys & projectors)


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the whole model."""
    return {
        **clip_hf.table("vision_model.vision_model."),
        **c_abstractor.rules("abstractor."),
        **llama_hf.table("language_model.model.", "language_model."),
    }


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(source.config, "HoneybeeConfig")
    projector = _projector(fields)
    vision, image = _vision(fields, projector.integer("feature_layer_index"))
    text = llama_hf.with_defaults(_text(fields) | {"model_type": "llama"})
    decoder = llama_hf.decoder_config(text)
    connector = _connector(
        projector,
        input_size=vision.hidden_size,
        num_features=vision.num_features,
        output_size=decoder.hidden_size,
    )
    fields.finish(IGNORED)
    return MM1Config(
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=image,
        prompt=prompt_section(source, text, "honeybee"),
    )


def _projector(fields: Fields) -> Fields:
    """The projector's fields; the first checkpoints keep them in two places."""
    older = fields.get("visual_projector_config")
    return Fields(
        older or fields.require("projector_config"),
        "HoneybeeConfig.projector_config",
        {"num_query_tokens": fields.get("num_query_tokens")},
    )


def _vision(fields: Fields, feature_layer: int) -> tuple[VisionConfig, ImageConfig]:
    """The encoder, and how pictures are made for it: squashed."""
    given = Fields(
        fields.require("vision_config"),
        "HoneybeeConfig.vision_config",
        {"image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    )
    given.expect("encoder_type", "openai.clip")
    ours = ("encoder_type", "image_mean", "image_std", "pretrained_vision_name_or_path")
    encoder = {key: x for key, x in given.values.items() if key not in ours}
    # The sections' own model type, which is empty, hides the encoder's.
    encoder["model_type"] = encoder.get("model_type") or "clip_vision_model"
    vision = clip_hf.vision_config(
        encoder, feature_layer=feature_layer, apply_post_norm=False, drop_cls=True
    )
    image = ImageConfig.from_dict(
        {
            "size": vision.image_size,
            "resize": "squash",
            "mean": given.require("image_mean"),
            "std": given.require("image_std"),
        }
    )
    return vision, image


def _text(fields: Fields) -> dict[str, Any]:
    """The decoder's fields, if the weights are whole."""
    language = Fields(fields.get("lm_config") or {}, "HoneybeeConfig.lm_config")
    language.expect("delta_model_name_or_path")
    text = Fields(fields.require("text_config"), "HoneybeeConfig.text_config")
    text.expect("model_type", "llama")
    return text.values


def _connector(fields: Fields, **sizes: int) -> CAbstractorConfig:
    fields.expect("projector_type", "c-abs")
    eos = fields.integer("num_eos_tokens") if fields.get("num_eos_tokens") else 0
    section = CAbstractorConfig.from_dict(
        {
            **sizes,
            "num_image_tokens": fields.integer("num_query_tokens") + eos,
            "num_eos_tokens": eos,
            "hidden_size": fields.integer("hidden_size"),
            "depth": fields.integer("depth"),
            "mlp_depth": fields.integer("mlp_depth"),
            "prenorm": fields.boolean("prenorm"),
            "position_embedding": fields.boolean("pos_emb"),
        }
    )
    # Sizes of the neighbours and a default of all configs.
    fields.finish(
        (
            *("encoder_hidden_size", "output_hidden_size"),
            "tie_word_embeddings",
        )
    )
    return section
