"""Decoders of StableLM 2 (1.6B) and StableLM-3B-4E1T: ``StableLmForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/stablelm/modeling_stablelm.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config

from ..rules import Table
from ..shared.decoder import build
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import llama_hf

# StableLmConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "stablelm": {
        "vocab_size": 50_304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
}
ROTARY_FACTOR = 0.25
NORMS = ("input_layernorm", "post_attention_layernorm")


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    names = llama_hf.table(model, head)
    names[f"{model}norm.bias"] = "decoder.norm.bias"
    for norm in NORMS:
        names[f"{model}layers.{{}}.{norm}.bias"] = f"decoder.layers.{{}}.{norm}.bias"
    return names


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is a StableLM decoder."""
    return source.config.get("model_type") == "stablelm"


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = DEFAULTS["stablelm"] | source.config
    return MM1Config(
        decoder=decoder_config(values), prompt=prompt_section(source, values, "plain")
    )


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of a StableLmConfig.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "decoder config", DEFAULTS["stablelm"])
    # StableLM-2-12B's: norms of each head's own, and both branches side by side.
    fields.expect("qk_layernorm", False)
    fields.expect("use_parallel_residual", False)
    return build(
        fields,
        ignored=("hidden_dropout",),
        rotary_factor=_rotary_factor(fields),
        norm="layer",
        rms_norm_eps=fields.require("layer_norm_eps"),
        qkv_bias=fields.boolean("use_qkv_bias"),
    )


def _rotary_factor(fields: Fields) -> float:
    """The share of a head that is rotated, as transformers 4 or 5 spell it."""
    rope = Fields(fields.get("rope_parameters") or {}, f"{fields.where}.rope")
    inner, outer = (f.get("partial_rotary_factor") for f in (rope, fields))
    return inner or outer or ROTARY_FACTOR
