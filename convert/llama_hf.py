"""Decoders of the Llama family: ``LlamaForCausalLM`` (Vicuna too), ``MistralForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/llama/modeling_llama.py
"""

from collections.abc import Mapping
from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config, RopeScaling
from mm1_mlx.errors import ConfigError

from .fields import Fields
from .rules import Table
from .source import Source
from .text import Template, prompt_section

# LlamaConfig's and MistralConfig's; writers leave out what is equal to them.
COMMON = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}
DEFAULTS = {
    "llama": COMMON,
    "mistral": COMMON
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
}
PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
LEAVES = (
    *(f"{name}.weight" for name in PROJECTIONS),
    *(f"{name}.bias" for name in PROJECTIONS),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


def rules(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    table: Table = {
        f"{model}embed_tokens.weight": "decoder.embed_tokens.weight",
        f"{model}norm.weight": "decoder.norm.weight",
        f"{head}lm_head.weight": "decoder.lm_head.weight",
        # A buffer that old versions saved.
        f"{model}layers.{{}}.self_attn.rotary_emb.inv_freq": None,
    }
    for leaf in LEAVES:
        table[f"{model}layers.{{}}.{leaf}"] = f"decoder.layers.{{}}.{leaf}"
    return table


RULES = rules("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is a Llama or Mistral decoder."""
    return source.config.get("model_type") in tuple(DEFAULTS)


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = source.config
    names = f"{source.name} {values.get('_name_or_path')}".lower()
    template: Template = "vicuna_v1" if "vicuna" in names else "plain"
    decoder = decoder_config(values)
    return MM1Config(
        decoder=decoder,
        prompt=prompt_section(source, with_defaults(values), template),
    )


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with those that the writer left out."""
    return DEFAULTS[values["model_type"]] | dict(values)


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of a LlamaConfig or MistralConfig.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "decoder config", DEFAULTS[values["model_type"]])
    attention_bias = bool(fields.get("attention_bias"))
    return build(
        fields,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(fields.get("mlp_bias")),
        sliding_window=fields.get("sliding_window"),
    )


def build(fields: Fields, **chosen: Any) -> DecoderConfig:
    """A decoder config from what all Llama-like configs share, and what one adds."""
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    theta, scaling = rope(fields)
    same = ("vocab_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    section = DecoderConfig.from_dict(
        {
            **{key: fields.require(key) for key in (*same, "max_position_embeddings")},
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_key_value_heads": fields.get("num_key_value_heads") or heads,
            "head_dim": fields.get("head_dim") or width // heads,
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
    """The rotation's base and scaling, as transformers 4 or 5 spell them."""
    values = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    scaling = Fields(values, f"{fields.where}.rope")
    fields.expect("partial_rotary_factor", 1.0)
    scaling.expect("partial_rotary_factor", 1.0)
    theta = scaling.get("rope_theta") or fields.get("rope_theta") or 10_000.0
    old, new = scaling.get("type"), scaling.get("rope_type")
    kind = new or old or "default"
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
