"""The language model inside a multimodal checkpoint, in any decoder format here."""

from collections.abc import Mapping
from typing import Any, Protocol, cast

from mm1_mlx.config import DecoderConfig
from mm1_mlx.errors import ConfigError

from ..detect import formats
from ..rules import Table
from .fields import Fields


class DecoderFormat(Protocol):
    """What a decoder's module offers beside what every format's does."""

    @property
    def DEFAULTS(self) -> Mapping[str, Mapping[str, Any]]:  # noqa: N802
        """By model type, the values of fields that writers leave out."""

    def table(self, model: str, head: str) -> Table:
        """The rules, for blocks under ``model`` and the head under ``head``."""

    def decoder_config(self, values: Any) -> DecoderConfig:
        """The decoder of a config section."""


def values(section: Any, where: str) -> dict[str, Any]:
    """The section's fields, those that its writer left out included.

    Raises:
        ConfigError: the decoder is none of ours.
    """
    given = {"model_type": "llama"} | dict(Fields(section or {}, where).values)
    kind = given["model_type"]
    known = decoder_formats()
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"{where}: model type {kind!r} is not supported; supported: {sorted(known)}"
        )
    return {**known[kind].DEFAULTS[kind], **given}


def decoder_formats() -> dict[str, DecoderFormat]:
    """Every decoder format by the model types that it reads."""
    found = (cast(Any, f) for f in formats() if hasattr(f, "decoder_config"))
    return {kind: module for module in found for kind in module.DEFAULTS}


def decoder_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of ``values``' fields."""
    return decoder_formats()[values["model_type"]].decoder_config(values)


def table(section: Any, model: str, head: str) -> Table:
    """The decoder's rules, for blocks under ``model`` and the head under ``head``."""
    kind = values(section, "text_config")["model_type"]
    return decoder_formats()[kind].table(model, head)
