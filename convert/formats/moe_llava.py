"""MoE-LLaVA on StableLM (arXiv 2401.15947): LLaVA's own layout around sparse layers.

https://github.com/PKU-YuanGroup/MoE-LLaVA/blob/6cb5f66/moellava/model/language_model/llava_stablelm_moe.py
https://github.com/microsoft/DeepSpeed/blob/master/deepspeed/moe/sharded_moe.py

DeepSpeed's top-2 gate adds noise before it takes the second expert and drops what is over
an expert's capacity, so its answers differ from run to run. Here is what they scatter
around: the second best expert by the gate alone, and no capacity.

The released checkpoints' tokenizer is code of Stability's, which is not run; a later
stabilityai/stablelm-2-1_6b has the same one as tokenizer.json, to be laid beside them.
"""

from dataclasses import replace
from typing import Any

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError

from ..rules import Table, stack
from ..shared import llava
from ..shared.experts import EXPERTS, MLP
from ..shared.fields import Fields
from ..shared.sparse import sparse_layers
from ..shared.text import prompt_section
from ..source import Source
from . import clip_hf, stablelm_hf

WHERE = "MoELLaVAStablelmConfig"
KIND = "moe_llava_stablelm"
TOWER = "model.image_tower.image_tower.vision_model."
PROJECTOR = "model.mm_projector.image_spatial_proj."
# By MoE-LLaVA's name, LLaVA's and StableLmConfig's.
RENAMED = {
    "mm_image_tower": "mm_vision_tower",
    "image_projector_type": "mm_projector_type",
}
DECODER = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
# StableLMEpochConfig's, where they differ from StableLmConfig's.
DEFAULTS = {"use_qkv_bias": True, "eos_token_id": 2}
# Of video, which a mm_video_tower would have.
VIDEO = (
    "video_projector_type",
    "video_global_proj",
    "video_temproal_proj",
    "video_spatial_proj",
)


def detect(source: Source) -> bool:
    """Whether the source is a MoE-LLaVA, of whatever decoder."""
    return str(source.config.get("model_type")).startswith("moe_llava_")


def elsewhere(source: Source) -> dict[str, str]:
    """Where the encoder is, if the source does not hold it."""
    if source.holds(TOWER):
        return {}
    return {"vision": str(source.config.get("mm_image_tower"))}


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the whole model."""
    block = "model.layers.{}.mlp.deepspeed_moe."
    names = llava.table(PROJECTOR) | clip_hf.table(TOWER)
    names |= stablelm_hf.table("model.", "")
    names[f"{block}gate.wg.weight"] = f"{MLP}gate.weight"
    for name in ("gate_proj", "up_proj", "down_proj"):
        expert = f"{block}experts.deepspeed_experts.{{}}.{name}.weight"
        names[expert] = stack(f"{EXPERTS}{name}.weight")
    return names


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    values = dict(source.config)
    _check_kind(values)
    moe = Fields(values.pop("moe", None) or {}, f"{WHERE}.moe")
    own = {
        k: values.pop(k) for k in list(values) if k.startswith((*llava.OWN, "video_"))
    }
    fields = Fields(
        {RENAMED.get(k, k): v for k, v in own.items()},
        WHERE,
        {"mm_patch_merge_type": "flat", "mm_vision_select_feature": "patch"},
    )
    for switch in ("mm_use_im_start_end", "mm_video_tower"):
        fields.expect(switch, False)
    text = _text(values)
    decoder = stablelm_hf.decoder_config(text)
    decoder = replace(decoder, moe=sparse_layers(moe, decoder.num_hidden_layers))
    vision = llava.vision_section(fields)
    image = llava.image_section(fields, vision)
    connector = llava.connector_section(fields, vision, decoder)
    fields.finish((*llava.HARMLESS, *VIDEO))
    return MM1Config(
        vision=vision,
        connector=connector,
        decoder=decoder,
        image=image,
        prompt=prompt_section(source, text, "stablelm"),
    )


def _check_kind(values: dict[str, Any]) -> None:
    kind, tower = values["model_type"], str(values.get("mm_image_tower"))
    if kind != KIND:
        raise ConfigError(
            f"model_type: the decoder of {kind!r} is none that runs here; of MoE-LLaVA "
            f"{KIND!r} does"
        )
    if "siglip" in tower:
        raise ConfigError(
            f"{WHERE}.mm_image_tower: {tower!r} is a SigLIP encoder, which does not run "
            "here; take the checkpoint without -384 in its name"
        )


def _text(values: dict[str, Any]) -> dict[str, Any]:
    """The decoder's fields by the names that StableLmConfig gave them later."""
    fields = Fields(values, WHERE)
    fields.expect("rotary_scaling_factor", 1.0)
    fields.expect("num_heads", values.get("num_attention_heads"))
    for old, new in DECODER.items():
        if old in values and values.get(new, values[old]) != values[old]:
            raise ConfigError(
                f"{WHERE}: {old} {values[old]!r} and {new} {values[new]!r} are two names "
                "of one field; delete the one that is not the model's"
            )
    own = ("rotary_scaling_factor", "num_heads")
    renamed = {DECODER.get(k, k): v for k, v in values.items() if k not in own}
    common = stablelm_hf.DEFAULTS["stablelm"]
    return common | DEFAULTS | renamed | {"model_type": "stablelm"}
