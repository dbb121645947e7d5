"""CLIP as open_clip stores it: Apple's DFN, LAION's, and others with a plain ViT.

https://github.com/mlfoundations/open_clip/blob/89fb801/src/open_clip/model.py

A source is in this format if ``open_clip_config.json`` is its only config: where there is
a ``config.json`` beside it, as in apple/DFN5B-CLIP-ViT-H-14-378, that one is read.
"""

from typing import Any

from mm1_mlx.config import MM1Config, TextConfig, VisionConfig
from mm1_mlx.config.limits import MAX_HIDDEN_SIZE
from mm1_mlx.errors import ConfigError

from ..rules import Table
from ..shared import open_clip, open_clip_table
from ..shared.fields import Fields
from ..source import Source
from . import clip_hf

# What open_clip's own config is made of.
CONFIG = {"model_cfg", "preprocess_cfg"}
# CLIPVisionCfg's and CLIPTextCfg's.
VISION = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16,
    "image_size": 224,
}  # fmt: skip
TEXT = {
    "context_length": 77, "vocab_size": 49_408, "width": 512, "heads": 8, "layers": 12,
    "mlp_ratio": 4.0, "pad_id": 0, "pool_type": "argmax", "proj_type": "linear",
}  # fmt: skip
# What acts in training only, or tells open_clip where to find things.
IGNORED = ("patch_dropout", "output_tokens", "hf_tokenizer_name", "tokenizer_kwargs")


def detect(source: Source) -> bool:
    """Whether open_clip's config is the source's only one."""
    return "model_cfg" in source.config and set(source.config) <= CONFIG


def rules(source: Source) -> Table:  # noqa: ARG001
    """Every tensor name of both towers, with a text tower of its own or without."""
    return open_clip.table()


def config(source: Source) -> MM1Config:
    """Both towers.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    defaults = {"quick_gelu": open_clip_table.has_quick_gelu(source)}
    fields = Fields(source.config["model_cfg"], "model_cfg", defaults)
    act = "quick_gelu" if fields.get("quick_gelu") else "gelu"
    size = fields.integer("embed_dim")
    vision = _vision(fields.require("vision_cfg"), act, size)
    text = _text(fields.require("text_cfg"), act, size)
    # A text tower of its own has the names alone of its own.
    fields.finish(("init_logit_scale", "custom_text"))
    known = {"resize_mode": "squash"} if open_clip_table.is_squashed(source) else {}
    image = open_clip.image_section(source, known, vision.image_size)
    return MM1Config(vision=vision, text=text, image=image)


def _vision(values: Any, act: str, projection_size: int) -> VisionConfig:
    fields = Fields(values, "model_cfg.vision_cfg", VISION)
    fields.expect("pool_type", "tok")
    fields.expect("pos_embed_type", "learnable")
    width = fields.integer("width")
    section = VisionConfig.from_dict(
        {
            "image_size": clip_hf.square(fields, "image_size"),
            "patch_size": clip_hf.square(fields, "patch_size"),
            "hidden_size": width,
            "intermediate_size": _times(width, fields),
            "num_hidden_layers": fields.integer("layers"),
            "num_attention_heads": width // max(1, fields.integer("head_width")),
            "hidden_act": act,
            "pre_norm": not fields.get("no_ln_pre"),
            "projection_size": projection_size,
        }
    )
    fields.finish(IGNORED)
    return section


def _text(values: Any, act: str, projection_size: int) -> TextConfig:
    fields = Fields(values, "model_cfg.text_cfg", TEXT)
    fields.expect("text_arch", "clip")
    fields.expect("pool_type", "argmax", "eos")
    fields.expect("proj_type", "linear")
    width, by_eos = fields.integer("width"), fields.get("pool_type") == "eos"
    fields.get("eos_id")
    section = TextConfig.from_dict(
        {
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": width,
            "intermediate_size": _times(width, fields),
            "num_hidden_layers": fields.integer("layers"),
            "num_attention_heads": fields.integer("heads"),
            "hidden_act": act,
            "max_position_embeddings": fields.integer("context_length"),
            "projection_size": projection_size,
            "eos_token_id": fields.integer("eos_id") if by_eos else None,
            "pad_token_id": fields.integer("pad_id"),
        }
    )
    fields.finish((*IGNORED, "bos_id"))
    return section


def _times(width: int, fields: Fields) -> int:
    ratio = fields.require("mlp_ratio")
    if type(ratio) not in (int, float) or not 0 < ratio < MAX_HIDDEN_SIZE:
        raise ConfigError(
            f"{fields.where}.mlp_ratio: {ratio!r:.80} is not a number above 0 and below "
            f"{MAX_HIDDEN_SIZE}"
        )
    return int(width * ratio)
