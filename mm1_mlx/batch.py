"""Several answers at once: each prompt is read by itself, then all are decoded together.

mlx-lm's ``BatchGenerator`` decodes; it takes the caches that prompts with pictures were
read into. An answer is the one that it would have been alone, its seed its own; only
guessing (``prompt_lookup``, ``draft``) is left out, which changes no answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lm.generate import BatchGenerator

from mm1_mlx.answer import Answer, Piece, Settings, join
from mm1_mlx.caches.shared import Prefix
from mm1_mlx.engine import Engine, Request
from mm1_mlx.errors import MM1Error
from mm1_mlx.image import ImageSource
from mm1_mlx.memory.named import Prefix as NamedPrefix
from mm1_mlx.memory.prefixes import KVPrecision, pack
from mm1_mlx.messages import Message
from mm1_mlx.prefill import Cancelled, Shared
from mm1_mlx.runtime import Runtime, wired

# Rows decoded together: on a GPU as fast as one, while weights are what is read.
SIZE = 8
# An answer's own limit ends it before.
_ENDLESS = 1 << 30


@dataclass(frozen=True)
class Ask:
    """One of several questions: what ``stream`` takes."""

    prompt: str | Sequence[Message]
    images: Sequence[ImageSource] = ()
    settings: Settings = field(default_factory=Settings)


class Batch:
    """Answers under way, a token of each a step; all of it on the model's thread.

    Args:
        engine: what answers.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # A batch's caches are of one precision, and begin with one prefix or with none.
        self._groups: dict[tuple[KVPrecision, int | None], _Group] = {}
        self._shared: list[tuple[_Examples, Shared]] = []

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self._groups.values())

    def close(self) -> None:
        """Let the answers under way go."""
        for group in self._groups.values():
            group.rows.clear()
            group.generator.close()

    def add(self, number: int, ask: Ask) -> list[Piece]:
        """Begin an answer; its first pieces.

        Args:
            number: what ``step`` calls it.
            ask: the question.

        Raises:
            PromptError: prompt, pictures, settings and model do not fit together.
        """
        start, shared = time.perf_counter(), self._share(ask.settings)
        request = self._engine.open(
            ask.prompt, ask.images, ask.settings, start, alone=False, shared=shared
        )
        try:
            first = request.first()
        except Cancelled:
            return [request.finish("cancelled")]
        pieces = request.add(first)
        if pieces[-1].finish_reason is not None:
            request.keep()
            return pieces
        # Rows that share a sampler are drawn from at once; greedy ones share the default.
        sampler: Any = None if request.sampler.greedy else request.sampler
        # Packed from its first token on: rows cannot change their kind later.
        precision = replace(request.context.precision, start=0)
        request.context.precision = precision
        if not request.context.shared:
            pack(request.context.cache, precision)
        prefix = id(shared) if request.context.shared else None
        kind = precision, prefix
        if kind not in self._groups:
            self._groups[kind] = _Group(BatchGenerator(self._engine.model))
        group = self._groups[kind]
        (row,) = group.generator.insert(
            [[first]],
            max_tokens=[_ENDLESS],
            caches=[request.context.cache],
            all_tokens=[list(request.context.prompt.tokens)],
            samplers=[sampler],
        )
        group.rows[row] = number, request
        return pieces

    def _share(self, settings: Settings) -> Shared | None:
        """The prefix that all answers with the same examples begin with, read once."""
        if not settings.shots and settings.prefix is None:
            return None
        precision = KVPrecision()
        if settings.kv_bits is not None:
            precision = KVPrecision(settings.kv_bits, settings.kv_group_size)
        examples = _Examples(
            settings.prefix,
            tuple(settings.shots),
            settings.shot_style,
            settings.tiled,
            precision,
        )
        for known, shared in self._shared:
            if known == examples:
                return shared
        context = self._engine.read_prefix(
            examples.prefix(self._engine), precision, tiled=settings.tiled
        )
        pack(context.cache, precision)
        shared = Shared(
            context.prompt.positions, [Prefix(layer) for layer in context.cache]
        )
        self._shared.append((examples, shared))
        return shared

    def step(self) -> list[tuple[int, Piece]]:
        """The next pieces of all answers under way, with the numbers of these."""
        return [came for group in self._groups.values() for came in group.step()]


@dataclass(frozen=True)
class _Examples:
    """What stands before a question, as far as the settings say it."""

    name: str | None
    shots: tuple[Any, ...]
    style: str
    tiled: int | None
    precision: KVPrecision

    def prefix(self, engine: Engine) -> NamedPrefix:
        if self.name is not None:
            return engine.named.find(self.name)
        return NamedPrefix("", shots=self.shots, shot_style=self.style)


@dataclass
class _Group:
    """Answers whose caches are of one kind, by mlx-lm's numbers of their rows."""

    generator: BatchGenerator
    rows: dict[int, tuple[int, Request]] = field(default_factory=dict)

    def step(self) -> Iterator[tuple[int, Piece]]:
        if not self.rows:
            return
        ended = []
        for response in self.generator.next_generated():
            number, request = self.rows[response.uid]
            pieces = request.add(response.token)
            yield from ((number, piece) for piece in pieces)
            if pieces[-1].finish_reason is not None:
                ended.append(response.uid)
        if not ended:
            return
        caches = self.generator.remove(ended, return_prompt_caches=True)
        for row in ended:
            self.rows.pop(row)[1].keep(caches[row][0])


def stream_batch(
    runtime: Runtime, asks: Iterable[Ask], *, size: int = SIZE
) -> Iterator[tuple[int, Piece | MM1Error]]:
    """The pieces of many answers as they come, each with its question's number.

    A question that cannot be asked gives one error in place of pieces, and the others go
    on.

    Args:
        runtime: from ``load``.
        asks: the questions, read one by one on the model's thread as answers end.
        size: how many answers are under way at once.
    """
    return runtime.run(lambda: _answers(runtime.engine, iter(asks), size))


def generate_batch(
    runtime: Runtime, asks: Iterable[Ask], *, size: int = SIZE
) -> list[Answer | MM1Error]:
    """All the answers, in the order of the questions; as ``stream_batch`` gives them."""
    pieces: dict[int, list[Piece]] = {}
    answers: dict[int, Answer | MM1Error] = {}
    for number, piece in stream_batch(runtime, asks, size=size):
        if isinstance(piece, MM1Error):
            answers[number] = piece
            continue
        pieces.setdefault(number, []).append(piece)
        if piece.finish_reason is not None:
            answers[number] = join(pieces.pop(number))
    return [answers[number] for number in sorted(answers)]


def _answers(
    engine: Engine, asks: Iterator[Ask], size: int
) -> Iterator[tuple[int, Piece | MM1Error]]:
    waiting = enumerate(asks)
    batch = Batch(engine)
    more = True
    try:
        with wired():
            while more or len(batch):
                while more and len(batch) < size:
                    number, ask = next(waiting, (-1, None))
                    if ask is None:
                        more = False
                        break
                    try:
                        began = batch.add(number, ask)
                    except MM1Error as error:
                        yield number, error
                        continue
                    yield from ((number, piece) for piece in began)
                if len(batch):
                    yield from batch.step()
    finally:
        batch.close()
