"""What a text names, and where it is: "the red star", "the star", "red"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.scene import COLOURS, SHAPES, Object, Scene
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.sample import Batch

NOUNS = ("object", "shape", "one")


@dataclass(frozen=True)
class Mentions:
    """Tokens at which one object is meant, and where that object is."""

    # [M], counted through the flattened rows [B * T].
    tokens: NDArray[np.int32]
    # [M, 2]: x and y, -0.5 to 0.5 across the square that the encoder sees.
    places: NDArray[np.float32]


NO_MENTIONS = Mentions(np.zeros(0, np.int32), np.zeros((0, 2), np.float32))


class MentionFinder:
    """Finds what is named, where one object alone answers to it.

    Of a question that is the token that ends the name. Of an answer, ``ahead``, it is the
    two before it, at which a pair is still to be named: "a" and "red" of "a red star".
    """

    def __init__(self, tokenizer: Tokenizer, *, ahead: bool = False) -> None:
        self.ahead = ahead

        def tokens(words: Sequence[str]) -> dict[int, str]:
            encoded = {
                word: tokenizer.hf.encode(f" {word}", add_special_tokens=False)
                for word in words
            }
            return {ids[0]: word for word, ids in encoded.items() if len(ids) == 1}

        self.colours = tokens(tuple(COLOURS))
        self.shapes = tokens(SHAPES)
        self.nouns = tokens(NOUNS)

    def __call__(self, rows: Batch, scenes: Sequence[Scene | None]) -> Mentions:
        """The mentions in rows of conversations, each about the scene beside it, if one."""
        names = [*self.colours, *self.shapes, *self.nouns]
        T = rows.tokens.shape[1]
        tokens, places = [], []
        for b, t in np.argwhere(np.isin(rows.tokens, names)).tolist():
            scene, row, said = scenes[b], rows.tokens[b], rows.learned[b]
            if not scene or (said[t] and not (self.ahead and self._is_pair(row, t))):
                continue
            item = self._named(row, t, scene)
            if item:
                at = (t - 2, t - 1) if said[t] else (t,)
                tokens += [b * T + i for i in at]
                places += [place(scene, item)] * len(at)
        return Mentions(
            np.array(tokens, np.int32), np.array(places, np.float32).reshape(-1, 2)
        )

    def _is_pair(self, row: NDArray[np.int32], t: int) -> bool:
        """Whether a colour and its shape end at ``t``."""
        return int(row[t]) in self.shapes and int(row[t - 1]) in self.colours

    def _named(self, row: NDArray[np.int32], t: int, scene: Scene) -> Object | None:
        """The only object that the name which ends at ``t`` fits, if a name does."""
        token, before, after = int(row[t]), int(row[t - 1]), int(row[t + 1])
        if token in self.colours:
            if after in self.shapes or after in self.nouns:
                return None
            colour, shape = self.colours[token], None
        else:
            colour, shape = self.colours.get(before), self.shapes.get(token)
        if colour is None and shape is None:
            return None
        fitting = [
            item
            for item in scene.objects
            if colour in (None, item.colour) and shape in (None, item.shape)
        ]
        return fitting[0] if len(fitting) == 1 else None


def place(scene: Scene, item: Object) -> tuple[float, float]:
    """Where an object is across the square in whose middle the picture stands."""
    side = max(scene.width, scene.height)
    return (item.x - scene.width / 2) / side, (item.y - scene.height / 2) / side
