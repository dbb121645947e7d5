"""One answer under way: tokens until it ends, and the cache it leaves behind.

Everything here runs on the thread that owns the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx

from mm1_mlx.answer import FinishReason, Piece, Settings, Stats, Timings
from mm1_mlx.bias import Bias
from mm1_mlx.memory.prefixes import KVPrecision, PrefixCache, copied, pack
from mm1_mlx.models import MM1
from mm1_mlx.prefill import Cancelled, Context, Stop, prefill
from mm1_mlx.sampling import Constraint, Sampler
from mm1_mlx.scores import Scores
from mm1_mlx.speculate import Drafter, speculate
from mm1_mlx.transcript import Transcript


class Guess(Protocol):
    """A way to have the tokens of one answer guessed."""

    def begin(self, cancelled: Stop) -> Drafter:
        """Who guesses, ready to.

        Raises:
            Cancelled: the answer is no longer wanted.
        """
        ...

    def end(self, tokens: Sequence[int]) -> None:
        """The answer has ended; these are its prompt's and its own tokens."""
        ...


@dataclass
class Request:
    """An answer under way.

    Attributes:
        model: what answers.
        prefixes: where its cache is kept for prompts that go on from it.
        context: the prompt and its cache.
        settings: how to answer.
        max_tokens: how long the answer may become.
        transcript: writes its text.
        guess: how its tokens are guessed, or None.
        constraint: what it is held to, or None.
        group: the processes that answer together, or None.
        gone: set when nobody listens any more.
        start: when it was asked for.
        encode: seconds until its prompt was read and its pictures encoded.
    """

    model: MM1
    prefixes: PrefixCache
    context: Context
    settings: Settings
    max_tokens: int
    transcript: Transcript
    guess: Guess | None
    constraint: Constraint | None
    group: mx.distributed.Group | None
    gone: threading.Event
    start: float
    encode: float
    sampler: Sampler = field(init=False)
    # What was drawn, the end token included, and when.
    drawn: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    opened: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        settings = self.settings
        liked, top = settings.logit_bias, settings.top_logprobs
        penalties = settings.presence_penalty, settings.frequency_penalty
        assert self.model.config.decoder is not None
        width = self.model.config.decoder.vocab_size
        moved = bool(liked) or any(penalties)
        self.sampler = Sampler(
            settings.temperature,
            settings.top_p,
            settings.seed,
            self.constraint,
            Bias(width, liked, *penalties) if moved else None,
            None if top is None else Scores(top),
        )

    def first(self, between: Callable[[], None] | None = None) -> int:
        """The answer's first token; the cache holds the prompt afterwards.

        Args:
            between: called between two parts of the prompt.

        Raises:
            Cancelled: it is no longer wanted.
        """
        logits = prefill(
            self.model,
            self.context,
            progress=self.settings.progress,
            cancelled=self.cancelled,
            between=between,
        )
        # Their pixels are many, and not wanted any more.
        self.context.prompt = replace(self.context.prompt, pictures=())
        return int(self.sampler(logits))

    def tokens(self) -> Generator[int, None, None]:
        """The answer's tokens, one after another, without an end.

        Raises:
            Cancelled: it is no longer wanted.
        """
        first = self.first()
        yield first
        if self.max_tokens == 1:
            return
        context, precision = self.context, self.context.precision
        if self.guess:
            drafter = self.guess.begin(self.cancelled)
            try:
                yield from speculate(
                    self.model,
                    first,
                    context.cache,
                    drafter,
                    self.sampler,
                    self.texts(),
                    self.max_tokens,
                    precision,
                )
            finally:
                self.guess.end([*self.texts(), *self.drawn])
            return
        yield from decode(
            self.model,
            first,
            context.cache,
            self.sampler,
            self.max_tokens - 1,
            precision,
        )

    @property
    def length(self) -> int:
        """Positions of the prompt and of what was drawn."""
        return len(self.context.prompt.tokens) + len(self.drawn)

    def texts(self) -> list[int]:
        """The prompt's tokens, -1 where a picture stands."""
        return [p if isinstance(p, int) else -1 for p in self.context.prompt.positions]

    def add(self, token: int) -> list[Piece]:
        """What a token adds to the answer; the last piece of all has a finish reason.

        Raises:
            MM1Error: the answer can be held to its constraint no further.
        """
        if self.constraint is not None:
            self.constraint.check()
        self.times.append(time.perf_counter())
        scores = self.sampler.scores
        score = None if scores is None else scores.take(len(self.drawn))
        self.drawn.append(token)
        piece = self.transcript.add(token)
        if piece.token is not None:
            piece = replace(piece, score=score)
        if piece.finish_reason is not None:
            return [self._last(piece)]
        if self.cancelled():
            return [piece, self.finish("cancelled")]
        if len(self.drawn) == self.max_tokens:
            return [piece, self.finish("length")]
        return [piece]

    def finish(self, reason: FinishReason) -> Piece:
        """The last piece of an answer that ends here."""
        return self._last(self.transcript.finish(reason))

    def cancelled(self) -> bool:
        """Whether the caller wants no more, or nobody listens."""
        cancel = self.settings.cancel
        own = self.gone.is_set() or (cancel is not None and cancel.is_set())
        if self.group is None or cancel is None:
            return own
        # A process that stopped alone would leave the others waiting for it.
        return int(mx.distributed.all_sum(mx.array(int(own)), group=self.group)) > 0

    def keep(self, cache: list[Any] | None = None) -> None:
        """Keep the cache for prompts that begin with this one and its answer.

        Args:
            cache: the cache that holds them, where it is not the context's own.
        """
        if self.context.shared:
            return  # Others hold most of it.
        # A row of a batch's arrays would hold the whole batch's.
        cache = copied(cache) if cache else self.context.cache
        known = (*self.context.prompt.positions, *self.drawn)
        lengths = {layer.offset for layer in cache}
        # An error may have struck between two layers.
        if len(lengths) == 1:
            held = known[: lengths.pop()]
            self.prefixes.keep(held, cache, self.context.precision)

    def _last(self, piece: Piece) -> Piece:
        now = time.perf_counter()
        first, last = (self.times[0], self.times[-1]) if self.times else (now, now)
        prompt = self.context.prompt
        timings = Timings(
            encode=self.encode,
            prefill=first - self.opened,
            first_token=first - self.start,
            total=last - self.start,
            decode_rate=(len(self.times) - 1) / (last - first) if last > first else 0.0,
        )
        stats = Stats(
            prompt_tokens=len(prompt.tokens),
            image_tokens=prompt.num_image_tokens,
            cached_tokens=self.context.reused,
            generated_tokens=len(self.drawn),
            timings=timings,
        )
        return replace(piece, stats=stats)


