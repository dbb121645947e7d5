"""How likely an answer's tokens were, and which would have been likelier."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mm1_mlx.answer import Score


class Scores:
    """The log probabilities of tokens that were drawn, until they are asked for.

    They are the model's own: before temperature, penalties, biases and schemas.

    Args:
        count: how many of the likeliest tokens are told with each.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        # By the token's place in the answer: its own, and the likeliest tokens and theirs.
        self._held: dict[int, tuple[mx.array, mx.array, mx.array, mx.array]] = {}

    def note(self, logits: mx.array, drawn: mx.array, position: int) -> None:
        """Remember a token [1] that was drawn by logits [V]."""
        logits = logits.astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits)
        likeliest = _largest(logprobs, min(self._count, logits.size))
        held = drawn, logprobs[drawn], likeliest, logprobs[likeliest]
        # Else they would be computed once the next step is under way, and behind it.
        mx.async_eval(held)
        self._held[position] = held

    def take(self, position: int) -> Score:
        """The score of the token at a place in the answer."""
        drawn, own, likeliest, theirs = self._held.pop(position)
        tokens = cast(list[int], likeliest.tolist())
        pairs = zip(tokens, cast(list[float], theirs.tolist()), strict=True)
        return Score(int(drawn), float(own), tuple(pairs))


def _largest(x: mx.array, count: int) -> mx.array:
    """Where the largest of x [V] are, in their order."""
    if not count:
        return mx.zeros(0, mx.uint32)
    found = mx.argpartition(-x, kth=count - 1)[:count]
    return found[mx.argsort(-x[found])]
