"""What may be asked of an answer, and what an answer is. No mlx import."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from mm1_mlx.errors import PromptError

KV_BITS = [4, 8]
KV_GROUP_SIZES = [32, 64, 128]
MAX_TOKENS = 1_000_000
MAX_TOP_LOGPROBS = 20
FinishReason = Literal["stop", "length", "cancelled"]


class Options(TypedDict, total=False):
    """What ``stream`` and ``generate`` take by keyword; see ``Settings``."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str]
    schema: Mapping[str, Any] | None
    logit_bias: Mapping[int, float]
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int | None
    raw: bool
    cancel: threading.Event | None
    progress: Callable[[int, int], None] | None
    tiled: int | None
    shots: Sequence[Any]
    shot_style: str
    prefix: str | None
    kv_bits: int | None
    kv_group_size: int | None
    kv_start: int
    prompt_lookup: bool
    draft: Any
    num_draft_tokens: int


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
    # A JSON schema that the answer is held to, as far as max_tokens lets it.
    schema: Mapping[str, Any] | None = None
    # Added to the logits of tokens; taken from those of tokens that the answer holds
    # already, once and for every time.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # How likely every token was, with so many of the likeliest; None for not at all.
    top_logprobs: int | None = None
    # The prompt is gone on with as it is, without the model's chat template.
    raw: bool = False
    # Set from any thread, ends the answer at the next token.
    cancel: threading.Event | None = None
    # Called with prompt tokens processed and in all, on the runtime's thread.
    progress: Callable[[int, int], None] | None = None
    # How many of the last pictures may be split into tiles; None means all.
    tiled: int | None = None
    # Solved examples, ``shots.Shot`` each, and how they are shown.
    shots: Sequence[Any] = ()
    shot_style: str = "auto"
    # A prefix saved under this name stands before the prompt.
    prefix: str | None = None
    # Bits that keys and values are packed to, None for none, once there are ``kv_start``
    # positions: below, packing saves less than it costs. Groups are as wide as fits.
    kv_bits: int | None = None
    kv_group_size: int | None = None
    kv_start: int = 4096
    # Guess that the answer repeats what stands before; the answer stays the same, up to
    # the rounding of several rows at once.
    prompt_lookup: bool = False
    # A smaller model of the same vocabulary, a ``Runtime``, which guesses this many tokens.
    draft: Any = None
    num_draft_tokens: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, MAX_TOKENS), ("kv_start", 0, 10_000_000),
            ("num_draft_tokens", 1, 32), ("seed", 0, 2**64 - 1), ("tiled", 0, 10**6),
            ("top_logprobs", 0, MAX_TOP_LOGPROBS),
        ):  # fmt: skip
            optional = name in ("seed", "tiled", "top_logprobs")
            self._check(name, (int,), low, high, optional=optional)
        self._check("temperature", (int, float), 0, 2)
        self._check("top_p", (int, float), 0, 1)
        self._check("presence_penalty", (int, float), -2, 2)
        self._check("frequency_penalty", (int, float), -2, 2)
        if not all(-100 <= value <= 100 for value in self.logit_bias.values()):
            raise PromptError("logit_bias has a value outside -100 to 100")
        if self.top_p == 0:
            raise PromptError("top_p is 0, expected more; temperature 0 is greedy")
        for name, known in (
            ("kv_bits", KV_BITS), ("kv_group_size", KV_GROUP_SIZES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value not in known):
                raise PromptError(f"{name} is {value!r:.40}, expected one of {known}")
        if self.schema is not None and not isinstance(self.schema, Mapping):
            raise PromptError(f"schema is {self.schema!r:.40}, expected a JSON schema")
        if self.prefix is not None and not isinstance(self.prefix, str):
            raise PromptError(f"prefix is {self.prefix!r:.40}, expected its name")
        if self.draft is not None and not hasattr(self.draft, "engine"):
            raise PromptError(
                f"draft is {self.draft!r:.40}, expected a Runtime that is not closed"
            )
        if self.prompt_lookup and self.draft is not None:
            raise PromptError(
                "prompt_lookup and draft are both given; one of them can guess"
            )
        if isinstance(self.stop, str) or not all(
            isinstance(word, str) and word for word in self.stop
        ):
            raise PromptError(f"stop is {self.stop!r}, expected a list of strings")

    def _check(
        self,
        name: str,
        kinds: tuple[type, ...],
        low: float,
        high: float,
        *,
        optional: bool = False,
    ) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        # A bool is an int to Python, and no number to a caller.
        if type(value) not in kinds:
            kind = "an integer" if kinds == (int,) else "a number"
            raise PromptError(f"{name} is {value!r:.40}, expected {kind}")
        if not low <= value <= high:
            raise PromptError(f"{name} is {value}, expected {low} to {high}")


@dataclass(frozen=True)
class Timings:
    """How long an answer took, in seconds."""

    # Reading and encoding the pictures and the prompt.
    encode: float
    # Running the prompt, up to the first token.
    prefill: float
    # From when it was first asked for, waiting for other answers included.
    first_token: float
    total: float
    # Tokens per second after the first.
    decode_rate: float


@dataclass(frozen=True)
class Forecast:
    """What an answer will take, said before it is begun.

    Attributes:
        prompt_tokens: of the prompt, its pictures included.
        image_tokens: those of them that are pictures.
        cached_tokens: those that are known from before.
        max_tokens: of the longest answer.
        bytes: of memory, beside the weights and what is kept of earlier answers.
        first_token: the least seconds to it, None where the machine's speed is unknown.
        total: the least seconds to the last of ``max_tokens``; None where that is
            unknown, or the tokens are guessed, several in a step.
    """

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    max_tokens: int
    bytes: int
    first_token: float | None
    total: float | None


@dataclass(frozen=True)
class Stats:
    """What an answer took."""

    prompt_tokens: int
    image_tokens: int
    # Prompt tokens that were known from before and not computed again.
    cached_tokens: int
    generated_tokens: int
    timings: Timings


@dataclass(frozen=True)
class Score:
    """How likely a token was, and the likeliest in its place with theirs."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of the answer; the last one carries ``finish_reason`` and ``stats``."""

    text: str
    token: int | None = None
    finish_reason: FinishReason | None = None
    stats: Stats | None = None
    # Of the token, where ``top_logprobs`` asks for it.
    score: Score | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    finish_reason: FinishReason
    timings: Timings


def join(pieces: Sequence[Piece]) -> Answer:
    """The answer that these are all the pieces of."""
    stats, reason = pieces[-1].stats, pieces[-1].finish_reason
    assert stats is not None
    assert reason is not None
    return Answer(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.token for piece in pieces if piece.token is not None),
        prompt_tokens=stats.prompt_tokens,
        image_tokens=stats.image_tokens,
        cached_tokens=stats.cached_tokens,
        finish_reason=reason,
        timings=stats.timings,
    )
