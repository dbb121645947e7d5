"""What Ferret's checkpoints have beside LLaVA's: a region sampler and squashed pictures.

https://github.com/apple/ml-ferret/blob/3c9e5c9/ferret/model/ferret_arch.py
"""

from dataclasses import replace
from typing import Any

from mm1_mlx.config import (
    AnyresTiling,
    ImageConfig,
    MM1Config,
    PromptConfig,
    Template,
    VisionConfig,
)
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from ..rules import Table
from ..source import Source
from . import language, llava, sampler
from .fields import Fields
from .text import prompt_section
from .token_ids import added_tokens

# Ferret's own fields; without the sampler a linear layer averages a region's features.
OWN = (
    *("region_geo_sampler", "sampler_pooler_mode", "im_region_fea_token"),
    "region_fea_adapter",
)
# Some configs name the folder in which its authors kept the encoder.
TOWER = "openai/clip-vit-large-patch14-336"
KEPT = "openai-clip-vit-large-patch14-336"
# What ends a turn, beside the decoder's own end.
TURN_ENDS = {"ferret_gemma": "<end_of_turn>", "ferret_llama3": "<|eot_id|>"}


def split_config(source: Source, kind: str) -> tuple[Fields, dict[str, Any]]:
    """LLaVA's and Ferret's own fields, and those of the decoder, which is a ``kind``."""
    fields, rest = llava.split_config(source, kind)
    fields.values |= {key: rest.pop(key) for key in OWN if key in rest}
    if llava.tower(fields).endswith(KEPT):
        fields.values["mm_vision_tower"] = TOWER
    return fields, rest


def elsewhere(source: Source) -> dict[str, str]:
    """Where the encoder is, if not among the source's tensors: beside them, or its own."""
    if source.holds(llava.TOWER):
        return {}
    shipped = source.folder / "vision_tower"
    if (shipped / "config.json").is_file():
        return {"vision": str(shipped)}
    return {"vision": llava.tower(split_config(source, "llama")[0])}


def rules(kind: str) -> Table:
    """The tensor names of the whole model, whose decoder is a ``kind``."""
    decoder = language.table({"model_type": kind}, "model.", "")
    return llava.table() | decoder | sampler.table()


def _image_section(fields: Fields, vision: VisionConfig) -> ImageConfig:
    """How pictures are made: squashed to one tile, or to an overview and a grid of them."""
    fields.expect("image_aspect_ratio", "square_nocrop", "anyres")
    if fields.get("image_aspect_ratio") == "anyres":
        fields.expect("mm_patch_merge_type", "spatial")
        section = llava.image_section(fields, vision)
        assert isinstance(section.tiling, AnyresTiling)
        return replace(section, tiling=replace(section.tiling, fill="squash"))
    for unused in ("image_grid_pinpoints", "mm_patch_merge_type"):
        fields.get(unused)
    size = vision.image_size
    return ImageConfig(size=size, resize="squash", mean=CLIP_MEAN, std=CLIP_STD)


def model(
    source: Source, fields: Fields, decoder: dict[str, Any], template: Template
) -> MM1Config:
    """The whole model.

    Args:
        source: where it is.
        fields: LLaVA's and Ferret's own.
        decoder: those of the language model.
        template: how its prompts are made.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    language_model = language.decoder_config(decoder)
    vision = llava.vision_section(fields)
    connector = llava.connector_section(fields, vision, language_model)
    image = _image_section(fields, vision)
    region = sampler.region_section(fields, vision, language_model)
    fields.finish(llava.HARMLESS)
    return MM1Config(
        vision=vision,
        connector=connector,
        region=region,
        decoder=language_model,
        image=image,
        prompt=_prompt(source, decoder, template),
    )


def _prompt(source: Source, decoder: Any, template: Template) -> PromptConfig:
    """How messages become tokens: never by the decoder's template, which may be there."""
    section = prompt_section(source, decoder, template)
    ends = added_tokens(source, TURN_ENDS.get(template), decoder["vocab_size"])
    eos = dict.fromkeys([*section.eos_token_ids, *ends])
    return replace(
        section, template=template, content="string", eos_token_ids=tuple(eos)
    )
