"""Decoders of Qwen2 and Qwen3: ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/qwen3/modeling_qwen3.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config
from mm1_mlx.errors import ConfigError

from ..rules import Table
from ..shared.decoder import build
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import llama_hf

# Qwen2Config's and Qwen3Config's; writers leave out what is equal to them.
COMMON = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {"qwen2": COMMON, "qwen3": COMMON | {"head_dim": 128}}


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    names = llama_hf.table(model, head)
    for leaf in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        names[f"{model}layers.{{}}.{leaf}"] = f"decoder.layers.{{}}.{leaf}"
    return names


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is a Qwen2 or Qwen3 decoder."""
    return source.config.get("model_type") in tuple(DEFAULTS)


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = source.config
    return MM1Config(
        decoder=decoder_config(values),
        prompt=prompt_section(source, with_defaults(values), "plain"),
    )


def with_defaults(values: Any) -> dict[str, Any]:
    """The fields with those that the writer left out."""
    return DEFAULTS[values["model_type"]] | dict(values)


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of a Qwen2Config or Qwen3Config.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    kind = values["model_type"]
    fields = Fields(values, "decoder config", DEFAULTS[kind])
    if kind == "qwen2":
        return build(
            fields, qkv_bias=True, o_bias=False, sliding_window=_window(fields)
        )
    bias = fields.boolean("attention_bias")
    return build(
        fields,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        sliding_window=_window(fields),
    )


def _window(fields: Fields) -> int | None:
    """The sliding window of all layers, None if none has one.

    Raises:
        ConfigError: some layers have one and others not.
    """
    use, size = fields.get("use_sliding_window"), fields.get("sliding_window")
    first, layers = fields.integer("max_window_layers"), fields.get("layer_types")
    if not use or size is None:
        return None
    if layers and not (
        isinstance(layers, list) and all(isinstance(kind, str) for kind in layers)
    ):
        raise ConfigError(f"{fields.where}.layer_types: {layers!r:.80} is not a list")
    count = fields.integer("num_hidden_layers")
    kinds = set(layers or ["full_attention"] * min(first, count))
    if not layers and first < count:
        kinds.add("sliding_attention")
    if len(kinds) > 1:
        raise ConfigError(
            f"{fields.where}: sliding windows in some layers only (max_window_layers "
            f"{first} of {count}) are not supported; all layers or none"
        )
    return size if kinds == {"sliding_attention"} else None
