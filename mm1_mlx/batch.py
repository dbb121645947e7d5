"""Several answers at once: each prompt is read by itself, then all are decoded together.

mlx-lm's ``BatchGenerator`` decodes; it takes the caches that prompts with pictures were
read into. An answer is the one that it would have been alone, up to the rounding of
several rows at once, its seed its own; only guessing (``prompt_lookup``, ``draft``) is
left out, which changes none but for the same rounding.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mlx_lm.generate import BatchGenerator
from mlx_lm.models import cache as mlx_lm

from mm1_mlx.answer import Answer, Piece, Settings, join
from mm1_mlx.budget import kv_bytes
from mm1_mlx.caches.quantized import KVCache
from mm1_mlx.caches.shared import Prefix
from mm1_mlx.engine import Engine, Plan
from mm1_mlx.errors import MemoryLimitError, MM1Error
from mm1_mlx.image import DECODERS, ImageSource
from mm1_mlx.memory.named import Prefix as NamedPrefix
from mm1_mlx.memory.prefixes import KVPrecision, pack
from mm1_mlx.messages import Message
from mm1_mlx.prefill import Cancelled, Shared
from mm1_mlx.request import Request
from mm1_mlx.runtime import Runtime, wired

# Rows decoded together: on a GPU as fast as one, while weights are what is read.
SIZE = 8
# Shared prefixes that are kept while no answer behind them is under way.
IDLE_PREFIXES = 1
# Examples that are known again.
MET = 2 * SIZE
# An answer's own limit ends it before.
_ENDLESS = 1 << 30
_END = object()


@dataclass(frozen=True)
class Ask:
    """One of several questions: what ``stream`` takes."""

    prompt: str | Sequence[Message]
    images: Sequence[ImageSource] = ()
    settings: Settings = field(default_factory=Settings)

    def plan(self, engine: Engine) -> Plan:
        """The question made ready.

        Raises:
            PromptError: prompt, pictures, settings and model do not fit together.
        """
        return engine.plan(self.prompt, self.images, self.settings)


@dataclass(frozen=True)
class _Begun(Ask):
    """A question that a thread is making ready."""

    made: Future[Plan] | None = None

    def plan(self, engine: Engine) -> Plan:  # noqa: ARG002
        assert self.made is not None
        return self.made.result()


class Batch:
    """Answers under way, a token of each a step; all of it on the model's thread.

    Args:
        engine: what answers.
        gone: set when nobody listens any more.
    """

    def __init__(self, engine: Engine, gone: threading.Event | None = None) -> None:
        self._engine = engine
        self._gone = gone
        # Caches that are decoded together are of one kind: packed or not, and behind one
        # shared prefix or none.
        self._groups: dict[tuple[bool, int | None], _Group] = {}
        # Used last, last.
        self._shared: list[tuple[_Examples, Shared]] = []
        # What answers came with of late.
        self._met: deque[_Examples] = deque(maxlen=MET)

    def __len__(self) -> int:
        return sum(len(group.rows) for group in self._groups.values())

    def close(self) -> None:
        """Let the answers under way go."""
        for group in self._groups.values():
            group.rows.clear()
            group.generator.close()
        self._groups.clear()
        self._shared.clear()
        self._met.clear()

    def add(self, number: int, ask: Ask) -> list[Piece]:
        """Begin an answer; its first pieces.

        Args:
            number: what ``step`` calls it.
            ask: the question.

        Raises:
            PromptError: prompt, pictures, settings and model do not fit together.
        """
        start = time.perf_counter()
        plan = ask.plan(self._engine)
        return self.begin(number, plan, start, gone=self._gone)

    def begin(
        self,
        number: int,
        plan: Plan,
        start: float,
        *,
        gone: threading.Event | None = None,
        again: bool = False,
        between: Callable[[], None] | None = None,
    ) -> list[Piece]:
        """Begin an answer to a question that was made ready; its first pieces.

        Args:
            number: what ``step`` calls it.
            plan: the question.
            start: when it was asked for, by ``time.perf_counter``.
            gone: set when nobody listens to this answer any more.
            again: whether the same prompt will be answered once more, so that what is
                computed of it is kept for that.
            between: called behind every picture and every part of a long prompt; it
                may ``step``, and raise ``Cancelled`` if nobody wants the answer.

        Raises:
            PromptError: settings and model do not fit together.
            MemoryLimitError: it will not fit beside those under way.
            Cancelled: before its pictures were encoded.
        """
        promised = self._promised()
        shared, new = self._share(plan.asked.settings, promised, between)
        request = self._engine.open(
            plan,
            start,
            alone=False,
            shared=shared,
            promised=promised,
            gone=gone,
            between=between,
        )
        try:
            pieces = request.add(request.first(between))
        except Cancelled:
            request.keep()
            return [request.finish("cancelled")]
        if pieces[-1].finish_reason is not None:
            request.keep()
            return pieces
        prefix = id(shared) if request.context.shared else None
        cache = request.context.cache
        if again or new:
            request.keep(cache)
        self._insert(_Row(number, request, prefix), cache)
        return pieces

    def step(self) -> Iterator[tuple[int, Piece | MM1Error]]:
        """The next pieces of all answers under way, with the numbers of these.

        Behind the last of them, which has to be taken, answers that have ended leave, for
        which nobody who reads them need wait.
        """
        groups = [*self._groups.values()]
        for group in groups:
            yield from group.step()
        for group in groups:
            group.let_go()
            for row, cache in group.take_grown():
                self._insert(row, cache)
        self._tidy()

    def _promised(self) -> int:
        """Bytes that the answers under way will still take, at their longest.

        Rows are padded to the longest, and held twice while one more joins them.
        """
        config = self._engine.config.decoder
        assert config is not None
        total = 0
        for group in self._groups.values():
            requests = [row.request for row in group.rows.values()]
            if not requests:
                continue
            longest = max(len(r.context.prompt.tokens) + r.max_tokens for r in requests)
            size = self._engine.model.decoder.norm.weight.dtype.size
            grown = kv_bytes(config, longest, size) * len(requests)
            held = group.generator.prompt_cache_nbytes
            total += max(grown // self._engine.model.processes, held)
        return total

    def _insert(self, row: _Row, cache: list[Any]) -> None:
        """Decode an answer with those whose caches are of its kind."""
        kind = hasattr(_own(cache[0]), "bits"), row.prefix
        if kind not in self._groups:
            self._groups[kind] = _Group(BatchGenerator(self._engine.model), kind[0])
        self._groups[kind].insert(row, cache)

    def _share(
        self,
        settings: Settings,
        promised: int,
        between: Callable[[], None] | None,
    ) -> tuple[Shared | None, bool]:
        """The prefix that answers with the same examples share from the second one on.

        With it, whether the examples are new here. Nobody else may come with them: such an
        answer is decoded with those that have none, and what is known of its prompt is the
        prefix of the next one.
        """
        if not settings.shots and settings.prefix is None:
            return None, False
        precision = self._engine.precision(settings)
        examples = _Examples(
            settings.prefix,
            tuple(settings.shots),
            settings.shot_style,
            settings.tiled,
            precision,
        )
        for i, (known, shared) in enumerate(self._shared):
            if known == examples:
                self._shared.append(self._shared.pop(i))
                return shared, False
        if examples not in self._met:
            self._met.append(examples)
            return None, True
        self._tidy()
        context = self._engine.read_prefix(
            examples.prefix(self._engine),
            precision,
            tiled=settings.tiled,
            known=settings.prefix is not None,
            promised=promised,
            between=between,
        )
        pack(context.cache, precision)
        positions = context.prompt.positions
        shared = Shared(positions, [Prefix(layer) for layer in context.cache])
        # For answers that come when this batch is over; the arrays are the same.
        self._engine.prefixes.keep(positions, context.cache, precision)
        self._shared.append((examples, shared))
        return shared, False

    def _tidy(self) -> None:
        """Let go of prefixes that nobody needs, those used longest ago first."""
        used = {
            row.prefix for group in self._groups.values() for row in group.rows.values()
        }
        idle = [shared for _, shared in self._shared if id(shared) not in used]
        dropped = {id(shared) for shared in idle[: len(idle) - IDLE_PREFIXES]}
        if not dropped:
            return
        self._shared = [held for held in self._shared if id(held[1]) not in dropped]
        for kind in [kind for kind in self._groups if kind[1] in dropped]:
            self._groups.pop(kind).generator.close()


@dataclass
class _Row:
    """An answer among others.

    Attributes:
        number: what the caller calls it.
        request: the answer.
        prefix: which shared prefix its cache begins with, or None.
    """

    number: int
    request: Request
    prefix: int | None


@dataclass
class _Group:
    """Answers whose caches are of one kind, by mlx-lm's numbers of their rows."""

    generator: BatchGenerator
    packed: bool
    rows: dict[int, _Row] = field(default_factory=dict)
    # Rows that leave it next.
    ended: list[int] = field(default_factory=list)

    def insert(self, row: _Row, cache: list[Any]) -> None:
        """Go on with an answer whose last token the cache does not hold yet."""
        request = row.request
        # Rows that share a sampler are drawn from at once; greedy ones share the default.
        sampler: Any = None if request.sampler.plain else request.sampler
        (number,) = self.generator.insert(
            [request.drawn[-1:]],
            max_tokens=[_ENDLESS],
            caches=[cache],
            all_tokens=[list(request.context.prompt.tokens)],
            samplers=[sampler],
        )
        # The batch holds a copy.
        request.context.cache = []
        self.rows[number] = row

    def step(self) -> list[tuple[int, Piece | MM1Error]]:
        """The next pieces of all its answers."""
        if not self.rows:
            return []
        came: list[tuple[int, Piece | MM1Error]] = []
        for response in self.generator.next_generated():
            row = self.rows[response.uid]
            try:
                pieces = row.request.add(response.token)
            except MM1Error as error:
                # The others go on.
                came.append((row.number, error))
                self.ended.append(response.uid)
                continue
            came += [(row.number, piece) for piece in pieces]
            if pieces[-1].finish_reason is not None:
                self.ended.append(response.uid)
        return came

    def let_go(self) -> None:
        """Answers that have ended leave; what was computed of them is kept."""
        ended, self.ended = self.ended, []
        for row, cache in self._take(ended):
            row.request.keep(cache)

    def take_grown(self) -> list[tuple[_Row, list[Any]]]:
        """The answers that are long enough by now to be packed, with packed caches.

        A step is always under way: what it read unpacked is read again.
        """
        grown = [
            number for number, row in self.rows.items()
            if not self.packed and row.request.length > row.request.context.precision.limit
        ]  # fmt: skip
        taken = self._take(grown)
        for row, cache in taken:
            for i, layer in enumerate(cache):
                layer.trim(1)
                cache[i] = _ours(_own(layer, whole=True))
            pack(cache, row.request.context.precision)
            row.request.sampler.rewind(1)
            row.request.context.shared, row.prefix = False, None
        return taken

    def _take(self, numbers: list[int]) -> list[tuple[_Row, list[Any]]]:
        """Rows that leave, with their caches."""
        if not numbers:
            return []
        caches = self.generator.remove(numbers, return_prompt_caches=True)
        return [
            (self.rows.pop(number), [_ours(layer) for layer in caches[number][0]])
            for number in numbers
        ]


