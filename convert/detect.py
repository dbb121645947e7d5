"""The formats that can be converted, and which of them a source is in."""

import importlib
import pkgutil
from functools import cache
from typing import Protocol, cast

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError

from . import formats as package
from .quantization import quantization
from .rules import Rules
from .source import Source


class Format(Protocol):
    """What a format's module offers."""

    __name__: str

    def detect(self, source: Source) -> bool:
        """Whether the source is in this format, and in no other."""

    def config(self, source: Source) -> MM1Config:
        """The source's model, or the parts of one that it holds."""

    def rules(self, source: Source) -> Rules:
        """Source tensor names to the model's."""


@cache
def formats() -> tuple[Format, ...]:
    """Every module of the ``formats`` package."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = (importlib.import_module(f"{package.__name__}.{name}") for name in names)
    return tuple(cast(Format, module) for module in modules)


def detect_format(source: Source) -> Format:
    """The format of a source.

    Raises:
        CheckpointError: it is none that this program knows, or it may be several.
    """
    # Other kinds of quantization than mlx's are refused.
    quantization(source)
    found = [format for format in formats() if format.detect(source)]
    if len(found) > 1:
        raise CheckpointError(
            f"{source.name}: config.json fits several formats, "
            f"{', '.join(name_of(f) for f in found)}; remove the fields of all but one"
        )
    if found:
        return found[0]
    kind = source.config.get("model_type")
    classes = source.config.get("architectures")
    raise CheckpointError(
        f"{source.name}: model type {kind!r} ({classes}) is not one this program "
        f"converts; it converts {', '.join(name_of(f) for f in formats())}"
    )


def name_of(format: Format) -> str:
    """The format's name, as its file is called."""
    return format.__name__.rpartition(".")[2]
