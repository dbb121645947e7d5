"""What answers share: a model, its tokenizer, and what is kept from one to the next.

Everything here runs on the thread that owns the model.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from mm1_mlx.answer import Forecast, Settings
from mm1_mlx.config import MM1Config
from mm1_mlx.device import this_chip
from mm1_mlx.errors import ContextError, PromptError, blaming
from mm1_mlx.grammar import Grammars
from mm1_mlx.image import ImageSource
from mm1_mlx.limits import answer_seconds
from mm1_mlx.memory.features import FeatureCache
from mm1_mlx.memory.named import NamedPrefixes, Prefix
from mm1_mlx.memory.pictures import PictureCache
from mm1_mlx.memory.prefixes import KVPrecision, PrefixCache, common
from mm1_mlx.messages import Message
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import packed_ways
from mm1_mlx.prefill import Context, Shared, Stop, needs_of, prefill, prepare
from mm1_mlx.prompt import Prompt
from mm1_mlx.request import Guess, Request
from mm1_mlx.shots import choose_style, stops_of, with_shots
from mm1_mlx.speculate import Drafter, DraftModel, PromptLookup
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.transcript import Transcript

# Numbers that share a scale in packed keys and values: the widest that fits the heads.
KV_GROUP_SIZES = (64, 32)


@dataclass(frozen=True)
class Asked:
    """A question as it is put to a model, behind its prefix."""

    prompt: str | Sequence[Message]
    images: Sequence[ImageSource]
    settings: Settings
    prefix: Prefix | None = None


@dataclass(frozen=True)
class Plan:
    """A question that is ready to be run.

    Attributes:
        asked: the question behind its prefix.
        prompt: its tokens and pictures.
        settings: how to answer.
        precision: how the cache holds keys and values.
        room: how many tokens may be generated.
        seconds: how long it took to be made.
    """

    asked: Asked
    prompt: Prompt
    settings: Settings
    precision: KVPrecision
    room: int
    seconds: float = 0.0


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
    # Held while it answers: another engine's thread may use it to guess.
    lock: threading.RLock = field(default_factory=threading.RLock)
    grammars: Grammars = field(init=False)
    pictures: PictureCache = field(default_factory=PictureCache)

    def __post_init__(self) -> None:
        assert self.config.decoder is not None
        self.grammars = Grammars(self.tokenizer, self.config.decoder.vocab_size)

    def plan(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        settings: Settings,
    ) -> Plan:
        """A question made ready: what can be done of it on any thread, without mlx.

        Raises:
            PromptError: prompt, pictures, settings and model do not fit together.
        """
        began = time.perf_counter()
        precision = self.precision(settings)
        assert self.config.decoder is not None
        _check_bias(settings.logit_bias, self.config.decoder.vocab_size)
        if settings.schema is not None:
            # Compiled once, and looked up by every answer.
            self.grammars.constraint(settings.schema)
        asked = self._behind(Asked(prompt, images, settings))
        built, settings = self._build(asked)
        room = self._room(built, settings)
        seconds = time.perf_counter() - began
        return Plan(asked, built, settings, precision, room, seconds)

    def open(
        self,
        plan: Plan,
        start: float,
        *,
        alone: bool = True,
        shared: Shared | None = None,
        promised: int = 0,
        gone: threading.Event | None = None,
        between: Callable[[], None] | None = None,
    ) -> Request:
        """The answer to a question, begun but for its first token.

        Args:
            plan: the question made ready.
            start: when it was asked for, by ``time.perf_counter``.
            alone: whether no other answer is decoded with it, so that guessing pays.
            shared: a prefix whose cache others use too; taken if the prompt begins so.
            promised: bytes that answers under way will still take.
            gone: set when nobody listens any more.
            between: called behind every picture that is encoded; it may raise.

        Raises:
            PromptError: settings and model do not fit together.
            MemoryLimitError: the device has not the memory for it.
        """
        began = time.perf_counter()
        asked, built, settings = plan.asked, plan.prompt, plan.settings
        guess = self._guess(asked, built, plan.precision) if alone else None
        schema = settings.schema
        constraint = None if schema is None else self.grammars.constraint(schema)
        if asked.prefix:
            self.named.recall(asked.prefix, built.positions, plan.precision)
        context = prepare(
            self.model,
            built,
            self.features,
            self.prefixes,
            plan.precision,
            plan.room,
            shared,
            promised,
            between,
        )
        return Request(
            model=self.model,
            prefixes=self.prefixes,
            context=context,
            settings=self._agreed(settings),
            max_tokens=plan.room,
            transcript=Transcript(self.tokenizer, settings.stop),
            guess=guess,
            constraint=constraint,
            group=self.group,
            gone=gone or threading.Event(),
            start=start,
            encode=plan.seconds + time.perf_counter() - began,
        )

    def continued(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        settings: Settings,
        continuations: Sequence[str],
        rows: int,
    ) -> tuple[Context, list[tuple[int, ...]]]:
        """A prompt that is ready to be read, and the tokens of what may stand behind it.

        Args:
            prompt: a question, or chat messages.
            images: pictures for its places.
            settings: how it is shown and its cache held.
            continuations: texts, each of which may stand behind it.
            rows: how many of them will be run at once.

        Raises:
            PromptError: prompt, pictures and model do not fit together, or a text has no
                tokens.
        """
        precision = self.precision(settings)
        asked = self._behind_shots(self._behind(Asked(prompt, images, settings)))
        built, behind = Prompt.build_continued(
            asked.prompt,
            asked.images,
            self.config,
            self.tokenizer,
            continuations,
            tiled=settings.tiled,
            seen=self.pictures,
        )
        for text, tokens in zip(continuations, behind, strict=True):
            if not tokens:
                raise PromptError(f"the continuation {text!r:.60} has no tokens")
        longest = max(map(len, behind), default=0)
        room = self._room(built, replace(settings, max_tokens=max(1, longest)))
        if room < longest:
            raise ContextError(
                f"prompt and continuation have {len(built.tokens) + longest:,} tokens, "
                f"more than the model's context holds ({len(built.tokens) + room:,}); "
                "ask with fewer pictures or examples"
            )
        if asked.prefix:
            self.named.recall(asked.prefix, built.positions, precision)
        context = prepare(
            self.model, built, self.features, self.prefixes, precision, longest * rows
        )
        return context, behind

    def forecast(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        settings: Settings,
    ) -> Forecast:
        """What an answer will take, after what is remembered; nothing of it is run.

        A draft model's own part is left out.

        Raises:
            PromptError: prompt, pictures and model do not fit together.
        """
        plan = self.plan(prompt, images, settings)
        asked, built, settings = plan.asked, plan.prompt, plan.settings
        precision, room = plan.precision, plan.room
        if asked.prefix:
            self.named.recall(asked.prefix, built.positions, precision)
        reused = self.prefixes.longest(built.positions, precision)
        needs = needs_of(self.model, built, self.features, precision, room, reused)
        chip = this_chip(self.model.decoder.norm.weight.dtype)
        first = total = None
        if chip:
            ways = packed_ways(self.model)
            first, total = answer_seconds(chip, self.config, needs, ways)
        guessed = settings.prompt_lookup or settings.draft is not None
        return Forecast(
            prompt_tokens=len(built.tokens),
            image_tokens=built.num_image_tokens,
            cached_tokens=reused,
            max_tokens=room,
            bytes=sum(needs.bytes(self.config).values()),
            first_token=first,
            total=None if guessed else total,
        )

    def precision(self, settings: Settings) -> KVPrecision:
        """How an answer's cache holds keys and values.

        Raises:
            PromptError: the model's heads cannot be packed so.
        """
        if settings.kv_bits is None:
            return KVPrecision()
        assert self.config.decoder is not None
        size = self.config.decoder.head_dim
        sizes = settings.kv_group_size or KV_GROUP_SIZES
        fitting = [
            n for n in (sizes if isinstance(sizes, tuple) else (sizes,)) if not size % n
        ]
        if not fitting:
            raise PromptError(
                f"keys and values of heads of {size} numbers cannot be packed in groups "
                f"of {sizes}; leave out kv_bits"
            )
        return KVPrecision(settings.kv_bits, fitting[0], settings.kv_start)

    def forget(self) -> None:
        """Let go of what is kept in memory of earlier pictures and prompts."""
        self.pictures.clear()
        self.features.clear()
        self.prefixes.clear()
        mx.clear_cache()

    def save_prefix(
        self,
        prefix: Prefix,
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
        self.named.save(prefix, context.prompt, context.cache)
        return len(context.prompt.tokens)

    def read_prefix(
        self,
        prefix: Prefix,
        precision: KVPrecision,
        *,
        tiled: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        known: bool = False,
        promised: int = 0,
        between: Callable[[], None] | None = None,
    ) -> Context:
        """A prefix in a cache: the positions that stand before every question.

        Args:
            prefix: what stands there.
            precision: how the cache holds keys and values.
            tiled: how many of its last pictures may be split into tiles.
            progress: called with positions done and in all.
            known: whether it was saved under its name.
            promised: bytes that answers under way will still take.
            between: called behind every picture and every part; it may raise.

        Raises:
            PromptError: there are none.
            MemoryLimitError: the device has not the memory for it.
        """
        settings = Settings(tiled=tiled)
        one, other = (
            self._build(Asked(*prefix.before(question, (), settings)))[0]
            for question in ("A", "b?")
        )
        count = common(one.positions, other.positions)
        if not (prefix.system or prefix.images or prefix.shots) or not count:
            raise PromptError(
                "the prefix is empty; give it a system message, pictures or examples"
            )
        if known:
            self.named.recall(prefix, one.positions, precision)
        prompt = one.until(count)
        context = prepare(
            self.model,
            prompt,
            self.features,
            self.prefixes,
            precision,
            promised=promised,
            between=between,
        )
        prefill(self.model, context, progress=progress, between=between)
        return context

    @cached_property
    def _raw(self) -> MM1Config:
        """The config of the same model without its chat template."""
        assert self.config.prompt is not None
        return replace(
            self.config, prompt=replace(self.config.prompt, template="plain")
        )

    def _behind(self, asked: Asked) -> Asked:
        """The question behind the prefix that its settings name."""
        if asked.settings.prefix is None:
            return asked
        prefix = self.named.find(asked.settings.prefix)
        before = prefix.before(asked.prompt, asked.images, asked.settings)
        return Asked(*before, prefix)

    def _build(self, asked: Asked) -> tuple[Prompt, Settings]:
        """The prompt behind its examples, and where its answer ends."""
        asked = self._behind_shots(asked)
        settings = asked.settings
        config = self._raw if settings.raw else self.config
        assert config.decoder is not None
        built = Prompt.build(
            asked.prompt,
            asked.images,
            config,
            self.tokenizer,
            tiled=settings.tiled,
            most=config.decoder.max_position_embeddings,
            seen=self.pictures,
        )
        return built, settings

    def _behind_shots(self, asked: Asked) -> Asked:
        """The question behind the examples of its settings."""
        assert self.config.prompt is not None
        settings = asked.settings
        if not settings.shots:
            return asked
        style = choose_style(settings.shot_style, settings.shots, self.config.prompt)
        prompt = with_shots(settings.shots, asked.prompt, asked.images, style)
        stop = settings.stop or stops_of(style, settings.shots)
        return Asked(prompt, (), replace(settings, stop=stop), asked.prefix)

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
            raise ContextError(
                f"prompt has {len(prompt.tokens):,} tokens, "
                f"{prompt.num_image_tokens:,} of them pictures, but the model's context "
                f"holds {context:,}; ask with fewer pictures or earlier turns"
            )
        return min(settings.max_tokens, context - len(prompt.tokens))

    def _guess(
        self, asked: Asked, built: Prompt, precision: KVPrecision
    ) -> Guess | None:
        """How the answer's tokens are guessed, if they are."""
        settings = asked.settings
        if not settings.prompt_lookup and settings.draft is None:
            return None
        assert self.config.decoder is not None
        moe = self.config.decoder.moe
        if moe and moe.capacity_factor is not None:
            raise PromptError(
                "the model's experts share out their places among the tokens of a step, "
                "so guessed tokens would change its answer; ask without guessing"
            )
        if settings.prompt_lookup:
            return _Lookup(packed=precision.bits is not None)
        other: Engine = settings.draft.engine
        if other.tokenizer.vocabulary != self.tokenizer.vocabulary:
            raise PromptError(
                "the draft model has another vocabulary, so its guesses mean something "
                "else; choose a smaller model of the same family"
            )
        seen, _ = other._build(asked)
        return _Draft(
            other,
            seen,
            len(built.tokens),
            settings.num_draft_tokens,
            other._room(seen, settings),
        )


