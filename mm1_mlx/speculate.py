"""Several tokens a step: guessed by somebody cheap, and checked by the model at once.

A guess is right where it is the token that the model would have drawn itself, so the
answer is the one it would have given alone, greedily or with a seed, up to the rounding of
several rows at once. A guess that is wrong is cut from the cache.

Source: speculative decoding, arXiv 2211.17192; prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import mlx.core as mx

from mm1_mlx.memory.prefixes import KVPrecision, pack
from mm1_mlx.models import MM1
from mm1_mlx.sampling import Sampler


class Drafter(Protocol):
    """Guesses how a text of tokens goes on."""

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """What may come after ``tokens``, the prompt's and the answer's; may be nothing."""
        ...


class PromptLookup:
    """Guesses that what followed the last words before will follow them again.

    Args:
        longest: how many tokens of the end are looked for first; then fewer.
        most: how many tokens are guessed at once, after guesses that were right.
    """

    def __init__(self, longest: int = 3, most: int = 16) -> None:
        self.longest = longest
        self.most = most
        self._width = 4
        self._guessed: list[int] = []
        self._at = 0
        # Where every run of up to ``longest`` tokens was seen last, and before that.
        self._seen: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """What followed the longest end of ``tokens`` that was seen before."""
        self._adapt(tokens)
        self._index(tokens)
        found = None
        for size in range(min(self.longest, len(tokens) - 1), 0, -1):
            found = self._seen.get(tuple(tokens[-size:]))
            if found is not None:
                break
        self._at = len(tokens)
        self._guessed = []
        if found is not None:
            self._guessed = list(tokens[found : found + self._width])
        return self._guessed

    def _adapt(self, tokens: Sequence[int]) -> None:
        """Guess more after a guess that was right, fewer after one that was not."""
        if not self._guessed:
            return
        came = list(tokens[self._at : self._at + len(self._guessed)])
        if came == self._guessed:
            self._width = min(2 * self._width, self.most)
        else:
            self._width = max(2, self._width // 2)

    def _index(self, tokens: Sequence[int]) -> None:
        # The last token begins what is guessed: the end itself is no earlier place.
        for end in range(max(1, self._indexed), len(tokens)):
            for size in range(1, min(self.longest, end) + 1):
                self._seen[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)


class DraftModel:
    """Guesses what a smaller model says, greedily.

    Args:
        model: the smaller model, of the same vocabulary.
        cache: its cache, filled with its own view of the prompt.
        prompt: how many tokens of the answer's prompt that stands for.
        count: how many tokens are guessed at once.
    """

    def __init__(
        self, model: MM1, cache: list[Any], prompt: int, count: int = 4
    ) -> None:
        self.model = model
        self.cache = cache
        self.count = count
        # How many of the tokens given the cache holds.
        self._held = prompt
        self._guessed: list[int] = []

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """The model's own next tokens."""
        self.rewind(tokens)
        new = list(tokens[self._held :])
        guessed: list[int] = []
        for _ in range(self.count):
            logits = self.model(mx.array([new]), cache=self.cache)
            self._held += len(new)
            new = [int(mx.argmax(logits[0, -1]))]
            guessed += new
        self._guessed = guessed
        # The last guess is not in the cache, the others are.
        self._held = len(tokens) + len(guessed) - 1
        return guessed

    def rewind(self, tokens: Sequence[int]) -> int:
        """Cut the guesses that did not come; how many of ``tokens`` the cache holds."""
        guessed, self._guessed = self._guessed[:-1], []
        start = self._held - len(guessed)
        right = 0
        for guess, came in zip(guessed, tokens[start:], strict=False):
            if guess != came:
                break
            right += 1
        surplus = len(guessed) - right
        for layer in self.cache:
            layer.trim(surplus)
        self._held -= surplus
        return self._held


def speculate(
    model: MM1,
    first: int,
    cache: list[Any],
    drafter: Drafter,
    sampler: Sampler,
    prompt: Sequence[int],
    max_tokens: int,
    precision: KVPrecision,
) -> Iterator[int]:
    """The tokens of an answer behind its ``first``, which the cache does not hold yet.

    Args:
        model: decides.
        first: the answer's first token.
        cache: holds the prompt.
        drafter: guesses.
        sampler: draws the tokens from the model's logits.
        prompt: tokens that the drafter may look at, -1 where a picture stands.
        max_tokens: how many tokens at most, the first one included.
        precision: how the cache holds keys and values.
    """
    assert model.config.decoder is not None
    vocabulary = range(model.config.decoder.vocab_size)
    tokens = [*prompt, first]
    left = max_tokens - 1
    while left > 0:
        # One more than was guessed comes of every step.
        guess = _known(drafter.propose(tokens)[: left - 1], vocabulary)
        logits = model(mx.array([[tokens[-1], *guess]]), cache=cache)[0]
        drawn = cast(list[int], sampler(logits).tolist())
        right = 0
        while right < len(guess) and guess[right] == drawn[right]:
            right += 1
        wrong = len(guess) - right
        sampler.rewind(wrong)
        for layer in cache:
            layer.trim(wrong)
        pack(cache, precision)
        came = drawn[: right + 1]
        tokens += came
        left -= len(came)
        yield from came


def _known(guess: list[int], vocabulary: range) -> list[int]:
    """The guess up to a token that the model has no embedding for."""
    return list(itertools.takewhile(vocabulary.__contains__, guess))