def decode(
    model: MM1,
    token: int,
    cache: list[Any],
    sampler: Sampler,
    count: int,
    precision: KVPrecision,
) -> Iterator[int]:
    """The tokens behind one that the cache does not hold yet, one after another.

    As mlx-lm's ``generate_step``, which also turns every step's logits into
    probabilities: on a CPU a fiftieth of the time, and nobody asks for them.

    Args:
        model: gives the logits.
        token: what was said last.
        cache: holds what stands before it.
        sampler: draws the tokens.
        count: how many.
        precision: how the cache holds keys and values.
    """

    def step(tokens: mx.array) -> mx.array:
        logits = model(tokens[None], cache=cache)[:, -1]
        pack(cache, precision)
        drawn = sampler(logits)
        mx.async_eval(drawn)
        return drawn

    drawn = step(mx.array([token]))
    for i in range(count):
        # The device goes on while this token is looked at.
        following = step(drawn) if i + 1 < count else drawn
        yield int(drawn)
        drawn = following
        if i % 256 == 255:
            mx.clear_cache()


def answer(request: Request) -> Generator[Piece, None, None]:
    """The pieces of one answer; its cache is kept for the next."""
    try:
        yield from _pieces(request, request.tokens())
    except Cancelled:
        yield request.finish("cancelled")
    finally:
        request.keep()


def _pieces(request: Request, tokens: Generator[int, None, None]) -> Iterator[Piece]:
    try:
        for token in tokens:
            pieces = request.add(token)
            yield from pieces
            if pieces[-1].finish_reason is not None:
                return
    finally:
        # Before the cache is kept: what was guessed wrong is cut from it.
        tokens.close()