def _ours(layer: Any) -> Any:
    """A cache whose packed form can be batched; mlx-lm's batches give its own kind."""
    return KVCache.from_state(layer.state) if type(layer) is mlx_lm.KVCache else layer


def _own(layer: Any, *, whole: bool = False) -> Any:
    """What a cache holds behind its shared prefix, or the ``whole`` of it unshared."""
    joined = getattr(layer, "joined", None)
    if joined is None:
        return layer
    return joined() if whole else layer.suffix


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


def made_ready(
    runtime: Runtime, asks: Iterable[Ask], *, ahead: int = DECODERS
) -> Iterator[Ask]:
    """The questions, whose pictures are decoded by threads while others are answered.

    Args:
        runtime: from ``load``.
        asks: the questions.
        ahead: how many are made ready before they are asked.
    """
    engine, waiting = runtime.engine, iter(asks)
    begun: deque[_Begun] = deque()
    with ThreadPoolExecutor(ahead, thread_name_prefix="mm1-ready") as pool:
        while True:
            for ask in islice(waiting, ahead - len(begun)):
                made = pool.submit(ask.plan, engine)
                begun.append(_Begun(ask.prompt, ask.images, ask.settings, made))
            if not begun:
                return
            yield begun.popleft()


def stream_batch(
    runtime: Runtime, asks: Iterable[Ask | None], *, size: int = SIZE
) -> Iterator[tuple[int, Piece | MM1Error]]:
    """The pieces of many answers as they come, each with its question's number.

    A question that cannot be asked gives one error in place of pieces, and the others go
    on.

    Args:
        runtime: from ``load``.
        asks: the questions, read one by one on the model's thread as answers end. None
            stands for no question yet: the answers under way go on meanwhile.
        size: how many answers are under way at once.
    """
    return runtime.run(lambda gone: _answers(runtime.engine, asks, size, gone))


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
    engine: Engine, asks: Iterable[Ask | None], size: int, gone: threading.Event
) -> Iterator[tuple[int, Piece | MM1Error]]:
    waiting, number, more = iter(asks), 0, True
    held: Ask | None = None
    batch = Batch(engine, gone)
    try:
        with engine.lock, wired():
            while more or held or len(batch):
                while (more or held) and len(batch) < size:
                    ask, held = held or next(waiting, _END), None
                    if ask is _END or ask is None:
                        more = ask is None
                        break
                    assert isinstance(ask, Ask)
                    try:
                        began = batch.add(number, ask)
                    except MemoryLimitError as error:
                        if len(batch):
                            # It may fit once another answer has ended.
                            held, size = ask, len(batch)
                            break
                        yield number, error
                    except MM1Error as error:
                        yield number, error
                    else:
                        yield from ((number, piece) for piece in began)
                    number += 1
                yield from batch.step()
    finally:
        batch.close()
