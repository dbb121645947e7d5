"""The formats that can be converted, and which of them a source is in."""

from typing import Protocol

from mm1_mlx.config import MODEL_TYPE, MM1Config
from mm1_mlx.errors import CheckpointError

from . import clip_hf, honeybee, llama_hf, llava_hf, qwen_hf
from .rules import Rules
from .source import Source


class Format(Protocol):
    """What a format's module offers."""

    __name__: str

    @property
    def RULES(self) -> Rules:  # noqa: N802
        """Source tensor names to the model's."""

    def detect(self, source: Source) -> bool:
        """Whether the source is in this format."""

    def config(self, source: Source) -> MM1Config:
        """The source's model, or the parts of one that it holds."""


FORMATS: tuple[Format, ...] = (llava_hf, honeybee, clip_hf, llama_hf, qwen_hf)


def detect_format(source: Source) -> Format:
    """The format of a source.

    Raises:
        CheckpointError: it is none that this program knows.
    """
    for key in ("quantization_config", "quantization"):
        if source.config.get(key):
            raise CheckpointError(
                f"{source.name} is quantized ({key} in config.json); convert the "
                "checkpoint that it was made from"
            )
    for format in FORMATS:
        if format.detect(source):
            return format
    kind = source.config.get("model_type")
    if kind == MODEL_TYPE:
        raise CheckpointError(f"{source.name} is converted already; use it as it is")
    classes = source.config.get("architectures")
    raise CheckpointError(
        f"{source.name}: model type {kind!r} ({classes}) is not one this program "
        f"converts; it converts {', '.join(name_of(f) for f in FORMATS)}"
    )


def name_of(format: Format) -> str:
    """The format's name, as its file is called."""
    return format.__name__.rpartition(".")[2]
