"""Which token comes next: the likeliest, or one drawn with a seed of the answer's own.

mlx-lm's samplers draw from one state for the whole process; answers that are decoded
together would then depend on each other.
"""

from __future__ import annotations

import secrets
from typing import Protocol

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_p

from mm1_mlx.bias import Bias
from mm1_mlx.scores import Scores

# Below it the likeliest token is all but certain.
MIN_TEMPERATURE = 1e-6
# Odd, and without a pattern: a position's key differs from those of near seeds.
_STRIDE = 0x9E3779B97F4A7C15


class Constraint(Protocol):
    """What an answer is held to; ``grammar.Constraint`` is one."""

    def mask(self, logits: mx.array) -> mx.array:
        """Logits [V] with -inf for what may not come next."""
        ...

    def accept(self, token: int) -> None:
        """Go on behind a token that was drawn."""
        ...

    def rewind(self, count: int) -> None:
        """Take back the tokens accepted last."""
        ...

    def check(self) -> None:
        """Raise an MM1Error where it can be followed no further."""
        ...


class Sampler:
    """Draws an answer's tokens one after another, in mlx-lm's sampler protocol.

    A token depends on its logits, the seed and its position alone: not on what else runs,
    nor on how many are drawn at once.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: draws from the likeliest tokens of this much probability together.
        seed: 0 to 2^64 - 1; by default another one each time.
        constraint: what the answer is held to, or None.
        bias: moves its logits, or None.
        scores: is told how likely its tokens were, or None.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        constraint: Constraint | None = None,
        bias: Bias | None = None,
        scores: Scores | None = None,
    ) -> None:
        self.greedy = temperature < MIN_TEMPERATURE
        self.temperature = temperature
        self.top_p = top_p
        self.seed = secrets.randbits(64) if seed is None else seed
        self.constraint = constraint
        self.bias = bias
        self.scores = scores
        # Of the token drawn next.
        self.position = 0
        # Drawn last, where the constraint has not seen it: it may not be computed yet.
        self._unseen: mx.array | None = None

    @property
    def apart(self) -> bool:
        """Whether a token depends on those before it beside the logits, or is scored."""
        return any((self.constraint, self.bias, self.scores))

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token, as any other plain one does."""
        return self.greedy and not self.apart

    def __call__(self, logits: mx.array) -> mx.array:
        """The tokens [T] of this position and the next ones, from logits [T, V]."""
        first, self.position = self.position, self.position + logits.shape[0]
        if not self.apart:
            return self._draw(logits, first)
        # The device goes on with them while the last token is looked at.
        mx.async_eval(logits)
        drawn = [self._next(row, first + i) for i, row in enumerate(logits)]
        return mx.concatenate(drawn)

    def rewind(self, count: int) -> None:
        """Draw the last tokens again: they were not used."""
        self.position -= count
        if self.bias is not None:
            self.bias.rewind(count)
        if self.constraint is None or not count:
            return
        if self._unseen is not None:
            self._unseen, count = None, count - 1
        self.constraint.rewind(count)

    def _next(self, logits: mx.array, position: int) -> mx.array:
        """The token [1] of a position, from logits [V], behind those before it."""
        moved = logits if self.bias is None else self.bias.move(logits)
        if self.constraint is not None:
            if self._unseen is not None:
                self.constraint.accept(int(self._unseen))
            moved = self.constraint.mask(moved)
        drawn = self._draw(moved[None], position)
        if self.constraint is not None:
            self._unseen = drawn
        if self.bias is not None:
            self.bias.accept(drawn)
        if self.scores is not None:
            self.scores.note(logits, drawn, position)
        return drawn

    def _draw(self, logits: mx.array, first: int) -> mx.array:
        """The tokens [T] of the positions from ``first`` on, from logits [T, V]."""
        if self.greedy:
            return mx.argmax(logits, axis=-1)
        # In half precision small temperatures overflow.
        logits = logits.astype(mx.float32)
        if self.top_p < 1:
            logits = apply_top_p(
                logits - mx.logsumexp(logits, axis=-1, keepdims=True), self.top_p
            )
        logits = logits / self.temperature
        drawn = [
            mx.random.categorical(row, key=self._key(first + i))
            for i, row in enumerate(logits)
        ]
        return mx.stack(drawn)

    def _key(self, position: int) -> mx.array:
        return mx.random.key((self.seed + position * _STRIDE) % 2**64)
