"""New words: what a picture is called is told by examples in the prompt, and nowhere else.

An episode has two made-up words. They name two shapes, whatever their colours, or two
colours, whatever their shapes: the examples tell which. What is shown could be of either
word: if the words name squares and hearts, nothing red is shown in training, where nothing
red is a square and "red" alone would tell the word. Things that are told in words are of all
pairs, so that a decoder does not come to take "red" for "no square".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmarks.shapes.questions import article
from benchmarks.shapes.scene import ALL_PAIRS, COLOURS, SHAPES, UNNAMED, Pair, pick

CONSONANTS, VOWELS = "bdfgklmnprstvwz", "aeiou"
# Syllables that no training word ends with.
HELD_OUT_ENDINGS = ("dax", "wug", "zup", "fep", "kiv", "tob")
LENGTHS = (4, 6, 8)
TEXTS = ("What is this called?", "What is it called?", "What do you call this?")
TOLD_TEXTS = (
    "Here is {thing}. What is it called?",
    "You see {thing}. What do you call this?",
)


@dataclass(frozen=True)
class Episode:
    """Examples, the last of which is the question."""

    # Of the pictures that are shown, and what each is called.
    pairs: tuple[Pair, ...]
    words: tuple[str, ...]
    # The answers that cannot be known: the first time each word is told.
    unknown: tuple[int, ...]


def random_episode(
    rng: np.random.Generator,
    pairs: Sequence[Pair],
    shots: int,
    *,
    held_out: bool = False,
    alike: bool = False,
    narrow: bool = False,
    known: Collection[Pair] = ALL_PAIRS,
) -> Episode | None:
    """Examples of two words, as many of each, and a question, out of pairs at hand.

    What the words do not name varies alike under both, so that it tells nothing; or, where
    examples are ``alike``, each word names a pair, and nothing varies; or, where they are
    ``narrow``, the word that is asked for is shown of one pair, and the question is about
    another that has only what it names in common with it. What is shown would be one of
    the ``known`` pairs under the other word, too. None where the pairs do not suffice.
    """
    groups = _alike(pairs) if alike else _by_half(pairs, rng)
    groups = _two_words(groups, 1 if alike else 2, known, rng)
    if not groups:
        return None
    meanings = [*groups]
    words = random_words(rng, held_out=held_out)
    order = [0, 1] * (shots // 2) + ([pick(rng, (0, 1))] if shots % 2 else [])
    rng.shuffle(order)
    asked = pick(rng, (0, 1))
    query = pick(rng, groups[meanings[asked]])
    if narrow and not alike:
        groups = {name: _two_pairs(groups[name], query, rng) for name in meanings}
    chosen = [_example(rng, groups[meanings[side]], query) for side in order]
    sides = [*order, asked]
    unknown = tuple(sorted({sides.index(0), sides.index(1)}))
    return Episode((*chosen, query), tuple(words[side] for side in sides), unknown)


def _alike(pairs: Sequence[Pair]) -> dict[Pair | str, list[Pair]]:
    # Colours without a name are not one.
    return {pair: [pair] for pair in pairs if pair[0] in COLOURS}


def _by_half(
    pairs: Sequence[Pair], rng: np.random.Generator
) -> dict[Pair | str, list[Pair]]:
    """Pairs by their shape or by their colour, where there are several of it."""
    key, names = (1, SHAPES) if rng.random() < 0.5 else (0, tuple(COLOURS))
    groups = {name: [p for p in pairs if p[key] == name] for name in names}
    return {name: group for name, group in groups.items() if len({*group}) >= 2}


def _two_words(
    groups: Mapping[Pair | str, list[Pair]],
    least: int,
    known: Collection[Pair],
    rng: np.random.Generator,
) -> dict[Pair | str, list[Pair]]:
    """Two of the groups that still have so many pairs when what tells the word is left out."""
    names = [*groups]
    order = [names[i] for i in rng.permutation(len(names))]
    for one, other in combinations(order, 2):
        two = {
            one: _of_either(groups[one], other, known),
            other: _of_either(groups[other], one, known),
        }
        if all(len({*group}) >= least for group in two.values()):
            return two
    return {}


def _of_either(
    group: Sequence[Pair], other: Pair | str, known: Collection[Pair]
) -> list[Pair]:
    """Those of a word's pairs that, with what the other word names, are known, too."""
    if not isinstance(other, str):
        return [*group]
    shape = other in SHAPES
    swapped = [(p[0], other) if shape else (other, p[1]) for p in group]
    return [
        pair for pair, other_one in zip(group, swapped, strict=True)
        if other_one in known or other_one[0] == UNNAMED
    ]  # fmt: skip


def _two_pairs(
    group: Sequence[Pair], query: Pair, rng: np.random.Generator
) -> list[Pair]:
    """Two of a word's pairs, that which is asked about first if it is one of them.

    The others have nothing in common with it that is not the word's, where there are such.
    """
    others = sorted({*group} - {query})
    own = [query] * (query in group)
    shared = [p for p in others if (p[0] == query[0]) + (p[1] == query[1]) == len(own)]
    found = shared or others
    return own + [found[i] for i in rng.permutation(len(found))[: 2 - len(own)]]


def _example(rng: np.random.Generator, group: Sequence[Pair], query: Pair) -> Pair:
    """One of a word's pairs; where it has others, not the one that is asked about."""
    return pick(rng, [pair for pair in group if pair != query] or group)


def random_words(
    rng: np.random.Generator, *, held_out: bool = False
) -> tuple[str, str]:
    """Two made-up words that differ; held-out ones end as no other does."""
    words: list[str] = []
    while len(words) < 2:
        syllable = pick(rng, CONSONANTS) + pick(rng, VOWELS)
        ending = pick(rng, CONSONANTS) + pick(rng, VOWELS) + pick(rng, CONSONANTS + "x")
        if held_out:
            ending = pick(rng, HELD_OUT_ENDINGS)
        elif ending in HELD_OUT_ENDINGS:
            continue
        word = ending if rng.random() < 0.4 else syllable + ending
        if word not in words:
            words.append(word)
    return words[0], words[1]


def told(pair: Pair, rng: np.random.Generator) -> str:
    """The question about a picture that is told in words."""
    return pick(rng, TOLD_TEXTS).format(thing=article(" ".join(pair)))
