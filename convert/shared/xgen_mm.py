"""The parts of xGen-MM 1 but the decoder, from its sparse config and what its code adds.

https://huggingface.co/Salesforce/xgen-mm-phi3-mini-base-r-v1/blob/main/configuration_xgenmm.py
https://github.com/salesforce/LAVIS/blob/d699f7e/open_flamingo/src/helpers.py
"""

from mm1_mlx.config import DecoderConfig, ImageConfig, PerceiverConfig, VisionConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD

from ..source import Source
from .fields import Fields

ENCODER = "vlm.vision_encoder."
# XGenMMVisionEncoderConfig's, XGenMMVisionTokenizerConfig's and the processor's.
VISION = {
    "model_name": "ViT-H-14-378-quickgelu",
    "force_image_size": 378,
    "image_aspect_ratio": "anyres",
    "anyres_patch_sampling": True,
}
PERCEIVER = {"vis_feature_dim": 1280, "lang_embedding_dim": 3072, "num_vis_tokens": 128}
# The Perceiver's, of which no config says anything.
DEPTH, HEADS, HEAD_DIM = 6, 16, 96
PICTURE = {
    "do_resize": True,
    "resize_mode": "squash",
    "interpolation_mode": "bicubic",
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
# Of open_clip's models by name, those that xGen-MM was published with.
ENCODERS = {
    "ViT-H-14-378-quickgelu": {
        "patch_size": 14,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "hidden_act": "quick_gelu",
    }
}


def vision_section(source: Source, whole: Fields) -> VisionConfig:
    """The encoder.

    Raises:
        ConfigError: it is another version's, or reads several tiles.
    """
    where = f"{whole.where}.vision_encoder_config"
    fields = Fields(whole.get("vision_encoder_config") or {}, where, VISION)
    fields.expect("model_type", "xgenmm_vision_encoder")
    if "siglip" in str(fields.get("model_name")) or source.holds(
        f"{ENCODER}embeddings"
    ):
        raise ConfigError(
            f"{where}: the SigLIP encoder of xGen-MM 1.5 does not run here; version 1 does"
        )
    if fields.get("image_aspect_ratio") == "anyres" or fields.get(
        "anyres_patch_sampling"
    ):
        raise ConfigError(
            f"{where}: 'anyres' gives the Perceiver stripes across tiles and masks their "
            "padding, which does not run here; the base model of version 1 has one tile"
        )
    fields.expect("model_name", *ENCODERS)
    size = fields.integer("force_image_size")
    fields.finish(("image_aspect_ratio",))
    return VisionConfig.from_dict(
        {"image_size": size, **ENCODERS[fields.require("model_name")]}
    )


def connector_section(
    whole: Fields, vision: VisionConfig, decoder: DecoderConfig
) -> PerceiverConfig:
    """The Perceiver between these two."""
    where = f"{whole.where}.vision_tokenizer_config"
    fields = Fields(whole.get("vision_tokenizer_config") or {}, where, PERCEIVER)
    fields.expect("model_type", "xgenmm_vision_tokenizer")
    fields.expect("vis_feature_dim", vision.hidden_size)
    fields.expect("lang_embedding_dim", decoder.hidden_size)
    section = PerceiverConfig(
        input_size=vision.hidden_size,
        num_features=vision.num_features,
        output_size=decoder.hidden_size,
        num_image_tokens=fields.integer("num_vis_tokens"),
        depth=DEPTH,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=4 * vision.hidden_size,
    )
    fields.finish(("image_aspect_ratio",))
    return section


def image_section(source: Source, size: int) -> ImageConfig:
    """How pictures are made: squashed."""
    given = source.json("preprocessor_config.json") or {}
    fields = Fields(given, f"{source.name}: preprocessor", PICTURE)
    for field in ("do_resize", "resize_mode", "interpolation_mode"):
        fields.expect(field, PICTURE[field])
    fields.expect("size", [size, size])
    section = ImageConfig.from_dict(
        {
            "size": size,
            "resize": "squash",
            "mean": fields.require("image_mean"),
            "std": fields.require("image_std"),
        }
    )
    fields.finish(("image_processor_type",))
    return section
