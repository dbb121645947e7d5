"""The ``image`` section of a config, from a Hugging Face preprocessor_config.json."""

from collections.abc import Collection
from typing import Any

from mm1_mlx.config import ImageConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from ..source import Source
from .fields import Fields

BICUBIC = 3
HARMLESS = (
    "_valid_processor_keys",
    "model_input_names",
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "data_format",
    "input_data_format",
    "device",
    "disable_grouping",
    "return_tensors",
    "default_to_square",
    # What the processor tells the tokenizer's side.
    "image_seq_length",
    "patch_size",
)
# CLIPImageProcessor's.
DEFAULTS = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


def image_section(
    source: Source, size: int, ignored: Collection[str] = ()
) -> ImageConfig:
    """How the source turns a picture into ``size`` x ``size`` pixels.

    Args:
        source: where the preprocessor's config is.
        size: the encoder's.
        ignored: fields that the caller reads elsewhere.

    Raises:
        ConfigError: it does so in a way that this program does not know.
    """
    # LLaVA's own name for it, which converted checkpoints may keep.
    pad = {"do_pad": source.config.get("image_aspect_ratio") == "pad"}
    fields = Fields(
        preprocessor(source), f"{source.name}: preprocessor", DEFAULTS | pad
    )
    for step in ("do_resize", "do_rescale", "do_normalize"):
        fields.expect(step, True)
    fields.expect("resample", BICUBIC)
    factor = fields.get("rescale_factor") or 1 / 255
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-3:
        raise ConfigError(
            f"{fields.where}.rescale_factor: {factor!r} is not supported; supported: 1/255"
        )
    resize = "squash" if _squashes(source) else _resize(fields)
    section = ImageConfig.from_dict(
        {
            "size": size,
            "resize": resize,
            "crop_from": _crop_from(fields, size, resize),
            "mean": fields.require("image_mean"),
            "std": fields.require("image_std"),
        }
    )
    fields.finish((*HARMLESS, *ignored))
    return section


def preprocessor(source: Source) -> Any:
    """The preprocessor's fields, of the file that has them."""
    values = source.json("preprocessor_config.json")
    if values is None:
        # transformers 5 writes one file for all of a model's processors.
        values = (source.json("processor_config.json") or {}).get("image_processor")
    return values or {}


def _squashes(source: Source) -> bool:
    """Whether OpenCLIP's own config, the one trained with, says so: Apple's DFN5B."""
    own = (source.json("open_clip_config.json") or {}).get("preprocess_cfg")
    return isinstance(own, dict) and own.get("resize_mode") == "squash"


def _resize(fields: Fields) -> str:
    aspect = fields.get("image_aspect_ratio")
    crop, pad = fields.get("do_center_crop"), fields.get("do_pad")
    size = fields.get("size")
    if pad or aspect == "pad":
        return "pad"
    if isinstance(size, dict) and "height" in size:
        return "squash"  # to what a crop, if there is one, leaves as it is
    if crop:
        return "crop"
    # A number is the shortest edge's, too.
    raise ConfigError(
        f"{fields.where}.size: {size} without do_center_crop makes pictures of many "
        "sizes, which the encoder here does not take"
    )


def _crop_from(fields: Fields, size: int, resize: str) -> int | None:
    """What the shortest edge becomes before ``size`` is cut out, None for ``size``."""
    edges, cuts = _sides(fields, "size", size), _sides(fields, "crop_size", size)
    if not fields.get("do_center_crop"):
        cuts = []  # nothing is cropped to it
    edge = edges[0] if resize == "crop" and len(edges) == 1 else None
    larger = edge if type(edge) is int and edge > size else None
    if any(side != size for side in (*cuts, *([] if larger else edges))):
        raise ConfigError(
            f"{fields.where}: size {fields.get('size')} and crop_size "
            f"{fields.get('crop_size')} do not make the encoder's {size} x {size}"
        )
    return larger


def _sides(fields: Fields, key: str, default: int) -> list[Any]:
    value = fields.get(key)
    return list(value.values()) if isinstance(value, dict) else [value or default]
