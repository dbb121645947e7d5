"""Captions and those that people wrote -> CIDEr-D of each picture.

Vedantam et al., arXiv 1411.5726, as COCO's evaluation computes it: n-grams of 1 to 4
words weigh the more, the fewer pictures' references have them; repeating one gains
nothing, and another length than a reference's costs. No mlx.

Source: https://github.com/salaniz/pycocoevalcap/blob/ad63453cfab57a81a02b2949b17a91fab1c3df77/cider/cider_scorer.py
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mm1_mlx.eval.treebank import words

LONGEST = 4
SIGMA = 6.0

NGram = tuple[str, ...]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; a paper's 100 is 1.

    How rare an n-gram is, is counted in these references: scores of few pictures are not
    those of the whole data set, and of a single picture they are 0.

    Args:
        captions: the model's, one a picture.
        references: people's, at least one a picture.
    """
    counted = [[_count(text) for text in texts] for texts in references]
    pictures = Counter(ngram for texts in counted for ngram in set().union(*texts))
    rarity = _Rarity(pictures, math.log(len(references)))
    return [
        _score(rarity.weigh(_count(caption)), [rarity.weigh(text) for text in texts])
        for caption, texts in zip(captions, counted, strict=True)
    ]


def _count(text: str) -> Counter[NGram]:
    """How often each n-gram stands in a text."""
    said = words(text)
    return Counter(
        tuple(said[i : i + n])
        for n in range(1, LONGEST + 1)
        for i in range(len(said) - n + 1)
    )


@dataclass(frozen=True)
class _Weighed:
    """A text's n-grams with their weights, by length, and how many pairs of words it has.

    What upstream takes for a text's length is its number of pairs.
    """

    weights: tuple[dict[NGram, float], ...]
    norms: tuple[float, ...]
    pairs: int


@dataclass(frozen=True)
class _Rarity:
    """In how many pictures' references an n-gram stands, and the logarithm of how many."""

    pictures: Counter[NGram]
    log_all: float

    def weigh(self, counts: Counter[NGram]) -> _Weighed:
        """The counts times the logarithm of all pictures by those with the n-gram."""
        weights: tuple[dict[NGram, float], ...] = tuple({} for _ in range(LONGEST))
        for ngram, count in counts.items():
            rare = self.log_all - math.log(max(1, self.pictures[ngram]))
            weights[len(ngram) - 1][ngram] = count * rare
        norms = tuple(math.hypot(*held.values()) for held in weights)
        pairs = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return _Weighed(weights, norms, pairs)


def _score(caption: _Weighed, references: Sequence[_Weighed]) -> float:
    total = sum(_similarity(caption, reference) for reference in references)
    return 10 * total / len(references)


def _similarity(caption: _Weighed, reference: _Weighed) -> float:
    """The mean over lengths of clipped cosines, less for another length of the text."""
    total = 0.0
    for n in range(LONGEST):
        held, known = caption.weights[n], reference.weights[n]
        norm = caption.norms[n] * reference.norms[n]
        if norm:
            dot = sum(
                min(weight, known[ngram]) * known[ngram]
                for ngram, weight in held.items()
                if ngram in known
            )
            total += dot / norm
    difference = caption.pairs - reference.pairs
    return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))
