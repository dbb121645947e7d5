"""Decoders trained with axlearn as AFM-on-device is: honeycrisp, as a flattened state.

https://github.com/apple/axlearn/blob/34aed43/axlearn/experiments/text/gpt/honeycrisp.py

axlearn writes no such folder itself. Tensors are named by their path in the state, as
its ``flatten_items`` spells it (``decoder/emb/token_emb/weight``, or the same under
``model/``). config.json holds ``"model_type": "axlearn"`` and a field for each line
``model.…: value`` of the trainer's config, as its ``debug_string`` prints it.
"""

import mlx.core as mx

from mm1_mlx.config import MM1Config

from ..rules import Op, Table, divide, transpose, unstack
from ..shared.axlearn_config import DECODER, decoder_of
from ..shared.text import prompt_section
from ..source import Source

BLOCK = "decoder.layers.{}."
ATTENTION, MLP = f"{BLOCK}self_attn.", f"{BLOCK}mlp."


def _queries_keys_values(*targets: str) -> Op:
    """[D, h, head_dim] to three matrices [.., D]: heads of q, then of k, then of v."""
    parts = divide(*targets)

    def function(x: mx.array, shapes: list[tuple[int, ...]]) -> tuple[mx.array, ...]:
        return parts.function(x.transpose(1, 2, 0).flatten(0, 1), shapes)

    return Op(targets, function, sized=True)


def _join_heads(target: str) -> Op:
    """[D, h, head_dim] to a matrix [D, h * head_dim]."""
    return Op((target,), lambda x: (x.flatten(1, 2),))


# Of all layers at once: the first axis is the layer.
LAYER: Table = {
    "self_attention/norm/scale": f"{BLOCK}input_layernorm.weight",
    "self_attention/attention/i_proj/i_proj/qkv_proj/weight": _queries_keys_values(
        *(f"{ATTENTION}{name}_proj.weight" for name in "qkv")
    ),
    "self_attention/attention/o_proj/weight": _join_heads(f"{ATTENTION}o_proj.weight"),
    "self_attention/attention/scale_query/norm/scale": f"{ATTENTION}q_norm.weight",
    "self_attention/attention/scale_key/norm/scale": f"{ATTENTION}k_norm.weight",
    "feed_forward/norm/scale": f"{BLOCK}post_attention_layernorm.weight",
    "feed_forward/linear1_0/weight": transpose(f"{MLP}gate_proj.weight"),
    "feed_forward/linear1_1/weight": transpose(f"{MLP}up_proj.weight"),
    "feed_forward/linear2/weight": transpose(f"{MLP}down_proj.weight"),
}
RULES: Table = {}
for prefix in ("", "model/"):
    RULES[f"{prefix}decoder/emb/token_emb/weight"] = "decoder.embed_tokens.weight"
    RULES[f"{prefix}decoder/output_norm/scale"] = "decoder.norm.weight"
    for leaf, rule in LAYER.items():
        assert rule is not None
        RULES[f"{prefix}decoder/transformer/repeat/layer/{leaf}"] = unstack(rule)


def rules(source: Source) -> Table:  # noqa: ARG001
    """The tensor names of the decoder alone."""
    return RULES


def detect(source: Source) -> bool:
    """Whether the source is a flattened state of axlearn."""
    return source.config.get("model_type") == "axlearn"


def config(source: Source) -> MM1Config:
    """The decoder alone.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    keys = ("vocab_size", "pad_token_id", "eos_token_id")
    tokens = {key: source.config.get(f"{DECODER}{key}") for key in keys}
    return MM1Config(
        decoder=decoder_of(source.config),
        prompt=prompt_section(source, tokens, "plain"),
    )
