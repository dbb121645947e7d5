"""open_clip's names and how it makes pictures, for its format.

https://github.com/mlfoundations/open_clip/blob/89fb801/src/open_clip/transformer.py
"""

from collections.abc import Mapping
from typing import Any

from mm1_mlx.config import ImageConfig
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from ..rules import Op, Table, conv, split, transpose
from ..source import Source
from .fields import Fields

# By open_clip's name within a block, ours.
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
DEFAULTS = {
    "mode": "RGB",
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
RESIZE = {"squash": "squash", "shortest": "crop"}


def table() -> Table:
    """The rules of both towers; a ``CustomTextCLIP``'s text tower has a name of its own."""
    names: Table = {
        **tower("visual."),
        "visual.proj": transpose("vision.projection.weight"),
        "logit_scale": "text.logit_scale",
        # What OpenAI's files say of their sizes.
        **dict.fromkeys(("input_resolution", "context_length", "vocab_size")),
    }
    for prefix in ("", "text."):
        names |= {
            f"{prefix}token_embedding.weight": "text.token_embedding.weight",
            f"{prefix}positional_embedding": "text.position_embedding",
            f"{prefix}text_projection": transpose("text.projection.weight"),
            # A buffer that old versions saved.
            f"{prefix}attn_mask": None,
            **_linear(f"{prefix}ln_final", "text.final_layer_norm"),
            **_blocks(prefix, "text."),
        }
    return names


def tower(prefix: str) -> Table:
    """The rules of the image encoder alone, without CLIP's projection."""
    return {
        f"{prefix}class_embedding": "vision.class_embedding",
        f"{prefix}positional_embedding": "vision.position_embedding",
        f"{prefix}conv1.weight": conv("vision.patch_embedding.weight"),
        **_linear(f"{prefix}ln_pre", "vision.pre_layernorm"),
        **_linear(f"{prefix}ln_post", "vision.post_layernorm"),
        **_blocks(prefix, "vision."),
    }


def _blocks(prefix: str, ours: str) -> Table:
    names: Table = {}
    for theirs, leaf in BLOCK.items():
        block = f"{prefix}transformer.resblocks.{{}}.{theirs}"
        names |= _linear(block, f"{ours}layers.{{}}.{leaf}")
    for kind in ("weight", "bias"):
        fused = f"{prefix}transformer.resblocks.{{}}.attn.in_proj_{kind}"
        names[fused] = _queries_keys_values(f"{ours}layers.{{}}.self_attn", kind)
    return names


def _queries_keys_values(attention: str, kind: str) -> Op:
    return split(*(f"{attention}.{x}_proj.{kind}" for x in "qkv"))


def _linear(theirs: str, ours: str) -> Table:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def image_section(source: Source, known: Mapping[str, Any], size: int) -> ImageConfig:
    """How the source's ``preprocess_cfg`` makes ``size`` x ``size`` pixels.

    Args:
        source: the checkpoint.
        known: fields of it that the config may leave out.
        size: what the encoder takes.

    Raises:
        ConfigError: it does so in a way that this program does not know.
    """
    given = source.config.get("preprocess_cfg") or {}
    fields = Fields(given, "preprocess_cfg", DEFAULTS | dict(known))
    fields.expect("mode", "RGB")
    # Its bilinear reads all pixels, unlike TensorFlow's, the one that is known here.
    fields.expect("interpolation", "bicubic")
    fields.expect("resize_mode", *RESIZE)
    fields.expect("size", size, [size, size], [3, size, size])
    resize = RESIZE[fields.require("resize_mode")]
    section = ImageConfig.from_dict(
        {
            "size": size,
            "resize": resize,
            "mean": fields.require("mean"),
            "std": fields.require("std"),
            "crop_rounding": "even" if resize == "crop" else "down",
        }
    )
    fields.finish(("fill_color",))
    return section
