"""The decoder that the config of an axlearn model describes, one field per line of it.

https://github.com/apple/axlearn/blob/34aed43/axlearn/experiments/text/gpt/honeycrisp.py
"""

import math
import re
from typing import Any

from mm1_mlx.config import DecoderConfig
from mm1_mlx.errors import ConfigError

from .fields import Fields

DECODER = "model.decoder."
LAYER = f"{DECODER}transformer.layer."
ATTENTION = f"{LAYER}self_attention.attention."
QKV, MLP = f"{ATTENTION}input_linear.", f"{LAYER}feed_forward."
NORMS = (
    *(f"{DECODER}output_norm", f"{LAYER}self_attention.norm", f"{MLP}norm"),
    *(f"{ATTENTION}query_scale.norm", f"{ATTENTION}key_scale.norm"),
)
COMMON = "axlearn.common."
ATTENTION_MODULE = f"{COMMON}attention."
# What the decoder here computes; any other value is another model.
EXPECTED: dict[str, tuple[Any, ...]] = {
    "model.klass": (f"{COMMON}causal_lm.Model",),
    f"{DECODER}klass": (f"{COMMON}decoder.Decoder",),
    f"{DECODER}emb.klass": (f"{COMMON}embedding.TransformerTextEmbeddings",),
    f"{DECODER}emb.token_emb.klass": (f"{COMMON}layers.Embedding",),
    f"{DECODER}transformer.klass": (f"{ATTENTION_MODULE}RepeatedTransformerLayer",),
    f"{DECODER}transformer.repeat.klass": (f"{ATTENTION_MODULE}_TransformerRepeat",),
    f"{LAYER}klass": (f"{ATTENTION_MODULE}TransformerLayer",),
    f"{LAYER}self_attention.klass": (f"{ATTENTION_MODULE}TransformerAttentionLayer",),
    f"{LAYER}self_attention.structure": ("prenorm",),
    f"{ATTENTION}klass": (
        f"{ATTENTION_MODULE}GroupedQueryAttention",
        f"{COMMON}flash_attention.layer.FlashAttention",
    ),
    f"{ATTENTION}causal": (True,),
    f"{ATTENTION}query_scale.klass": (f"{ATTENTION_MODULE}ScaleQuery",),
    f"{ATTENTION}key_scale.klass": (f"{ATTENTION_MODULE}ScaleKey",),
    f"{ATTENTION}output_linear.klass": (f"{ATTENTION_MODULE}MultiheadOutputLinear",),
    f"{ATTENTION}output_linear.bias": (False,),
    f"{QKV}klass": (f"{ATTENTION_MODULE}RoFormerQKVLinear",),
    f"{QKV}rotary_value": (False,),
    f"{QKV}rope_pos_emb_layer.klass": (
        f"{ATTENTION_MODULE}RoFormerSinusoidalPositionalEmbedding",
    ),
    f"{QKV}input_linear.klass": (f"{ATTENTION_MODULE}FusedGroupedQKVLinear",),
    f"{QKV}input_linear.layer.klass": (f"{ATTENTION_MODULE}MultiheadInputLinear",),
    f"{QKV}input_linear.layer.bias": (False,),
    f"{MLP}klass": (f"{ATTENTION_MODULE}TransformerFeedForwardLayer",),
    f"{MLP}structure": ("prenorm",),
    f"{MLP}activation[0]": ("nn.silu",),
    f"{MLP}activation[1]": ("linear",),
    f"{MLP}residual_weight": (1.0,),
    **{f"{MLP}linear{i}.klass": (f"{COMMON}layers.Linear",) for i in (1, 2)},
    **{f"{MLP}linear{i}.bias": (False,) for i in (1, 2)},
    **{f"{norm}.klass": (f"{COMMON}layers.RMSNorm",) for norm in NORMS},
}
# Of training, of sharding, of how axlearn itself decodes, of what it logs.
IGNORED = re.compile(
    r"partition_spec|remat_spec|param_init|kv_cache|dropout|stochastic_depth|_summary\b"
    r"|_summary\[|(pad|eos)_token_id$|\.decoding\.|\.metrics\b|drop_output|batch_axis_names|dtype$|block_size$"
)
# Of the data, so that a config may leave it out; honeycrisp's.
MAX_LENGTH = "input.source.max_sequence_length"


def decoder_of(values: Any) -> DecoderConfig:
    """The decoder of a config.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    fields = Fields(values, "axlearn config", {MAX_LENGTH: 4096})
    for key, allowed in EXPECTED.items():
        fields.require(key)
        fields.expect(key, *allowed)
    width, heads = (
        fields.integer(key) for key in (f"{DECODER}dim", f"{ATTENTION}num_heads")
    )
    section = DecoderConfig.from_dict(
        {
            "vocab_size": fields.integer(f"{DECODER}vocab_size"),
            "hidden_size": width,
            "intermediate_size": _feedforward(fields, width),
            "num_hidden_layers": fields.integer(f"{DECODER}transformer.num_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": fields.integer(f"{QKV}input_linear.num_kv_heads"),
            "head_dim": width // max(heads, 1),
            "rms_norm_eps": _eps(fields),
            "rope_theta": fields.require(f"{QKV}rope_pos_emb_layer.theta"),
            "max_position_embeddings": fields.integer(MAX_LENGTH),
            "tie_word_embeddings": True,
            "rope_interleaved": True,
            "hidden_act": "silu",
            "qk_norm": "rotated",
        }
    )
    fields.finish(tuple(key for key in fields.values if IGNORED.search(key)))
    return section


def _feedforward(fields: Fields, width: int) -> int:
    """The feed-forward width: a number, or a multiple of the width, rounded up."""
    key = f"{MLP}hidden_dim"
    if fields.get(key) is not None:
        return fields.integer(key)
    fields.expect(f"{key}.fn", "axlearn.experiments.text.gpt.common.scale_fn")
    scale, step = (
        fields.require(f"{key}.scale"),
        fields.integer(f"{key}.round_up_to_multiples_of"),
    )
    if type(scale) not in (int, float) or not 0 < scale < 1000 or step < 1:
        raise ConfigError(
            f"{fields.where}.{key}: scale {scale!r} rounded up to multiples of {step} "
            "is not a width"
        )
    return math.ceil(width * scale / step) * step


def _eps(fields: Fields) -> float:
    """The norms' eps, which is one here.

    Raises:
        ConfigError: they differ.
    """
    eps = {norm: fields.require(f"{norm}.eps") for norm in NORMS}
    first = eps[NORMS[0]]
    if any(value != first for value in eps.values()):
        raise ConfigError(
            f"{fields.where}: norms of several eps are not supported: {eps}"
        )
    return first
