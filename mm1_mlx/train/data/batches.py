"""Examples of a mixture -> batches: rows of tokens, what is learned, pictures as tiles.

A batch is a pure function of step and shard. Worker threads read rows and decode their
pictures side by side; how many there are changes no batch.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, DataError, PromptError
from mm1_mlx.image import DECODERS, DEFAULT_LIMITS, load_pictures
from mm1_mlx.layout import Picture
from mm1_mlx.messages import Turn
from mm1_mlx.regions import refer
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.data.example import Example, located
from mm1_mlx.train.data.mixture import Mixture
from mm1_mlx.train.sample import (
    Batch,
    Row,
    Sample,
    build_document,
    build_samples,
    pack,
    stack,
    widen_sample,
)

# What an example may bring: more than a question, for pictures are decoded one by one and
# the row's length bounds what it can show.
LIMITS = replace(
    DEFAULT_LIMITS,
    max_pictures=256,
    max_total_pixels=256 * DEFAULT_LIMITS.max_pixels,
)
# Bad rows that are passed over for one position before a data set is given up.
MOST_SKIPPED = 1000
# How many of the bad rows are kept to be shown.
_SHOWN = 5


class Run(Protocol):
    """What of a training run its batches depend on."""

    @property
    def batch_size(self) -> int:
        """Examples of a micro-batch."""
        ...

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, in all processes together."""
        ...

    @property
    def max_length(self) -> int:
        """Positions of the longest example."""
        ...

    @property
    def truncate(self) -> bool:
        """Whether what is too long is cut, never within or before a picture.

        Else it is a bad row.
        """
        ...

    @property
    def packing(self) -> bool:
        """Whether a micro-batch's examples stand behind one another in one row."""
        ...

    @property
    def skip_bad(self) -> bool:
        """Whether rows that cannot be used are passed over."""
        ...


@dataclass(frozen=True)
class Prepared:
    """An example as the model will see it: rows, which may share pictures."""

    example: Example
    rows: tuple[Row, ...]
    pictures: tuple[Picture, ...]


class Skipped:
    """The bad rows that were passed over.

    Attributes:
        count: how many different ones.
        first: the first few of their errors.
    """

    def __init__(self, report: Callable[[DataError], None] | None) -> None:
        self.count = 0
        self.first: list[str] = []
        self._report = report
        self._known: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def add(self, row: tuple[int, int], error: DataError) -> None:
        """Count a data set's row, once, and report it."""
        with self._lock:
            # What is wrong may be said in other words with another prompt.
            if row in self._known:
                return
            self._known.add(row)
            self.count += 1
            if len(self.first) < _SHOWN:
                self.first.append(str(error))
        if self._report:
            self._report(error)


