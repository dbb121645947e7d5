"""A new connector from a word on the command line: ``c-abstractor:144``, ``mlp``."""

import re
from typing import Any

from mm1_mlx.config import (
    AveragePoolConfig,
    CAbstractorConfig,
    ConnectorConfig,
    DecoderConfig,
    LinearConfig,
    MLPConfig,
    VisionConfig,
)
from mm1_mlx.errors import ConfigError
from mm1_mlx.presets import PRESETS

SPELLINGS = ("linear", "mlp", "average-pool:TOKENS", "c-abstractor:TOKENS")
_SPEC = re.compile(r"(linear|mlp|average-pool|c-abstractor)(?::(.*))?")


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
    if not (tokens or "").isdecimal():
        raise ConfigError(
            f"connector {spec!r} needs its number of image tokens, e.g. '{kind}:144'"
        )
    pooled = AveragePoolConfig if kind == "average-pool" else CAbstractorConfig
    return pooled(**sizes, num_image_tokens=int(tokens))
