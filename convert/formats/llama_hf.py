"""Decoders of the Llama family: ``LlamaForCausalLM`` (Vicuna too), ``MistralForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/llama/modeling_llama.py
"""

from collections.abc import Mapping
from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config

from ..rules import Table
from ..shared.decoder import build
from ..shared.fields import Fields
from ..shared.text import Template, prompt_section
from ..source import Source

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


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    names: Table = {
        f"{model}embed_tokens.weight": "decoder.embed_tokens.weight",
        f"{model}norm.weight": "decoder.norm.weight",
        f"{head}lm_head.weight": "decoder.lm_head.weight",
        # A buffer that old versions saved.
        f"{model}layers.{{}}.self_attn.rotary_emb.inv_freq": None,
    }
    for leaf in LEAVES:
        names[f"{model}layers.{{}}.{leaf}"] = f"decoder.layers.{{}}.{leaf}"
    return names


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is a Llama or Mistral decoder, without an encoder beside it."""
    return source.config.get("model_type") in tuple(DEFAULTS) and not source.subfolders


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
    # Llamas made of a Mistral may name one too, and have none.
    window = fields.get("sliding_window")
    attention_bias = fields.boolean("attention_bias")
    return build(
        fields,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias"),
        sliding_window=window if values["model_type"] == "mistral" else None,
    )
