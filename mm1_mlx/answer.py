"""What may be asked of an answer, and what an answer is. No mlx import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mm1_mlx.errors import PromptError

FinishReason = Literal["stop", "length", "cancelled"]


class Options(TypedDict, total=False):
    """What ``stream`` and ``generate`` take by keyword; see ``Settings``."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str]
    cancel: threading.Event | None
    progress: Callable[[int, int], None] | None
    tiled: int | None
    shots: Sequence[Any]
    shot_style: str


@dataclass(frozen=True)
class Settings:
    """How to answer.

    Raises:
        PromptError: a value is out of its range.
    """

    max_tokens: int = 256
    # 0 always takes the likeliest token.
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    # The answer ends before the first of these strings.
    stop: Sequence[str] = ()
    # Set from any thread, ends the answer at the next token.
    cancel: threading.Event | None = None
    # Called with prompt tokens processed and in all, on the runtime's thread.
    progress: Callable[[int, int], None] | None = None
    # How many of the last pictures may be split into tiles; None means all.
    tiled: int | None = None
    # Solved examples, ``shots.Shot`` each, and how they are shown.
    shots: Sequence[Any] = ()
    shot_style: str = "auto"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, 1_000_000), ("temperature", 0, 2), ("top_p", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise PromptError(f"{name} is {value}, expected {low} to {high}")
        if self.top_p == 0:
            raise PromptError("top_p is 0, expected more; temperature 0 is greedy")
        # A fraction of a token would never be counted to.
        if not isinstance(self.max_tokens, int):
            raise PromptError(f"max_tokens is {self.max_tokens}, expected an integer")
        if self.seed is not None and not (
            isinstance(self.seed, int) and 0 <= self.seed < 2**64
        ):
            raise PromptError(f"seed is {self.seed}, expected 0 to {2**64 - 1}")
        if self.tiled is not None and not (type(self.tiled) is int and self.tiled >= 0):
            raise PromptError(f"tiled is {self.tiled!r:.40}, expected 0 or more")
        if isinstance(self.stop, str) or not all(
            isinstance(word, str) and word for word in self.stop
        ):
            raise PromptError(f"stop is {self.stop!r}, expected a list of strings")


@dataclass(frozen=True)
class Timings:
    """How long an answer took, in seconds."""

    # Reading and encoding the pictures and the prompt.
    encode: float
    # From when it was first asked for, waiting for other answers included.
    first_token: float
    total: float
    # Tokens per second after the first.
    decode_rate: float


@dataclass(frozen=True)
class Stats:
    """What an answer took."""

    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """A stretch of the answer; the last one carries ``finish_reason`` and ``stats``."""

    text: str
    token: int | None = None
    finish_reason: FinishReason | None = None
    stats: Stats | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    finish_reason: FinishReason
    timings: Timings
