"""Decoders of the first Gemma: ``GemmaForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/gemma/modeling_gemma.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config

from ..rules import Table, add
from ..shared.decoder import build
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import llama_hf

# GemmaConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "gemma": {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
}


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``.

    A norm multiplies by 1 + its weight.
    """
    return {
        name: add(target, 1.0)
        if isinstance(target, str) and target.endswith("norm.weight")
        else target
        for name, target in llama_hf.table(model, head).items()
    }


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is a Gemma decoder of the first generation."""
    return source.config.get("model_type") == "gemma"


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = DEFAULTS["gemma"] | source.config
    return MM1Config(
        decoder=decoder_config(values), prompt=prompt_section(source, values, "plain")
    )


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of a GemmaConfig.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "decoder config", DEFAULTS["gemma"])
    bias = fields.boolean("attention_bias")
    return build(
        fields,
        hidden_act=_activation(fields),
        # transformers rounds it to the weights' precision, and so does the decoder.
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        qkv_bias=bias,
        o_bias=bias,
    )


def _activation(fields: Fields) -> str:
    """The activation; the first configs say gelu and mean its tanh approximation."""
    if fields.get("hidden_activation") is not None:
        return fields.activation("hidden_activation")
    name = fields.activation("hidden_act")
    return "gelu_tanh" if name == "gelu" else name
