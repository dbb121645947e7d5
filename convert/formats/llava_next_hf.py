"""LLaVA-NeXT (1.6) as transformers stores it: ``LlavaNextForConditionalGeneration``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/llava_next/modeling_llava_next.py

An overview and the best of several grids of tiles; padding is cut out of the image tokens
and a learned newline ends their rows.
"""

from dataclasses import replace

from mm1_mlx.config import AnyresTiling, ImageConfig, MM1Config
from mm1_mlx.errors import ConfigError

from ..rules import Table
from ..shared import language
from ..shared.fields import Fields
from ..shared.llava_picture import divide_pinpoints
from ..shared.picture import image_section, preprocessor
from ..shared.text import prompt_section
from ..source import Source
from . import llava_hf

# LlavaNextConfig's; writers leave out what is equal to them.
DEFAULTS = llava_hf.DEFAULTS | {
    "image_grid_pinpoints": [
        *([336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]),
    ],
}
# What the preprocessor says of tiles, which the model's config says too.
TILES = ("image_grid_pinpoints", "aspect_ratio_setting")


def detect(source: Source) -> bool:
    """Whether the source is LLaVA-NeXT in transformers' layout."""
    return source.config.get("model_type") == "llava_next"


def rules(source: Source) -> Table:
    """LLaVA's tensor names, and the newline's."""
    newline = dict.fromkeys(
        ("image_newline", "model.image_newline"), "connector.newline"
    )
    return llava_hf.rules(source) | newline


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(source.config, "LlavaNextConfig", DEFAULTS)
    vision, text = llava_hf.vision_section(fields), llava_hf.text_values(fields)
    # A class token has no place in the rows.
    fields.expect("vision_feature_select_strategy", "default")
    fields.expect("use_image_newline_parameter", True)
    decoder = language.decoder_config(text)
    connector = llava_hf.connector_section(fields, vision, decoder, newline=True)
    image = _image(source, fields, vision.image_size)
    fields.finish(llava_hf.IGNORED)
    return MM1Config(
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=image,
        prompt=prompt_section(source, text, "llava"),
    )


def _image(source: Source, fields: Fields, size: int) -> ImageConfig:
    # transformers' pairs are [height, width].
    pinpoints = fields.get("image_grid_pinpoints")
    grids = divide_pinpoints(pinpoints, size)
    # There it is the preprocessor that cuts the tiles, and the model that counts them.
    given = Fields(preprocessor(source), f"{source.name}: preprocessor")
    given.expect("aspect_ratio_setting", "anyres")
    if given.get("image_grid_pinpoints") not in (None, pinpoints):
        raise ConfigError(
            f"{given.where}.image_grid_pinpoints: {given.get('image_grid_pinpoints')!r:.80}"
            f" differ from config.json's {pinpoints!r:.80}; make them equal to those that "
            "the model was trained with"
        )
    section = image_section(source, size, ignored=TILES)
    # do_pad speaks of the tiles; the overview is squashed, whatever crop says.
    return replace(section, resize="squash", tiling=AnyresTiling(grids=tuple(grids)))
