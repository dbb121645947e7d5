"""What checkpoints in LLaVA's own layout share: one flat config, ``model.mm_projector``.

https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/model/llava_arch.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, LinearConfig, MLPConfig, VisionConfig
from mm1_mlx.errors import ConfigError

from ..formats import clip_hf
from ..rules import Table
from ..source import Source
from .fields import Fields
from .llava_picture import image_section as image_section

# The encoders that LLaVA was trained with, which it leaves where they are.
_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
TOWERS = {
    "clip-vit-large-patch14": _VIT_L | {"image_size": 224},
    "clip-vit-large-patch14-336": _VIT_L | {"image_size": 336},
}
TOWER = "model.vision_tower.vision_tower.vision_model."
# LLaVA's own fields begin with one of these; the others are the decoder's.
OWN = (
    *(
        "matryoshka_",
        "mm_",
        "image_",
        "tune_",
        "freeze_",
        "unfreeze_",
        "use_mm_",
        "tokenizer_",
    ),
    *("vision_tower", "data_replicate", "version", "max_length"),
)
# What acts in training, or is said elsewhere.
HARMLESS = (
    *("mm_projector_lr", "mm_vision_tower_lr", "mm_use_im_patch_token", "use_mm_proj"),
    *("mm_hidden_size", "image_crop_resolution", "image_split_resolution"),
    *("tune_mm_mlp_adapter", "tune_mm_vision_resampler", "freeze_mm_mlp_adapter"),
    *("freeze_mm_vision_resampler", "unfreeze_mm_vision_tower", "data_replicate_num"),
    *("tokenizer_model_max_length", "tokenizer_padding_side", "max_length"),
    # Read by M3's own format.
    *("matryoshka_vis_token_scale", "matryoshka_vis_token_sample"),
)


def split_config(source: Source, kind: str) -> tuple[Fields, dict[str, Any]]:
    """LLaVA's own fields, and those of the decoder, which is a ``kind``."""
    own = {k: v for k, v in source.config.items() if k.startswith(OWN)}
    rest = {k: v for k, v in source.config.items() if k not in own}
    fields = Fields(own, "LlavaConfig", {"mm_patch_merge_type": "flat"})
    fields.expect("mm_use_im_start_end", False)
    fields.expect("mm_resampler_type")
    return fields, rest | {"model_type": kind}


def table(projector: str = "model.mm_projector.") -> Table:
    """The rules of all but the decoder; the projector's names start as given."""
    names: Table = clip_hf.table(TOWER)
    names["model.image_newline"] = "connector.newline"
    for leaf in ("weight", "bias"):
        names[f"{projector}{leaf}"] = f"connector.linear.{leaf}"
        names[f"{projector}0.{leaf}"] = f"connector.linear_1.{leaf}"
        names[f"{projector}2.{leaf}"] = f"connector.linear_2.{leaf}"
    return names


def tower(fields: Fields) -> str:
    """The repository of the encoder that the model was trained with."""
    return str(fields.get("mm_vision_tower") or fields.require("vision_tower"))


def elsewhere(source: Source) -> dict[str, str]:
    """Where the encoder is, if the source does not hold it."""
    if source.holds(TOWER):
        return {}
    return {"vision": tower(Fields(source.config, "LlavaConfig"))}


def vision_section(fields: Fields) -> VisionConfig:
    """The encoder, with the features that the connector reads.

    Raises:
        ConfigError: it is none that LLaVA was published with.
    """
    name = tower(fields).rpartition("/")[2]
    if name not in TOWERS:
        raise ConfigError(
            f"LlavaConfig.mm_vision_tower: {name!r} is not supported; supported: "
            f"{sorted(TOWERS)}"
        )
    fields.expect("mm_vision_select_feature", "patch", "cls_patch")
    return clip_hf.vision_config(
        TOWERS[name],
        feature_layer=fields.integer("mm_vision_select_layer"),
        apply_post_norm=False,
        drop_cls=fields.get("mm_vision_select_feature") != "cls_patch",
    )


def connector_section(
    fields: Fields, vision: VisionConfig, decoder: DecoderConfig, **chosen: Any
) -> LinearConfig | MLPConfig:
    """The projector, with what the caller chose of it."""
    fields.expect("mm_projector_type", "linear", "mlp2x_gelu")
    sizes: dict[str, Any] = {
        "input_size": vision.hidden_size,
        "num_features": vision.num_features,
        "output_size": decoder.hidden_size,
        **chosen,
    }
    if fields.get("mm_projector_type") == "mlp2x_gelu":
        return MLPConfig(**sizes, hidden_size=decoder.hidden_size)
    return LinearConfig(**sizes)
