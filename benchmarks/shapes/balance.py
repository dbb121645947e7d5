"""Losses balanced for what the training split shows (arXiv 2007.07314, 2007.10740).

A score is adjusted by how often its class occurs: of shapes by the colour they are seen
in, and the other way round. All but the pairs that never occur are as frequent, so what
remains of the adjustment is about those: that red is never a square in training is next
to no evidence against a red square.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.questions import SHAPE_OF, plural
from benchmarks.shapes.scene import (
    COLOURS,
    HELD_OUT,
    MAX_OBJECTS,
    SHAPES,
    Pair,
    Scene,
)
from mm1_mlx.tokenizer import Tokenizer

# What is added to the score of a shape that a colour never has: it is left out.
OUT = -1e9
# And to that of a colour which a shape never has. Left out as well, such a colour is
# never marked wrong, and a model in doubt takes to it; as rare as this, it is.
RARE = -6.0

# What is added to the scores of one token, by the tokens that compete for its place.
Balance = Mapping[int, float]
# The token that a target gives a share of itself to, and that share.
Rival = tuple[int, float]
NO_RIVAL: Rival = (0, 0.0)
NO_DOUBTS: Mapping[int, Balance] = MappingProxyType({})


def class_adjustments() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What is added to shape scores by colour class, and to colour scores by shape class.

    Class 0 is the background; the last colour row is that of colours without a name.
    """
    never = np.array([[(c, s) in HELD_OUT for s in SHAPES] for c in COLOURS])
    shapes = np.zeros((len(COLOURS) + 2, len(SHAPES) + 1), np.float32)
    shapes[1:-1, 1:] = OUT * never
    colours = np.zeros((len(SHAPES) + 1, len(COLOURS) + 1), np.float32)
    colours[1:, 1:] = RARE * never.T
    return shapes, colours


def is_evidence(text: str, scenes: Sequence[Scene]) -> bool:
    """Whether a question, as asked of these scenes, tells something of a pair not shown.

    Where no green star is ever shown, what is said of "the star" or of stars is never
    about what is green, so that "green" tells it: also that a green star is none.
    """
    shown = {item.pair for scene in scenes for item in scene.objects}
    for half in _alone(text):
        swapped = {(c, half) if half in SHAPES else (half, s) for c, s in shown}
        if swapped & HELD_OUT:
            return True
    return False


def names_some(text: str) -> bool:
    """Whether a question names a colour or a shape: of all objects, none are left out."""
    words = re.findall(r"[a-z]+", text.lower())
    return any(word in COLOURS or word in SHAPE_OF for word in words)


def _alone(text: str) -> set[str]:
    """The shapes and colours that a text names without the other."""
    words = ["", *re.findall(r"[a-z]+", text.lower()), ""]
    shapes = [SHAPE_OF.get(word, "") for word in words]
    found = set()
    for i, word in enumerate(words):
        if shapes[i] and words[i - 1] not in COLOURS:
            found.add(shapes[i])
        if word in COLOURS and not shapes[i + 1]:
            found.add(word)
    return found


class AnswerAdjustment:
    """What balances the scores where an answer names a colour or a shape."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size

        def token(word: str) -> int:
            (token,) = tokenizer.hf.encode(f" {word}", add_special_tokens=False)
            return int(token)

        self.colours = {token(colour): colour for colour in COLOURS}
        # Singular and plural, each competing with its like.
        self.forms = [
            {token(shape): shape for shape in SHAPES},
            {token(plural(shape)): shape for shape in SHAPES},
        ]
        # Of every yes and no, the no in its place; in capitals it begins a sentence.
        self._denials = {}
        for yes, no in (("yes", "no"), ("Yes", "No")):
            *_, denial = tokenizer.hf.encode(f" {no}", add_special_tokens=False)
            *_, claim = tokenizer.hf.encode(f" {yes}", add_special_tokens=False)
            self._denials |= {int(denial): int(denial), int(claim): int(denial)}
        self._numbers = {
            int(tokenizer.hf.encode(f" {number}", add_special_tokens=False)[-1]): number
            for number in range(MAX_OBJECTS + 1)
        }
        self._shapes = {t: shape for form in self.forms for t, shape in form.items()}

    def __call__(
        self,
        tokens: Sequence[int],
        about: Pair | None,
        doubts: Mapping[int, Balance] = NO_DOUBTS,
    ) -> list[Balance]:
        """For each token of an answer, what balances the scores in its place.

        Args:
            tokens: of the answer. In a sentence a colour stands before its shape.
            about: of an answer in one word, the pair that is asked about.
            doubts: by token, what else is added to scores in its place.
        """
        colour, shape = about or (None, None)
        balances: list[Balance] = []
        for i, token in enumerate(tokens):
            # What competes for the place, as the pairs that it would make.
            pairs: dict[int, tuple[str | None, str | None]] = {}
            if token in self.colours:
                seen_as = self._shapes.get(tokens[i + 1], shape)
                pairs = {t: (name, seen_as) for t, name in self.colours.items()}
            elif token in self._shapes:
                seen_in = self.colours.get(tokens[i - 1], colour)
                form = next(form for form in self.forms if token in form)
                pairs = {t: (seen_in, name) for t, name in form.items()}
            penalty = RARE if token in self.colours else OUT
            balance = {t: penalty for t, p in pairs.items() if p in HELD_OUT}
            balances.append({**balance, **doubts.get(token, {})})
        return balances

    def doubt_denials(
        self, score: float, *, beside_yes: bool = False
    ) -> dict[int, Balance]:
        """So much for a no where it or its yes stands, or where its yes stands alone."""
        doubted = {
            t: no for t, no in self._denials.items() if t != no or not beside_yes
        }
        return {t: {no: score} for t, no in doubted.items()} if score else {}

    def soften_denials(self, share: float) -> dict[int, Rival]:
        """By every no, its yes."""
        claims = {no: t for t, no in self._denials.items() if t != no}
        return {no: (yes, share) for no, yes in claims.items()} if share else {}

    def soften_numbers(self, share: float) -> dict[int, Rival]:
        """By every number but the largest, the one above it."""
        tokens = {number: t for t, number in self._numbers.items()}
        numbers = range(MAX_OBJECTS)
        return {tokens[n]: (tokens[n + 1], share) for n in numbers} if share else {}

    def doubt_small_numbers(self, score: float) -> dict[int, Balance]:
        """So much for each number, times what it lacks to the largest, in any's place."""
        scores = {
            t: score * (MAX_OBJECTS - n)
            for t, n in self._numbers.items()
            if n < MAX_OBJECTS
        }
        return dict.fromkeys(self._numbers, scores) if score else {}

    def table(self, balances: Sequence[Balance]) -> NDArray[np.float32]:
        """What is added to the scores [tokens, V]."""
        table = np.zeros((len(balances), self.vocab_size), np.float32)
        for row, balance in zip(table, balances, strict=True):
            row[list(balance)] = list(balance.values())
        return table
