"""The ``image`` section of a config, from a Hugging Face preprocessor_config.json."""

from typing import Any

from mm1_mlx.config import ImageConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from .fields import Fields
from .source import Source

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


def image_section(source: Source, size: int) -> ImageConfig:
    """How the source turns a picture into ``size`` x ``size`` pixels.

    Raises:
        ConfigError: it does so in a way that this program does not know.
    """
    # LLaVA's own name for it, which converted checkpoints may keep.
    pad = {"do_pad": source.config.get("image_aspect_ratio") == "pad"}
    fields = Fields(_values(source), f"{source.name}: preprocessor", DEFAULTS | pad)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        fields.expect(step, True)
    fields.expect("resample", BICUBIC)
    factor = fields.get("rescale_factor") or 1 / 255
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-3:
        raise ConfigError(
            f"{fields.where}.rescale_factor: {factor!r} is not supported; supported: 1/255"
        )
    section = ImageConfig.from_dict(
        {
            "size": _size(fields, size),
            "resize": "squash" if _squashes(source) else _resize(fields),
            "mean": fields.require("image_mean"),
            "std": fields.require("image_std"),
        }
    )
    fields.finish(HARMLESS)
    return section


def _values(source: Source) -> Any:
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


def _size(fields: Fields, default: int) -> int:
    """The one side of what ``size`` and ``crop_size`` say."""
    sides = [default]
    for key in ("size", "crop_size"):
        value = fields.get(key)
        if key == "crop_size" and not fields.get("do_center_crop"):
            continue  # nothing is cropped to it
        sides += value.values() if isinstance(value, dict) else [value or default]
    if any(side != default for side in sides):
        raise ConfigError(
            f"{fields.where}: size {fields.get('size')} and crop_size "
            f"{fields.get('crop_size')} do not make the encoder's {default} x {default}"
        )
    return default
