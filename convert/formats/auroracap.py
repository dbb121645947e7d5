"""AuroraCap (arXiv 2410.03051) as xtuner stores it: ``wchai/AuroraCap-7B-IMG-xtuner``.

https://github.com/rese1f/aurora/blob/2bf68d5/inference.py

A Vicuna lies in the folder itself, a CLIP encoder and a projector in subfolders. Here every
feature becomes an image token: AuroraCap's token_kept_ratio of 1.0. Its token merging,
which averages similar features in every block of the encoder, is not computed.
"""

from mm1_mlx.config import (
    DecoderConfig,
    ImageConfig,
    MLPConfig,
    MM1Config,
    VisionConfig,
)
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from ..place import SUBFOLDERS
from ..rules import Table
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import clip_hf, llama_hf

ENCODER, PROJECTOR = SUBFOLDERS
# ProjectorConfig's; writers leave out what is equal to them.
DEFAULTS = {"depth": 2, "hidden_act": "gelu", "bias": True}


def detect(source: Source) -> bool:
    """Whether an encoder and a projector lie in folders beside a Llama."""
    return source.config.get("model_type") == "llama" and bool(source.subfolders)


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the whole model."""
    names = llama_hf.table("model.", "")
    for prefix in ("vision_model.", ""):
        names |= clip_hf.table(f"{ENCODER}/{prefix}")
    for leaf in ("weight", "bias"):
        names[f"{PROJECTOR}/model.0.{leaf}"] = f"connector.linear_1.{leaf}"
        names[f"{PROJECTOR}/model.2.{leaf}"] = f"connector.linear_2.{leaf}"
    return names


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    text = llama_hf.with_defaults(source.config)
    decoder = llama_hf.decoder_config(text)
    vision = clip_hf.vision_config(
        source.json(f"{ENCODER}/config.json"),
        feature_layer=-2,
        apply_post_norm=False,
        drop_cls=True,
    )
    return MM1Config(
        vision=vision,
        connector=_connector(source, vision, decoder),
        decoder=decoder,
        # CLIPImageProcessor at the encoder's size, whatever preprocessor_config.json says.
        image=ImageConfig(
            size=vision.image_size, resize="crop", mean=CLIP_MEAN, std=CLIP_STD
        ),
        prompt=prompt_section(source, text, "auroracap"),
    )


def _connector(
    source: Source, vision: VisionConfig, decoder: DecoderConfig
) -> MLPConfig:
    given = source.json(f"{PROJECTOR}/config.json")
    fields = Fields(given, "ProjectorConfig", DEFAULTS)
    fields.expect("model_type", "projector")
    fields.expect("depth", 2)
    fields.expect("visual_hidden_size", vision.hidden_size)
    fields.expect("llm_hidden_size", decoder.hidden_size)
    section = MLPConfig.from_dict(
        {
            "input_size": vision.hidden_size,
            "num_features": vision.num_features,
            "hidden_size": decoder.hidden_size,
            "output_size": decoder.hidden_size,
            "hidden_act": fields.activation("hidden_act"),
            "bias": fields.require("bias"),
        }
    )
    fields.finish()
    return section
