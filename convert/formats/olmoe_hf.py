"""Decoders of OLMoE, many small experts in every layer: ``OlmoeForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/olmoe/modeling_olmoe.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config, MoEConfig

from ..rules import Table
from ..shared import experts
from ..shared.decoder import build
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import qwen_hf

# OlmoeConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "olmoe": {
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "pad_token_id": 1,
        "eos_token_id": 50_279,
    }
}
# Of training alone.
IGNORED = ("router_aux_loss_coef", "output_router_logits")


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    names = qwen_hf.table(model, head)
    block = f"{model}layers.{{}}.mlp."
    return names | experts.table(block, "gate_proj", "up_proj", "down_proj")


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is an OLMoE decoder."""
    return source.config.get("model_type") == "olmoe"


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = DEFAULTS["olmoe"] | source.config
    return MM1Config(
        decoder=decoder_config(values), prompt=prompt_section(source, values, "plain")
    )


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of an OlmoeConfig.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "decoder config", DEFAULTS["olmoe"])
    fields.expect("clip_qkv")
    bias = fields.boolean("attention_bias")
    return build(
        fields,
        ignored=IGNORED,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="full",
        moe=MoEConfig.from_dict(
            {
                "num_experts": fields.require("num_experts"),
                "experts_per_token": fields.require("num_experts_per_tok"),
                "every": 1,
                "offset": 0,
                "norm_topk_prob": fields.boolean("norm_topk_prob"),
            }
        ),
    )
