"""LLaVA-1.5 and 1.6 (NeXT) in their own layout: ``liuhaotian/llava-v1.5-7b`` and its kin.

https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/model/llava_arch.py

Version 1.5 leaves the encoder where it is: name it by ``--vision``.
"""

from mm1_mlx.config import MM1Config

from ..rules import Table
from ..shared import language, llava
from ..shared.text import Template, prompt_section
from ..source import Source

KINDS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}
TEMPLATES: dict[str, Template] = {"llama": "vicuna_v1", "mistral": "mistral"}
# Fields of the forks that have a format of their own.
FORKS = ("matryoshka_vis_token_scale", "moe", "sampler_pooler_mode")

elsewhere = llava.elsewhere


def detect(source: Source) -> bool:
    """Whether the source is a LLaVA in its own layout, and none of its forks."""
    config = source.config
    own = config.get("model_type") in tuple(KINDS) and "mm_vision_tower" in config
    return own and not any(config.get(field) for field in FORKS)


def decoder_kind(source: Source) -> str:
    """The decoder's model type: LLaVA's own hides it."""
    classes = str(source.config.get("architectures"))
    mistral = "Mistral" in classes
    return "mistral" if mistral else KINDS[source.config["model_type"]]


def rules(source: Source) -> Table:
    """The tensor names of the whole model."""
    kind = {"model_type": decoder_kind(source)}
    return llava.table() | language.table(kind, "model.", "")


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    kind = decoder_kind(source)
    fields, rest = llava.split_config(source, kind)
    text = language.values(rest, "LlavaConfig")
    decoder = language.decoder_config(text)
    vision = llava.vision_section(fields)
    image = llava.image_section(fields, vision)
    newline = getattr(image.tiling, "merge", "flat") == "unpad"
    connector = llava.connector_section(fields, vision, decoder, newline=newline)
    fields.finish(llava.HARMLESS)
    return MM1Config(
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=image,
        prompt=prompt_section(source, text, TEMPLATES[kind]),
    )
