"""What a run will learn from, before it begins: numbers, and one row in full."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from statistics import median

from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.data.batches import Batches, Prepared
from mm1_mlx.train.sample import Row

# How many examples are prepared for it.
SAMPLED = 64


@dataclass(frozen=True)
class Spread:
    """The least, the middle and the most of several numbers."""

    least: int
    middle: float
    most: int

    def __str__(self) -> str:
        return f"{self.least} / {self.middle:g} / {self.most}"


@dataclass(frozen=True)
class Preview:
    """What a mixture holds, from its first examples.

    Attributes:
        rows: of every data set, by its name.
        shares: of every data set in the mixture, 0..1.
        sampled: how many examples the rest is of.
        tokens: of an example, those of pictures included.
        image_tokens: of an example.
        pictures: of an example.
        learned: share of all tokens that are learned, 0..1.
        skipped: bad rows that were passed over.
        bad: the first few of them, and why.
        shown: the first example in stretches: whether it is learned, and its text.
        origin: its file and row.
        longest: position in the mixture of the example with the most tokens.
    """

    rows: dict[str, int]
    shares: dict[str, float]
    sampled: int
    tokens: Spread
    image_tokens: Spread
    pictures: Spread
    learned: float
    skipped: int
    bad: tuple[str, ...]
    shown: tuple[tuple[bool, str], ...]
    origin: str
    longest: int

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        lines = [
            f"{name:{width}}  {rows:>11,} rows  {self.shares[name]:>6.1%} of the mixture"
            for name, rows in self.rows.items()
        ]
        lines += [
            f"of the first {self.sampled} examples, least / median / most:",
            f"  tokens        {self.tokens}",
            f"  image tokens  {self.image_tokens}",
            f"  pictures      {self.pictures}",
            f"  learned       {self.learned:.1%} of the tokens",
        ]
        if self.skipped:
            lines.append(f"{self.skipped} bad rows were passed over:")
            lines += [f"  {text}" for text in self.bad]
        text = "".join(f"[[{text}]]" if own else text for own, text in self.shown)
        return "\n".join(
            [*lines, f"{self.origin}, what is learned in [[ ]]:", text.rstrip()]
        )


def preview(batches: Batches, tokenizer: Tokenizer, count: int = SAMPLED) -> Preview:
    """A preview from the first ``count`` examples, fewer where there are no more rows.

    Raises:
        DataError: a row cannot be used, and bad ones are not passed over.
    """
    mixture = batches.mixture
    count = min(count, len(mixture))
    prepared: list[Prepared] = []
    # A few at a time: decoded pictures are large.
    for first in range(0, count, 8):
        for each in batches.prepare(range(first, min(count, first + 8))):
            # All but the first are only counted.
            prepared.append(each if not prepared else _without_tiles(each))
    names = [dataset.spec.title for dataset in mixture.datasets]
    total = sum(mixture.weights)
    tokens = [sum(len(row.tokens) for row in each.rows) for each in prepared]
    learned = sum(sum(row.learned) for each in prepared for row in each.rows)
    return Preview(
        rows=dict(zip(names, map(len, mixture.datasets), strict=True)),
        shares={n: w / total for n, w in zip(names, mixture.weights, strict=True)},
        sampled=count,
        tokens=_spread(tokens),
        image_tokens=_spread([_image_tokens(each) for each in prepared]),
        pictures=_spread([len(each.example.images) for each in prepared]),
        learned=learned / sum(tokens),
        skipped=batches.skipped.count,
        bad=tuple(batches.skipped.first),
        shown=show(prepared[0], tokenizer),
        origin=prepared[0].example.origin,
        longest=max(range(count), key=tokens.__getitem__),
    )


def show(prepared: Prepared, tokenizer: Tokenizer) -> tuple[tuple[bool, str], ...]:
    """Rows in stretches: whether it is learned, and its text; pictures as their length."""
    stretches = _stretches(prepared.rows[0], tokenizer)
    for row in prepared.rows[1:]:
        stretches += [(False, "\n"), *_stretches(row, tokenizer)]
    return tuple(stretches)


def _stretches(row: Row, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    spans = {
        position: span
        for span in row.spans
        for position in range(span.start, span.stop)
    }
    marks = [(learned, spans.get(i)) for i, learned in enumerate(row.learned)]
    stretches = []
    for (learned, span), group in groupby(range(len(marks)), key=marks.__getitem__):
        held = [row.tokens[i] for i in group]
        if span is None:
            text = tokenizer.hf.decode(held)
        else:
            text = f"<{span.kind} {span.picture + 1}: {len(held)} tokens>"
        stretches.append((learned, text))
    return stretches


def _image_tokens(prepared: Prepared) -> int:
    return sum(span.length for row in prepared.rows for span in row.spans)


def _without_tiles(prepared: Prepared) -> Prepared:
    return Prepared(prepared.example, prepared.rows, ())


def _spread(numbers: list[int]) -> Spread:
    return Spread(min(numbers), median(numbers), max(numbers))
