"""OpenELM's layer-wise scaling: the heads and feed-forward width of every block.

https://huggingface.co/apple/OpenELM-3B/blob/main/configuration_openelm.py
"""

from collections.abc import Mapping
from typing import Any

from mm1_mlx.config.limits import MAX_HIDDEN_SIZE
from mm1_mlx.errors import ConfigError

from .fields import Fields

KEYS = ("num_query_heads", "num_kv_heads", "ffn_multipliers")


def layer_sizes(fields: Fields) -> list[Mapping[str, int]]:
    """The sizes of every block, from the lists that a saved config has.

    Raises:
        ConfigError: a list is missing, or not of one number for each block.
    """
    count, width = fields.integer("num_transformer_layers"), fields.integer("model_dim")
    divisor = fields.integer("ffn_dim_divisor")
    if divisor < 1:
        raise ConfigError(f"{fields.where}.ffn_dim_divisor: {divisor} is below 1")
    lists = [_numbers(fields, key, count) for key in KEYS]
    return [
        {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": _round(multiplier * width, divisor),
        }
        for heads, kv_heads, multiplier in zip(*lists, strict=True)
    ]


def _numbers(fields: Fields, key: str, count: int) -> list[Any]:
    given = fields.require(key)
    if (
        not isinstance(given, list)
        or len(given) != count
        or not given
        or not all(type(x) in (int, float) and 0 < x < MAX_HIDDEN_SIZE for x in given)
    ):
        raise ConfigError(
            f"{fields.where}.{key}: {given!r:.80} is not a list of one number for each "
            f"of the {count} blocks; save the config with OpenELM's own code"
        )
    return given


def _round(width: float, divisor: int) -> int:
    """The nearest multiple, one more where that is less than nine tenths of it."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded
