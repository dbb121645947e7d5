"""Decoders of OpenELM, whose blocks grow with depth: ``OpenELMForCausalLM``.

https://huggingface.co/apple/OpenELM-3B/blob/main/modeling_openelm.py, and for the sizes
configuration_openelm.py beside it. Weights and config say the same as CoreNet's
https://github.com/apple/corenet/blob/1aa3acd/corenet/modeling/models/language_modeling/general_gpt.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config

from ..rules import Table, divide, split
from ..shared.fields import Fields
from ..shared.layerwise import layer_sizes
from ..shared.text import prompt_section
from ..source import Source

# OpenELMConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "openelm": {
        "vocab_size": 32_000,
        "max_context_length": 2048,
        "num_transformer_layers": 12,
        "model_dim": 2048,
        "head_dim": 128,
        "ffn_with_glu": True,
        "ffn_dim_divisor": 256,
        "activation_fn_name": "swish",
        "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": False,
        "share_input_output_layers": False,
        "rope_freq_constant": 10_000,
        "eos_token_id": 2,
    }
}
RMS_NORM_EPS = 1e-6  # the modelling code's, which no config names
# What the lists of heads were computed from, and how far positions are precomputed.
IGNORED = (
    "qkv_multipliers",
    "num_gqa_groups",
    "rope_max_length",
    "tie_word_embeddings",
)


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    block, target = f"{model}layers.{{}}.", "decoder.layers.{}."
    attention, mlp = f"{target}self_attn.", f"{target}mlp."
    return {
        f"{model}token_embeddings.weight": "decoder.embed_tokens.weight",
        f"{model}norm.weight": "decoder.norm.weight",
        f"{head}lm_head.weight": "decoder.lm_head.weight",
        f"{block}attn.qkv_proj.weight": divide(
            *(f"{attention}{name}_proj.weight" for name in "qkv")
        ),
        f"{block}attn.q_norm.weight": f"{attention}q_norm.weight",
        f"{block}attn.k_norm.weight": f"{attention}k_norm.weight",
        f"{block}attn.out_proj.weight": f"{attention}o_proj.weight",
        f"{block}ffn.proj_1.weight": split(
            f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"
        ),
        f"{block}ffn.proj_2.weight": f"{mlp}down_proj.weight",
        f"{block}attn_norm.weight": f"{target}input_layernorm.weight",
        f"{block}ffn_norm.weight": f"{target}post_attention_layernorm.weight",
    }


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("transformer.", "")


def detect(source: Source) -> bool:
    """Whether the source is an OpenELM decoder."""
    return source.config.get("model_type") == "openelm"


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = DEFAULTS["openelm"] | source.config
    return MM1Config(
        decoder=decoder_config(values), prompt=prompt_section(source, values, "plain")
    )


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of an OpenELMConfig.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "decoder config", DEFAULTS["openelm"])
    fields.expect("ffn_with_glu", True)
    fields.expect("normalization_layer_name", "rms_norm")
    sizes = layer_sizes(fields)
    section = DecoderConfig.from_dict(
        {
            # Of the widest block; every block has its own.
            **{key: max(layer[key] for layer in sizes) for key in sizes[0]},
            "layer_sizes": sizes,
            "vocab_size": fields.require("vocab_size"),
            "hidden_size": fields.require("model_dim"),
            "num_hidden_layers": len(sizes),
            "head_dim": fields.require("head_dim"),
            "rms_norm_eps": RMS_NORM_EPS,
            "rope_theta": fields.require("rope_freq_constant"),
            "max_position_embeddings": fields.require("max_context_length"),
            "tie_word_embeddings": fields.boolean("share_input_output_layers"),
            "hidden_act": fields.activation("activation_fn_name"),
            "qk_norm": "head" if fields.get("normalize_qk_projections") else None,
        }
    )
    fields.finish(IGNORED)
    return section
