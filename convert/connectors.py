"""A new connector from a word on the command line: ``c-abstractor:144``, ``mlp``."""

import math
import re
from typing import Any

from mm1_mlx.config import (
    AttentionPoolConfig,
    AveragePoolConfig,
    CAbstractorConfig,
    ConnectorConfig,
    DecoderConfig,
    LinearConfig,
    MLPConfig,
    PerceiverConfig,
    VisionConfig,
)
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import PRESETS

SPELLINGS = (
    *("linear", "mlp", "average-pool:TOKENS", "attention-pool:TOKENS"),
    *("perceiver:TOKENS", "c-abstractor:TOKENS"),
)
_KINDS = "|".join(spelling.partition(":")[0] for spelling in SPELLINGS)
_SPEC = re.compile(f"({_KINDS})(?::(.*))?")
_NUMBER = re.compile("[0-9]{1,6}")
# Width of a head of attention pooling, where it divides the decoder's: CoCa's is 64 too.
HEAD_DIM = 64


def is_spec(text: str) -> bool:
    """Whether the word names a kind of connector, and not a source.

    Raises:
        ConfigError: it can be neither.
    """
    if _SPEC.fullmatch(text):
        return True
    if "/" not in text and text not in PRESETS:
        raise ConfigError(
            f"connector {text!r} is none of {', '.join(SPELLINGS)}, nor a preset, nor a "
            "source such as './folder' or 'owner/name'"
        )
    return False


def connector_config(
    spec: str, vision: VisionConfig, decoder: DecoderConfig
) -> ConnectorConfig:
    """The connector that the spec asks for, between these two.

    Raises:
        ConfigError: the spec lacks its number of tokens, or has one too many.
    """
    match = _SPEC.fullmatch(spec)
    assert match is not None
    kind, tokens = match[1], match[2]
    sizes: dict[str, Any] = {
        "input_size": vision.hidden_size,
        "num_features": vision.num_features,
        "output_size": decoder.hidden_size,
    }
    if kind in ("linear", "mlp"):
        if tokens is not None:
            raise ConfigError(
                f"connector {spec!r}: {kind} makes one image token of each of the "
                f"{vision.num_features} features; leave out ':{tokens}'"
            )
        if kind == "linear":
            return LinearConfig(**sizes)
        return MLPConfig(**sizes, hidden_size=decoder.hidden_size)
    if not _NUMBER.fullmatch(tokens or ""):
        raise ConfigError(
            f"connector {spec!r} needs its number of image tokens, e.g. '{kind}:144'"
        )
    sizes["num_image_tokens"] = int(tokens or 0)
    if kind == "attention-pool":
        heads = math.gcd(max(1, decoder.hidden_size // HEAD_DIM), decoder.hidden_size)
        return AttentionPoolConfig(**sizes, num_attention_heads=heads)
    if kind == "perceiver":
        return PerceiverConfig(**sizes, intermediate_size=4 * vision.hidden_size)
    return {"average-pool": AveragePoolConfig, "c-abstractor": CAbstractorConfig}[kind](
        **sizes
    )
