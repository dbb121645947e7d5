"""How likely an answer's tokens were, told with the text that they wrote."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mm1_mlx.answer import Piece, Score
from mm1_mlx.spelling import Spelling

from .replies import CompletionLogprobs, Likely, Logprobs, TokenLogprob

# What OpenAI writes for the logarithm of 0, which JSON has no number for.
NEVER = -9999.0


@dataclass(frozen=True)
class Scored:
    """A token's score, and where its text begins in the answer's, in characters."""

    score: Score
    start: int
    # Its bytes, as far as they are in the text.
    text: bytes
    # Whether a space at its beginning is left out, and at that of others in its place.
    trimmed: bool = False


class Scorer:
    """Tells the scores of tokens once their text is sent; one answer's.

    A token whose text was held back may be part of a stop string, which is never sent.

    Args:
        spelling: of the model's tokens.
    """

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: deque[Scored] = deque()
        self._first = True
        self._written = 0
        self._sent = 0

    def add(self, piece: Piece) -> list[Scored]:
        """The scores that belong to what was sent, this piece included."""
        if piece.score is not None:
            trimmed = not self._written and self._spelling.trims(first=self._first)
            self._first = False
            text = _spell(piece.score.token, self._spelling, trimmed=trimmed)
            self._held.append(Scored(piece.score, self._written, text, trimmed))
            self._written += len(self._decoder.decode(text))
        self._sent += len(piece.text)
        told = []
        while self._held and self._is_sent(self._held[0]):
            told.append(self._held.popleft())
        return told

    def _is_sent(self, scored: Scored) -> bool:
        return scored.start < self._sent or not scored.text


def chat_logprobs(told: Iterable[Scored], spelling: Spelling) -> Logprobs:
    """The scores as chats have them."""
    content = []
    for scored in told:
        likeliest = [_likely(*pair) for pair in _likeliest(scored, spelling)]
        own = _likely(scored.text, scored.score.logprob)
        content.append(TokenLogprob(**own.model_dump(), top_logprobs=likeliest))
    return Logprobs(content=content)


def completion_logprobs(
    told: Iterable[Scored], spelling: Spelling
) -> CompletionLogprobs:
    """The scores as completions have them."""
    told = list(told)
    return CompletionLogprobs(
        tokens=[_text(scored.text) for scored in told],
        token_logprobs=[max(scored.score.logprob, NEVER) for scored in told],
        top_logprobs=[
            {
                _text(text): max(value, NEVER)
                for text, value in _likeliest(scored, spelling)
            }
            for scored in told
        ],
        text_offset=[scored.start for scored in told],
    )


def _likeliest(scored: Scored, spelling: Spelling) -> Iterator[tuple[bytes, float]]:
    """The likeliest tokens in a token's place, and how likely."""
    for token, logprob in scored.score.likeliest:
        yield _spell(token, spelling, trimmed=scored.trimmed), logprob


def _spell(token: int, spelling: Spelling, *, trimmed: bool) -> bytes:
    text = spelling(token)
    return text.removeprefix(b" ") if trimmed else text


def _likely(text: bytes, logprob: float) -> Likely:
    return Likely(token=_text(text), logprob=max(logprob, NEVER), bytes=[*text])


def _text(text: bytes) -> str:
    return text.decode(errors="replace")