@blaming(setting="logit_bias")
def _check_bias(liked: Mapping[int, float], vocab_size: int) -> None:
    if strangers := [token for token in liked if not 0 <= token < vocab_size]:
        raise PromptError(
            f"logit_bias names token {strangers[0]}, the model's are 0 to "
            f"{vocab_size - 1}"
        )


@dataclass
class _Lookup:
    """Guesses from the prompt itself."""

    packed: bool

    def begin(self, cancelled: Stop) -> Drafter:  # noqa: ARG002
        # More queries at once would unpack the whole cache to attend to it.
        return PromptLookup(most=7) if self.packed else PromptLookup()

    def end(self, tokens: Sequence[int]) -> None:
        """Nothing is kept."""


@dataclass
class _Draft:
    """Guesses of a smaller model, which reads the question for itself.

    Attributes:
        engine: the smaller model's.
        prompt: the question as it sees it.
        length: of the prompt as the answering model sees it.
        count: how many tokens are guessed at once.
        room: of the longest answer, in tokens.
    """

    engine: Engine
    prompt: Prompt
    length: int
    count: int
    room: int
    _context: Context | None = None
    _drafter: DraftModel | None = None

    def begin(self, cancelled: Stop) -> Drafter:
        other = self.engine
        other.lock.acquire()
        try:
            precision = KVPrecision()
            self._context = prepare(
                other.model,
                self.prompt,
                other.features,
                other.prefixes,
                precision,
                self.room,
            )
            prefill(other.model, self._context, cancelled=cancelled)
        except BaseException:
            other.lock.release()
            raise
        self._drafter = DraftModel(
            other.model, self._context.cache, self.length, self.count
        )
        return self._drafter

    def end(self, tokens: Sequence[int]) -> None:
        assert self._drafter is not None
        assert self._context is not None
        try:
            held = self._drafter.rewind(tokens) - self.length
            answered = tokens[self.length : self.length + held]
            known: tuple[Any, ...] = (*self.prompt.positions, *answered)
            self.engine.prefixes.keep(known, self._context.cache, KVPrecision())
        finally:
            self.engine.lock.release()
