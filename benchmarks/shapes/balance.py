"""Losses balanced for what the training split shows (arXiv 2007.07314, 2007.10740).

A score is adjusted by how often its class occurs, here of shapes by the colour they are
seen in. All but the pairs that never occur are as frequent, so what remains of the
adjustment is to leave those out: that red is never a square in training is no evidence
against a red square. Colours are told apart without it; balanced too, a model in doubt
took to the ones that were never marked wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.questions import plural
from benchmarks.shapes.scene import COLOURS, HELD_OUT, SHAPES, Pair
from mm1_mlx.tokenizer import Tokenizer

# What is added to the score of a class that is left out.
OUT = -1e9


def shape_adjustments() -> NDArray[np.float32]:
    """What is added to shape scores, by colour class.

    Class 0 is the background; the last row is that of colours without a name.
    """
    shapes = np.zeros((len(COLOURS) + 2, len(SHAPES) + 1), np.float32)
    shapes[1:-1, 1:] = [[OUT * ((c, s) in HELD_OUT) for s in SHAPES] for c in COLOURS]
    return shapes


class AnswerAdjustment:
    """Which tokens are left out where an answer names a shape."""

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

    def __call__(
        self, tokens: Sequence[int], about: Pair | None
    ) -> list[tuple[int, ...]]:
        """For each token of an answer, the tokens that are left out in its place.

        Args:
            tokens: of the answer. In a sentence a colour stands before its shape.
            about: of an answer in one word, the pair that is asked about.
        """
        left_out: list[tuple[int, ...]] = [()] * len(tokens)
        for i, token in enumerate(tokens):
            for form in self.forms:
                if token in form:
                    colour = self.colours.get(tokens[i - 1])
                    colour = colour or (about[0] if about else None)
                    left_out[i] = tuple(
                        t for t, shape in form.items() if (colour, shape) in HELD_OUT
                    )
        return left_out

    def table(self, left_out: Sequence[tuple[int, ...]]) -> NDArray[np.float32]:
        """What is added to the scores [tokens, V]."""
        table = np.zeros((len(left_out), self.vocab_size), np.float32)
        for row, tokens in zip(table, left_out, strict=True):
            row[list(tokens)] = OUT
        return table
