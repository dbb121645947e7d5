"""The decoder config of Llama-like models, from what their configs have in common."""

from collections.abc import Collection
from typing import Any

from mm1_mlx.config import DecoderConfig, RopeScaling
from mm1_mlx.errors import ConfigError

from .fields import Fields


def build(
    fields: Fields,
    ignored: Collection[str] = (),
    rotary_factor: float = 1.0,
    **chosen: Any,
) -> DecoderConfig:
    """A decoder config from what all Llama-like configs share, and what one adds.

    Args:
        fields: the source's.
        ignored: those of its fields that inference does not depend on.
        rotary_factor: the share of a head that is rotated.
        chosen: fields of ours that the format reads in its own way.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    theta, scaling = rope(fields, rotary_factor)
    head_dim = fields.get("head_dim") or width // max(heads, 1)
    same = [
        key
        for key in (
            *("vocab_size", "intermediate_size", "num_hidden_layers"),
            *("rms_norm_eps", "max_position_embeddings"),
        )
        if key not in chosen
    ]
    section = DecoderConfig.from_dict(
        {
            **{key: fields.require(key) for key in same},
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": fields.get("num_key_value_heads") or heads,
            "head_dim": head_dim,
            "hidden_act": fields.activation("hidden_act"),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rotary_dim": _rotary_dim(fields, head_dim, rotary_factor),
            "tie_word_embeddings": fields.boolean("tie_word_embeddings"),
            **chosen,
        }
    )
    # Llama-1's word for the context.
    fields.finish(("max_sequence_length", *ignored))
    return section


def _rotary_dim(fields: Fields, head_dim: Any, factor: Any) -> int | None:
    """How many of a head's dimensions are rotated, None for all."""
    if factor == 1:
        return None
    if type(factor) is not float or not 0 < factor < 1 or type(head_dim) is not int:
        raise ConfigError(
            f"{fields.where}.partial_rotary_factor: {factor!r} of head_dim {head_dim!r} "
            "is not a share of a head"
        )
    return int(head_dim * factor)


def rope(fields: Fields, factor: float) -> tuple[float, RopeScaling | None]:
    """The rotation's base and scaling, as transformers 4 or 5 spell them.

    Raises:
        ConfigError: the kind of scaling is not one of ours, or another share of a head
            than ``factor`` is rotated.
    """
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    scaling = Fields(new or old or {}, f"{fields.where}.rope")
    fields.expect("partial_rotary_factor", factor)
    scaling.expect("partial_rotary_factor", factor)
    # The outer one may be a default that stands beside the inner one.
    inner, outer = (f.get("rope_theta") for f in (scaling, fields))
    theta = inner or outer or 10_000.0
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
