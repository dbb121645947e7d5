"""A whole CLIPConfig: its text tower, and the space that it shares with the encoder.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/clip/modeling_clip.py
"""

from typing import Any

from mm1_mlx.config import TextConfig

from ..rules import Table
from .fields import Fields

# CLIPTextConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "eos_token_id": 49_407,
}
# What configs said before https://github.com/huggingface/transformers/pull/24773, of no
# token that texts end with: transformers then reads the place of the highest id.
LEGACY_EOS = 2
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "pad_token_id"),
)
# CLIPConfig's and CLIPVisionConfig's.
PROJECTION_SIZE = 512
# Read one by one, or of use to an untrained model only.
IGNORED = (
    *("text_config", "text_config_dict", "vision_config", "vision_config_dict"),
    "logit_scale_init_value",
)
LEAVES = [
    f"{name}.{kind}"
    for name in (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("self_attn.out_proj", "layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"),
    )
    for kind in ("weight", "bias")
]


def table(prefix: str) -> Table:
    """The text tower's rules, for names that start with ``prefix``."""
    embeddings = f"{prefix}embeddings."
    names: Table = {
        f"{embeddings}token_embedding.weight": "text.token_embedding.weight",
        f"{embeddings}position_embedding.weight": "text.position_embedding",
        f"{embeddings}position_ids": None,
        f"{prefix}final_layer_norm.weight": "text.final_layer_norm.weight",
        f"{prefix}final_layer_norm.bias": "text.final_layer_norm.bias",
    }
    for leaf in LEAVES:
        names[f"{prefix}encoder.layers.{{}}.{leaf}"] = f"text.layers.{{}}.{leaf}"
    return names


def towers(values: Any) -> tuple[dict[str, Any], TextConfig, int]:
    """A CLIPConfig's vision section, its text tower, and the width of their space.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    size = projection_size(values)
    Fields(values, "CLIPConfig").finish(IGNORED)
    text = text_config(_half(values, "text_config"), size)
    return _half(values, "vision_config"), text, size


def projection_size(values: Any) -> int:
    """The width of the shared space, which writers may leave out."""
    default = {"projection_dim": PROJECTION_SIZE}
    return Fields(values, "CLIPConfig", default).integer("projection_dim")


def _half(values: Any, key: str) -> dict[str, Any]:
    """A tower's section, which old configs have under a second name that wins."""
    sections = (values.get(key), values.get(f"{key}_dict"))
    new, old = (Fields(x or {}, f"CLIPConfig.{key}").values for x in sections)
    return {**new, **old}


def text_config(values: Any, projection_size: int) -> TextConfig:
    """The text tower of a CLIPTextConfig.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "CLIPTextConfig", DEFAULTS)
    fields.expect("model_type", "clip_text_model", "clip")
    eos = fields.integer("eos_token_id")
    section = TextConfig.from_dict(
        {
            **{name: fields.integer(name) for name in SIZES},
            "hidden_act": fields.activation("hidden_act"),
            "layer_norm_eps": fields.require("layer_norm_eps"),
            "projection_size": projection_size,
            "eos_token_id": None if eos == LEGACY_EOS else eos,
        }
    )
    fields.finish(("tie_word_embeddings",))
    return section
