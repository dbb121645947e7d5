"""Logits that somebody moved: tokens that are liked, and those that were said already.

Source: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import mlx.core as mx

# Tokens that can be taken back: more than are ever guessed at once.
_KEPT = 64


class Bias:
    """What is added to an answer's logits, token by token.

    Args:
        vocab_size: the width of the logits.
        liked: what is added to the logits of tokens, always.
        presence: what is taken from those of tokens that the answer holds.
        frequency: what is taken from them for every time it does.
    """

    def __init__(
        self,
        vocab_size: int,
        liked: Mapping[int, float],
        presence: float = 0.0,
        frequency: float = 0.0,
    ) -> None:
        self._presence, self._frequency = presence, frequency
        self._liked = mx.zeros(vocab_size)
        if liked:
            self._liked[mx.array([*liked])] = mx.array([*liked.values()], mx.float32)
        self._counts = mx.zeros(vocab_size)
        self._accepted: deque[mx.array] = deque(maxlen=_KEPT)

    def move(self, logits: mx.array) -> mx.array:
        """The logits [V] of the next token, in float32."""
        logits = logits.astype(mx.float32) + self._liked
        if self._presence:
            logits = logits - self._presence * (self._counts > 0)
        if self._frequency:
            logits = logits - self._frequency * self._counts
        return logits

    def accept(self, token: mx.array) -> None:
        """Go on behind a token [1] that was drawn, and may not be computed yet."""
        if self._presence or self._frequency:
            self._accepted.append(token)
            self._counts = self._counts.at[token].add(1)

    def rewind(self, count: int) -> None:
        """Take back the tokens accepted last."""
        for _ in range(min(count, len(self._accepted))):
            self._counts = self._counts.at[self._accepted.pop()].add(-1)
