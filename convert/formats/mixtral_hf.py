"""Decoders of Mixtral, whose every layer has experts: ``MixtralForCausalLM``.

https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/models/mixtral/modeling_mixtral.py
"""

from typing import Any

from mm1_mlx.config import DecoderConfig, MM1Config, MoEConfig

from ..rules import Table
from ..shared import experts
from ..shared.decoder import build
from ..shared.fields import Fields
from ..shared.text import prompt_section
from ..source import Source
from . import llama_hf

# MixtralConfig's; writers leave out what is equal to them.
DEFAULTS = {
    "mixtral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "eos_token_id": 2,
    }
}
# Of training alone.
IGNORED = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits")


def table(model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    names = llama_hf.table(model, head)
    # transformers 5 calls them mlp in memory.
    for part in ("block_sparse_moe", "mlp"):
        names |= experts.table(f"{model}layers.{{}}.{part}.", "w1", "w3", "w2")
    return names


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return table("model.", "")


def detect(source: Source) -> bool:
    """Whether the source is a Mixtral decoder."""
    return source.config.get("model_type") == "mixtral"


def config(source: Source) -> MM1Config:
    """The decoder alone."""
    values = DEFAULTS["mixtral"] | source.config
    return MM1Config(
        decoder=decoder_config(values), prompt=prompt_section(source, values, "plain")
    )


def decoder_config(values: Any) -> DecoderConfig:
    """The decoder of a MixtralConfig.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "decoder config", DEFAULTS["mixtral"])
    return build(
        fields,
        ignored=IGNORED,
        sliding_window=fields.get("sliding_window"),
        moe=MoEConfig.from_dict(
            {
                "num_experts": fields.require("num_local_experts"),
                "experts_per_token": fields.require("num_experts_per_tok"),
                "every": 1,
                "offset": 0,
                "norm_topk_prob": True,
            }
        ),
    )