class Batches:
    """The batch of (step, shard).

    Args:
        mixture: the examples.
        config: the model's.
        tokenizer: the model's.
        run: how many examples, how long, and what becomes of bad ones.
        threads: that decode pictures side by side; None for as many as the processor
            has, up to ``image.DECODERS``.
        report: is told of every row that is passed over.

    Attributes:
        skipped: the rows that were passed over. Instead of one comes the next of its
            data set's order that can be used.

    Raises:
        ConfigError: examples would not be alone in a packed row.
    """

    def __init__(
        self,
        mixture: Mixture,
        config: MM1Config,
        tokenizer: Tokenizer,
        run: Run,
        *,
        threads: int | None = None,
        report: Callable[[DataError], None] | None = None,
    ) -> None:
        moe = config.decoder.moe if config.decoder else None
        if run.packing and moe and moe.capacity_factor is not None:
            raise ConfigError(
                f"decoder.moe.capacity_factor is {moe.capacity_factor}: all examples of a "
                "packed row would compete for an expert's places, and each change the "
                "others; train without packing, or set it to null"
            )
        self.mixture = mixture
        self.skipped = Skipped(report)
        self._config = config
        self._tokenizer = tokenizer
        self._run = run
        # Of a row: where the decoder's positions end it would learn what it never reads.
        self._most = run.max_length
        if config.decoder is not None:
            self._most = min(self._most, config.decoder.max_position_embeddings)
        # More characters than these are too many tokens, whatever they are.
        self._most_text = self._most * max(map(len, tokenizer.vocabulary))
        threads = threads or min(DECODERS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mm1-data")

    def __call__(self, step: int, shard: int) -> Batch:
        """The batch of a micro-batch of a step.

        Raises:
            DataError: a row cannot be used, and bad ones are not passed over.
        """
        size = self._run.batch_size
        first = (step * self._run.micro_batches + shard) * size
        prepared = self.prepare(range(first, first + size))
        numbers = itertools.count()
        rows: list[Row] = []
        places: list[list[int]] = []
        for each in prepared:
            own = [next(numbers) for _ in each.pictures]
            rows += each.rows
            places += [own] * len(each.rows)
        pictures = [picture for each in prepared for picture in each.pictures]
        join = pack if self._run.packing else stack
        return join(rows, places, pictures)

    def prepare(self, positions: Sequence[int]) -> list[Prepared]:
        """The examples at the mixture's positions, or those that come instead.

        Raises:
            DataError: as of a call.
        """
        reading = [self._pool.submit(self._read, p, 0) for p in positions]
        try:
            return [
                self._prepared(position, future)
                for position, future in zip(positions, reading, strict=True)
            ]
        finally:
            for future in reading:
                future.cancel()

    def _prepared(self, position: int, reading: Future[_Read]) -> Prepared:
        dataset = self.mixture.dataset_at(position)
        # The next pass has another order: its last row may be the only one to use.
        most = min(2 * len(dataset) - 1, MOST_SKIPPED)
        for attempt in range(most):
            try:
                read = (
                    reading.result() if attempt == 0 else self._read(position, attempt)
                )
                return self._build(read)
            except DataError as error:
                if not self._run.skip_bad:
                    raise
                self.skipped.add(self.mixture.row_at(position, attempt), error)
        raise DataError(
            f"{min(most, len(dataset))} rows of {dataset.spec.title} behind one another cannot be used, the "
            f"first is {self.skipped.first[0]}"
        )

    def _read(self, position: int, attempt: int) -> _Read:
        """What takes time and no tokenizer; runs in several threads."""
        example = self.mixture.substitute(position, attempt)
        with located(example.origin):
            turns, pictures = refer_example(example, self._config)
        return _Read(example, turns, pictures)

    def _build(self, read: _Read) -> Prepared:
        example, config = read.example, self._config
        turns = self._shorten(read.turns, example)
        # A typed special token joins the tokenizer's vocabulary: one thread at a time.
        with located(example.origin), _TOKENIZING:
            if example.kind == "document":
                samples = [build_document(turns[0][1], config, self._tokenizer)]
            else:
                samples = build_samples(
                    turns, config, self._tokenizer, example.unlearned
                )
            rows = self._fit([self._widened(x, read.pictures) for x in samples])
            return Prepared(example, rows, _seen(read.pictures, rows))

    def _widened(self, sample: Sample, pictures: Sequence[Picture]) -> Row:
        """The row of a sample, which shows the first pictures of its example or all."""
        shown = sample.tokens.count(self._tokenizer.image_id)
        if sample.regions and max(sample.regions) >= shown:
            raise PromptError(
                f"it refers to picture {max(sample.regions) + 1} before that is shown; "
                "put the picture first"
            )
        return widen_sample(sample, pictures[:shown], self._config, self._tokenizer)

    def _shorten(self, turns: list[Turn], example: Example) -> list[Turn]:
        """The turns, a book not written out in tokens only to be refused or cut."""
        texts = [part for _, parts in turns for part in parts if isinstance(part, str)]
        length = sum(map(len, texts))
        if length <= self._most_text:
            return turns
        if not self._run.truncate:
            raise DataError(
                f"{example.origin}: it has {length} characters, more than "
                f"{self._most} tokens can be; {self._way_out}"
            )
        if example.kind == "document" and isinstance(turns[0][1][-1], str):
            role, parts = turns[0]
            return [(role, [*parts[:-1], texts[-1][: self._most_text]])]
        return turns

    @property
    def _way_out(self) -> str:
        """What can be done about a row that is too long."""
        if self._most < self._run.max_length:
            return (
                "the decoder's context holds no more; have such rows cut (--truncate), "
                "or leave them out (--skip-bad)"
            )
        return "allow longer examples (--max-length), or have them cut (--truncate)"

    def _fit(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """The rows, none longer than allowed, of which something is learned."""
        kept = []
        for row in rows:
            length, most = len(row.tokens), self._most
            if length > most:
                if not self._run.truncate:
                    seen = sum(span.length for span in row.spans)
                    raise PromptError(
                        f"it has {length} tokens, {seen} of them of pictures, expected "
                        f"at most {most}; {self._way_out}"
                    )
                row = row.until(most)
            # The first token is a target of nothing.
            if any(row.learned[1:]):
                kept.append(row)
        if not kept:
            raise PromptError(f"nothing of its first {self._most} tokens is learned")
        return tuple(kept)


def _seen(pictures: Sequence[Picture], rows: Sequence[Row]) -> tuple[Picture, ...]:
    """The pictures that rows show, each with the regions that are referred to there."""
    spans = [[s for s in row.spans if s.kind != "region"] for row in rows]
    count = max((s.picture + 1 for held in spans for s in held), default=0)
    referred = [
        Counter(s.picture for s in row.spans if s.kind == "region") for row in rows
    ]
    return tuple(
        replace(picture, regions=picture.regions[: max(row[i] for row in referred)])
        for i, picture in enumerate(pictures[:count])
    )


@dataclass(frozen=True)
class _Read:
    """An example with its pictures decoded and its regions written."""

    example: Example
    turns: list[Turn]
    pictures: list[Picture]


# Batches of several mixtures may share a tokenizer.
_TOKENIZING = threading.Lock()


def refer_example(
    example: Example, config: MM1Config
) -> tuple[list[Turn], list[Picture]]:
    """The example's turns as the model is shown them, and its pictures.

    A region in an answer is what the assistant says of it: its coordinates. One in a
    question is, to a model with a region sampler, a token too, as it is when asked.

    Raises:
        PromptError: a picture or a region cannot be used.
    """
    if not example.images:
        return refer(example.turns, [], config)
    if config.image is None or not config.sees:
        raise PromptError(
            f"it has {len(example.images)} picture(s), but the model takes text only"
        )
    pictures = load_pictures(example.images, config.image, LIMITS)
    said, _ = refer(example.turns, pictures, replace(config, region=None))
    turns = [
        answer if answer[0] == "assistant" else turn
        for turn, answer in zip(example.turns, said, strict=True)
    ]
    return refer(turns, pictures, config)
