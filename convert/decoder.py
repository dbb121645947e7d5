"""The decoder config of Llama-like models, from what their configs have in common."""

from typing import Any

from mm1_mlx.config import DecoderConfig, RopeScaling
from mm1_mlx.errors import ConfigError

from .fields import Fields


def build(fields: Fields, **chosen: Any) -> DecoderConfig:
    """A decoder config from what all Llama-like configs share, and what one adds.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    theta, scaling = rope(fields)
    same = ("vocab_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    section = DecoderConfig.from_dict(
        {
            **{key: fields.require(key) for key in (*same, "max_position_embeddings")},
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": fields.get("num_key_value_heads") or heads,
            "head_dim": fields.get("head_dim") or width // max(heads, 1),
            "hidden_act": fields.activation("hidden_act"),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": bool(fields.get("tie_word_embeddings")),
            **chosen,
        }
    )
    fields.finish(("max_sequence_length",))  # Llama-1's word for the context
    return section


def rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """The rotation's base and scaling, as transformers 4 or 5 spell them.

    Raises:
        ConfigError: the kind of scaling is not one of ours.
    """
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    scaling = Fields(new or old or {}, f"{fields.where}.rope")
    fields.expect("partial_rotary_factor", 1.0)
    scaling.expect("partial_rotary_factor", 1.0)
    theta = scaling.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    old_kind = scaling.get("type")
    kind = scaling.get("rope_type") or old_kind or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"{scaling.where}: type {kind!r} is not supported; supported: 'default', "
            "'linear' and 'llama3'"
        )
    if kind == "default":
        scaling.finish()
        return theta, None
    keys = ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor"]
        keys += ["original_max_position_embeddings"]
    section = {"rope_type": kind} | {key: scaling.require(key) for key in keys}
    scaling.finish()
    return theta, RopeScaling.from_dict(section)
