"""Decoders of Phi-3-mini (4k): ``Phi3ForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/phi3/modeling_phi3.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config

from ..rules import Table, divide, split
from ..shared.decoder import build
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import llama_hf

# Phi3Config's; writers leave out what is equal to them.
DEFAULTS = {
    "phi3": {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 32_000,
        "eos_token_id": 32_000,
    }
}
# Dropouts, and the context from which positions are scaled, which is refused.
IGNORED = ("resid_pdrop", "embd_pdrop", "original_max_position_embeddings")


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    names = llama_hf.table(model, head)
    block, target = f"{model}layers.{{}}.", "decoder.layers.{}."
    return names | {
        f"{block}self_attn.qkv_proj.weight": divide(
            *(f"{target}self_attn.{name}_proj.weight" for name in "qkv")
        ),
        f"{block}mlp.gate_up_proj.weight": split(
            f"{target}mlp.gate_proj.weight", f"{target}mlp.up_proj.weight"
        ),
    }


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is a Phi-3 decoder."""
    return source.config.get("model_type") == "phi3"


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = DEFAULTS["phi3"] | source.config
    return MM1Config(
        decoder=decoder_config(values), prompt=prompt_section(source, values, "plain")
    )


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of a Phi3Config.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "decoder config", DEFAULTS["phi3"])
    return build(fields, ignored=IGNORED, sliding_window=fields.get("sliding_window"))
