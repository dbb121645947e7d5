"""One answer: a prompt read into a cache, then tokens until it ends.

``Engine`` holds what answers share, ``Request`` what one of them needs. Everything here
runs on the thread that owns the model.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from mm1_mlx.answer import FinishReason, Piece, Settings, Stats, Timings
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import PromptError
from mm1_mlx.image import ImageSource
from mm1_mlx.memory.features import FeatureCache
from mm1_mlx.memory.named import NamedPrefixes, Prefix
from mm1_mlx.memory.prefixes import KVPrecision, PrefixCache, common
from mm1_mlx.messages import Message
from mm1_mlx.models import MM1
from mm1_mlx.prefill import Cancelled, Context, Shared, prefill, prepare
from mm1_mlx.prompt import Prompt
from mm1_mlx.sampling import Sampler
from mm1_mlx.shots import choose_style, stops_of, with_shots
from mm1_mlx.speculate import Drafter, DraftModel, PromptLookup, speculate
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.transcript import Transcript


@dataclass
class Engine:
    """A model, its tokenizer, and what is kept from answer to answer.

    Where a ``group`` of processes shares the model, all of them are asked the same.
    """

    model: MM1
    tokenizer: Tokenizer
    config: MM1Config
    features: FeatureCache
    prefixes: PrefixCache
    named: NamedPrefixes
    group: mx.distributed.Group | None = None

    def open(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        settings: Settings,
        start: float,
        *,
        alone: bool = True,
        shared: Shared | None = None,
    ) -> Request:
        """The answer to a prompt, begun but for its first token.

        Args:
            prompt: a question, or chat messages.
            images: pictures for its places.
            settings: how to answer.
            start: when it was asked for, by ``time.perf_counter``.
            alone: whether no other answer is decoded with it, so that guessing pays.
            shared: a prefix whose cache others use too; taken if the prompt begins so.

        Raises:
            PromptError: prompt, pictures, settings and model do not fit together.
        """
        began = time.perf_counter()
        precision = KVPrecision()
        if settings.kv_bits is not None:
            precision = KVPrecision(
                settings.kv_bits, settings.kv_group_size, settings.kv_start
            )
        built, settings = self._build(prompt, images, settings, precision)
        room = self._room(built, settings)
        context = prepare(
            self.model, built, self.features, self.prefixes, precision, room, shared
        )
        drafter = None
        if alone:
            drafter = self._drafter(prompt, images, settings, len(built.tokens))
        return Request(
            engine=self,
            settings=self._agreed(settings),
            context=context,
            max_tokens=room,
            drafter=drafter,
            start=start,
            encode=time.perf_counter() - began,
        )

    def forget(self) -> None:
        """Let go of what is kept in memory of earlier pictures and prompts."""
        self.features.clear()
        self.prefixes.clear()
        mx.clear_cache()

    def save_prefix(
        self,
        prefix: Prefix,
        model: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Read a prefix and write it to disk under its name; how many positions it has.

        Raises:
            PromptError: nothing of it stands before every question.
        """
        if self.group is not None:
            raise PromptError(
                "a prefix is saved by one process; save it without mlx.launch"
            )
        context = self.read_prefix(prefix, KVPrecision(), progress=progress)
        self.named.save(prefix, context.prompt, context.cache, model)
        return len(context.prompt.tokens)

    def read_prefix(
        self,
        prefix: Prefix,
        precision: KVPrecision,
        *,
        tiled: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Context:
        """A prefix in a cache: the positions that stand before every question.

        Raises:
            PromptError: there are none.
        """
        settings = Settings(tiled=tiled)
        one, other = (
            self._ask(prefix.before(question, (), settings))[0]
            for question in ("A", "b?")
        )
        count = common(one.positions, other.positions)
        if not (prefix.system or prefix.images or prefix.shots) or not count:
            raise PromptError(
                "the prefix is empty; give it a system message, pictures or examples"
            )
        prompt = one.until(count)
        context = prepare(self.model, prompt, self.features, self.prefixes, precision)
        prefill(self.model, context, progress=progress)
        return context

    def _build(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        settings: Settings,
        precision: KVPrecision,
    ) -> tuple[Prompt, Settings]:
        """The prompt behind its prefix, whose cache is at hand, and where its answer ends."""
        if settings.prefix is None:
            return self._ask((prompt, images, settings))
        prefix = self.named.find(settings.prefix)
        built, settings = self._ask(prefix.before(prompt, images, settings))
        self.named.recall(prefix, built.positions, precision)
        return built, settings

    def _ask(
        self, asked: tuple[str | Sequence[Message], Sequence[ImageSource], Settings]
    ) -> tuple[Prompt, Settings]:
        """The prompt behind its examples, and where its answer ends."""
        assert self.config.prompt is not None
        prompt, images, settings = asked
        if settings.shots:
            style = choose_style(
                settings.shot_style, settings.shots, self.config.prompt
            )
            prompt = with_shots(settings.shots, prompt, images, style)
            stop = settings.stop or stops_of(style, settings.shots)
            images, settings = (), replace(settings, stop=stop)
        built = Prompt.build(
            prompt, images, self.config, self.tokenizer, tiled=settings.tiled
        )
        return built, settings

    def _agreed(self, settings: Settings) -> Settings:
        """The settings with a seed that all processes draw by."""
        if self.group is None or settings.seed is not None:
            return settings
        own = secrets.randbits(31) if self.group.rank() == 0 else 0
        seed = mx.distributed.all_sum(mx.array(own), group=self.group)
        return replace(settings, seed=int(seed))

    def _room(self, prompt: Prompt, settings: Settings) -> int:
        """How many tokens may be generated before the context is full."""
        assert self.config.decoder is not None
        context = self.config.decoder.max_position_embeddings
        if len(prompt.tokens) >= context:
            raise PromptError(
                f"prompt has {len(prompt.tokens):,} tokens, "
                f"{prompt.num_image_tokens:,} of them pictures, but the model's context "
                f"holds {context:,}; ask with fewer pictures or earlier turns"
            )
        return min(settings.max_tokens, context - len(prompt.tokens))

    def _drafter(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        settings: Settings,
        length: int,
    ) -> Drafter | None:
        """Who guesses the answer's tokens, if anybody."""
        if settings.prompt_lookup:
            return PromptLookup()
        if settings.draft is None:
            return None
        other: Engine = settings.draft.engine
        if other.tokenizer.vocabulary != self.tokenizer.vocabulary:
            raise PromptError(
                "the draft model has another vocabulary, so its guesses mean something "
                "else; choose a smaller model of the same family"
            )
        precision = KVPrecision()
        built, _ = other._build(prompt, images, settings, precision)
        context = prepare(other.model, built, other.features, other.prefixes, precision)
        prefill(other.model, context, cancel=settings.cancel)
        return DraftModel(other.model, context.cache, length, settings.num_draft_tokens)


@dataclass
class Request:
    """An answer under way.

    Attributes:
        engine: what answers.
        settings: how to answer.
        context: the prompt and its cache.
        max_tokens: how long the answer may become.
        drafter: guesses its tokens, or None.
        start: when it was asked for.
        encode: seconds until its prompt was read and its pictures encoded.
    """

    engine: Engine
    settings: Settings
    context: Context
    max_tokens: int
    drafter: Drafter | None
    start: float
    encode: float
    sampler: Sampler = field(init=False)
    # What was drawn, the end token included, and when.
    drawn: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        settings = self.settings
        self.sampler = Sampler(settings.temperature, settings.top_p, settings.seed)
        self._transcript = Transcript(self.engine.tokenizer, settings.stop)

    def first(self) -> int:
        """The answer's first token; the cache holds the prompt afterwards.

        Raises:
            Cancelled: it is no longer wanted.
        """
        logits = prefill(
            self.engine.model,
            self.context,
            progress=self.settings.progress,
            cancel=self.settings.cancel,
        )
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return int(self.sampler(logprobs))

    def tokens(self) -> Iterator[int]:
        """The answer's tokens, one after another, without an end.

        Raises:
            Cancelled: it is no longer wanted.
        """
        first = self.first()
        yield first
        if self.max_tokens == 1:
            return
        model, context = self.engine.model, self.context
        if self.drafter:
            yield from speculate(
                model,
                first,
                context.cache,
                self.drafter,
                self.sampler,
                [p if isinstance(p, int) else -1 for p in context.prompt.positions],
                self.max_tokens,
                context.precision,
            )
            return
        steps = generate_step(
            mx.array([first]),
            model,
            max_tokens=self.max_tokens - 1,
            sampler=self.sampler,
            prompt_cache=context.cache,
            kv_bits=context.precision.bits,
            kv_group_size=context.precision.group_size,
            quantized_kv_start=context.precision.start,
        )
        for token, _ in steps:
            yield int(token)

    def add(self, token: int) -> list[Piece]:
        """What a token adds to the answer; the last piece of all has a finish reason."""
        self.times.append(time.perf_counter())
        self.drawn.append(token)
        piece = self._transcript.add(token)
        if piece.finish_reason is not None:
            return [self._last(piece)]
        cancel = self.settings.cancel
        if cancel is not None and cancel.is_set():
            return [piece, self.finish("cancelled")]
        if len(self.drawn) == self.max_tokens:
            return [piece, self.finish("length")]
        return [piece]

    def finish(self, reason: FinishReason) -> Piece:
        """The last piece of an answer that ends here."""
        return self._last(self._transcript.finish(reason))

    def keep(self, cache: list[Any] | None = None) -> None:
        """Keep the cache for prompts that begin with this one and its answer.

        Args:
            cache: the cache that holds them, where it is not the context's own.
        """
        if self.context.shared:
            return  # Others hold most of it.
        cache = cache or self.context.cache
        known = (*self.context.prompt.positions, *self.drawn)
        lengths = {layer.offset for layer in cache}
        # An error may have struck between two layers.
        if len(lengths) == 1:
            held = known[: lengths.pop()]
            self.engine.prefixes.keep(held, cache, self.context.precision)

    def _last(self, piece: Piece) -> Piece:
        now = time.perf_counter()
        first, last = (self.times[0], self.times[-1]) if self.times else (now, now)
        prompt = self.context.prompt
        timings = Timings(
            encode=self.encode,
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


def answer(request: Request) -> Generator[Piece, None, None]:
    """The pieces of one answer; its cache is kept for the next."""
    try:
        for token in request.tokens():
            for piece in request.add(token):
                yield piece
                if piece.finish_reason is not None:
                    return
    except Cancelled:
        yield request.finish("cancelled")
    finally:
        request.keep()
