"""The errors a caller can cause; everything else that is raised is a bug of ours.

A message is one sentence: what is wrong, the value, what was expected, the way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MM1Error(Exception):
    """Base of every error that a user, a file or a caller can cause."""


class ConfigError(MM1Error, ValueError):
    """A configuration that does not describe a model."""


class CheckpointError(MM1Error, ValueError):
    """A model folder or a source of weights that cannot be used."""


class PromptError(MM1Error, ValueError):
    """Messages or pictures that do not make a prompt.

    Attributes:
        setting: the field of ``Settings`` that the model cannot follow, where it is one.
        picture: which of the prompt's pictures cannot be read, counted from 0.
    """

    setting: str | None = None
    picture: int | None = None


@contextmanager
def blaming(
    *, setting: str | None = None, picture: int | None = None
) -> Iterator[None]:
    """A ``PromptError`` within is of this setting or picture."""
    try:
        yield
    except PromptError as error:
        error.setting, error.picture = setting, picture
        raise


class ContextError(PromptError):
    """A prompt that is longer than the model's context."""


class MemoryLimitError(PromptError):
    """An answer will not fit into memory; it may once others have ended."""


class BusyError(MM1Error):
    """Too many questions wait; ``seconds`` is about when one more may be put."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class DataError(MM1Error, ValueError):
    """A training file, or a row of one, that cannot be used."""
