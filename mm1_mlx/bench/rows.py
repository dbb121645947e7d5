"""A loaded model to rows of times: encoding, prompts, tokens, and the first token.

As llama-bench has them (https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench):
synthetic tokens, a run that is not counted before the others, the likeliest token always,
no tokenizer and no end tokens but in the first token's row, which is what a user waits for.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import trim_prompt_cache
from PIL import Image

from mm1_mlx import limits
from mm1_mlx.answer import Options, Settings
from mm1_mlx.budget import Answer
from mm1_mlx.chips import Chip
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import PromptError
from mm1_mlx.image import DEFAULT_LIMITS, load_pictures
from mm1_mlx.layout import Picture
from mm1_mlx.memory.features import FeatureCache
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import packed_ways
from mm1_mlx.prefill import Context, embed, prefill
from mm1_mlx.prompt import Prompt
from mm1_mlx.request import decode
from mm1_mlx.resolution import high_resolution
from mm1_mlx.room import allowed
from mm1_mlx.runtime import Runtime, generate, wired
from mm1_mlx.sampling import Sampler
from mm1_mlx.sizes import human_bytes

# Text beside the pictures of the first token's row.
TEXT_TOKENS = 56
# A word that is a token of its own in about every vocabulary.
WORD = "a"


@dataclass(frozen=True)
class Plan:
    """What is measured; 0 leaves a row out.

    Attributes:
        prompt: tokens of the prompt.
        generate: tokens that are decoded.
        depth: positions in the cache before a second row of decoding.
        images: pictures that are encoded together, and asked about together.
        high_resolution: whether to encode at MM1's high resolution too.
        repetitions: runs that are counted.
        kv_bits: what keys and values are packed to from the first on, None for none.
    """

    prompt: int = 512
    generate: int = 128
    depth: int = 0
    images: int = 1
    high_resolution: bool = True
    repetitions: int = 5
    kv_bits: int | None = None

    @property
    def positions(self) -> int:
        """The most that a row of text takes."""
        behind = self.depth + self.generate if self.depth else 0
        return max(self.prompt, self.generate, behind)

    @property
    def options(self) -> Options:
        """How the plan has answers given."""
        return {"kv_bits": self.kv_bits, "kv_start": 0}

    def check(self, config: MM1Config) -> None:
        """Pass only if it suits the model.

        Raises:
            PromptError: the model takes no pictures, or not so many, or its context is
                shorter.
        """
        if self.images and not config.sees:
            raise PromptError("the model takes text only; pass --images 0")
        most = DEFAULT_LIMITS.max_pictures
        if self.images > most:
            raise PromptError(f"--images is {self.images}, expected at most {most}")
        assert config.decoder is not None
        context = config.decoder.max_position_embeddings
        if self.positions > context:
            raise PromptError(
                f"the plan needs {self.positions:,} positions, but the model's context "
                f"holds {context:,}; pass a smaller -p, -n or -d"
            )


@dataclass(frozen=True)
class Row:
    """What was measured of one thing.

    Attributes:
        name: as in llama-bench: pp512, tg128, tg128@d2048.
        unit: of ``rate``: "img/s", "t/s", or "s" where a run's seconds are what counts.
        amount: what a run did, in that unit.
        seconds: of every run.
        limits: the least seconds of a run by what "measured" and "nominal" chips can do.
    """

    name: str
    unit: str
    amount: int
    seconds: tuple[float, ...]
    limits: Mapping[str, float]

    def rate(self, seconds: float) -> float:
        """So many seconds in the row's unit."""
        return seconds if self.unit == "s" else self.amount / seconds

    @property
    def median(self) -> float:
        """Seconds of the middle run."""
        return statistics.median(self.seconds)

    def share(self, chip: str) -> float:
        """How much of a limit was reached; 1 is all of it."""
        return self.limits[chip] / self.median

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON values."""
        rates = [self.rate(x) for x in self.seconds]
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.rate(self.median),
            "min": min(rates),
            "max": max(rates),
            "seconds": list(self.seconds),
            "limits": {
                name: {"value": self.rate(x), "share": self.share(name)}
                for name, x in self.limits.items()
            },
        }


def check(runtime: Runtime, plan: Plan) -> None:
    """Pass only if a plan can be measured: nothing is run.

    Raises:
        PromptError: the context or the memory has no room for the plan, or the model's
            keys cannot be packed so.
    """
    _Bench(runtime, plan, {}, lambda _: None).check()


def measure(
    runtime: Runtime,
    plan: Plan,
    chips: Mapping[str, Chip],
    progress: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """The rows of a plan, as they are measured.

    Args:
        runtime: the model. What it keeps of pictures and prompts is forgotten.
        plan: what to measure.
        chips: by name, what the limits are computed from.
        progress: told what is measured next, or why it is not.

    Raises:
        PromptError: as ``check``.
    """
    bench = _Bench(runtime, plan, chips, progress or (lambda _: None))
    yield from runtime.run(lambda _: bench.rows())
    # As its users ask.
    yield bench.first_token()


class _Bench:
    def __init__(
        self,
        runtime: Runtime,
        plan: Plan,
        chips: Mapping[str, Chip],
        progress: Callable[[str], None],
    ) -> None:
        self.runtime = runtime
        self.model: MM1 = runtime.model
        self.config = runtime.config
        self.plan = plan
        self.chips = chips
        self.progress = progress
        self.ways = packed_ways(self.model)
        self.itemsize = self.model.decoder.norm.weight.dtype.size
        self.precision = runtime.engine.precision(Settings(**plan.options))

    def check(self) -> None:
        """Pass only if context and memory have room for the plan's texts and question."""
        self.plan.check(self.config)
        most = self.plan.positions
        self._fit(
            self._need(most), f"{most:,} positions need", "pass a smaller -p, -n or -d"
        )
        asked = self._build(*self._question())
        assert self.config.decoder is not None
        context = self.config.decoder.max_position_embeddings
        if len(asked.tokens) >= context:
            raise PromptError(
                f"{self.plan.images} pictures and {TEXT_TOKENS} tokens of text are "
                f"{len(asked.tokens):,} positions, but the model's context holds "
                f"{context:,}; pass fewer --images"
            )
        tiles = sum(len(p.tiles) for p in asked.pictures)
        need = self._need(len(asked.tokens), 1, tiles)
        self._fit(need, "the question needs", "pass fewer --images")

    def _need(self, positions: int, room: int = 0, tiles: int = 0) -> int:
        """Bytes beside the weights."""
        kv = self.precision
        answer = Answer(
            *(positions, room, tiles, 0, self.itemsize),
            *(kv.bits, kv.group_size, kv.start),
        )
        return sum(answer.bytes(self.config).values())

    def _fit(self, need: int, what: str, way_out: str) -> None:
        room = allowed()
        if room is not None and need > room:
            raise PromptError(
                f"{what} {human_bytes(need)} of memory beside the weights, but "
                f"{human_bytes(room)} are free here; {way_out}"
            )

    def rows(self) -> Iterator[Row]:
        """All but the first token's; to be run on the model's thread."""
        self.check()
        plan = self.plan
        with wired():
            if plan.images:
                yield from self._encoding()
            if plan.prompt:
                yield self._prompt()
            if plan.generate:
                yield self._decoding(0)
            if plan.generate and plan.depth:
                yield self._decoding(plan.depth)

    def _encoding(self) -> Iterator[Row]:
        yield self._encode(self.config)
        high = high_resolution(self.config) if self.plan.high_resolution else None
        if high is None:
            return
        try:
            yield self._encode(high)
        except PromptError as error:
            self.progress(f"left out: {error}")

    def _encode(self, config: MM1Config) -> Row:
        """Pictures' tiles to image tokens."""
        assert config.image is not None
        pictures = self._pictures(config)
        pixels = np.stack([tile for p in pictures for tile in p.tiles])
        N, size = pixels.shape[:2]
        need = Answer(1, 0, N, 0, self.itemsize).bytes(config)
        self._fit(sum(need.values()), f"{N} tiles of {size} pixels need",
                  "pass fewer --images, or a --resolution of fewer tiles")  # fmt: skip
        tiles = mx.array(pixels)
        mx.eval(tiles)

        def run() -> None:
            mx.eval(self.model.connector(self.model.vision(tiles)))

        return self._row(
            f"enc{N}@{size}", "img/s", self.plan.images, run,
            lambda chip: limits.encode_seconds(
                chip, config, N, self.ways, self.itemsize
            ),
        )  # fmt: skip

    def _pictures(self, config: MM1Config) -> list[Picture]:
        assert config.image is not None
        return load_pictures(self._sources(config), config.image)

    def _sources(self, config: MM1Config) -> list[bytes]:
        """Different square pictures of noise, as files are."""
        assert config.image is not None
        sources = []
        for i in range(self.plan.images):
            noise = np.random.default_rng(i).integers(
                0, 256, (config.image.size, config.image.size, 3), np.uint8
            )
            buffer = io.BytesIO()
            Image.fromarray(noise).save(buffer, "PNG")
            sources.append(buffer.getvalue())
        return sources

    def _prompt(self) -> Row:
        """A prompt of text to the logits of its last token."""
        n = self.plan.prompt
        tokens = self._tokens(n)
        return self._row(
            f"pp{n}", "t/s", n,
            lambda: self._read(tokens, self.model.make_cache()),
            lambda chip: limits.prefill_seconds(
                chip, self.config, n, self.ways, self.itemsize
            ),
        )  # fmt: skip

    def _read(self, tokens: tuple[int, ...], cache: list[Any]) -> None:
        prompt = Prompt(tokens)
        embeddings = embed(self.model, prompt, self.runtime.engine.features)
        prefill(self.model, Context(prompt, cache, self.precision, 0, embeddings))

    def _tokens(self, count: int) -> tuple[int, ...]:
        assert self.config.decoder is not None
        size = self.config.decoder.vocab_size
        random = np.random.default_rng(count)
        return tuple(random.integers(0, size, count).tolist())

    def _decoding(self, depth: int) -> Row:
        """Tokens one after another, behind so many positions."""
        n = self.plan.generate
        (first,) = self._tokens(1)
        sampler, kv = Sampler(), self.precision
        cache = self.model.make_cache()
        name = f"tg{n}@d{depth}" if depth else f"tg{n}"
        if depth:
            self.progress(f"{name}: reading {depth:,} positions first")
            self._read(self._tokens(depth), cache)

        def run() -> float:
            start = time.perf_counter()
            for _ in decode(self.model, first, cache, sampler, n, kv):
                pass
            seconds = time.perf_counter() - start
            trim_prompt_cache(cache, n)
            return seconds

        return self._row(
            name, "t/s", n, run,
            lambda chip: n / limits.decode_rate(
                *(chip, self.config, self.ways, depth + n // 2, self.itemsize),
                *(kv.bits, kv.group_size),
            ),
        )  # fmt: skip

    def first_token(self) -> Row:
        """Question and pictures, as files, to the answer's first token."""
        question, sources = self._question()
        prompt = self._build(question, sources)
        tiles = sum(len(p.tiles) for p in prompt.pictures)
        positions = len(prompt.tokens)
        text = positions - prompt.num_image_tokens
        seen = f"{self.plan.images}img+" if sources else ""
        options = self.plan.options | Options(max_tokens=1)

        def run() -> float:
            self.runtime.forget()
            answer = generate(self.runtime, question, sources, **options)
            assert answer.cached_tokens == 0
            return answer.timings.first_token

        engine = self.runtime.engine
        kept, engine.features = engine.features, FeatureCache(self.model.encode, "")
        try:
            return self._row(
                f"ttft({seen}{text})", "s", 1, run,
                lambda chip: limits.first_token_seconds(
                    chip, self.config, positions, tiles, self.ways, self.itemsize
                ),
            )  # fmt: skip
        finally:
            # Image tokens on disk would have come from an earlier run.
            engine.features = kept
            self.runtime.forget()

    def _question(self) -> tuple[str, list[bytes]]:
        """Pictures, and words that make ``TEXT_TOKENS`` with what the template writes.

        The closest that the vocabulary allows: the row's name has the true number.
        """
        sources = self._sources(self.config) if self.plan.images else []
        few, more = (self._text_tokens(n, sources) for n in (1, 11))
        each = max(1.0, (more - few) / 10)
        count = 1 + max(0, round((TEXT_TOKENS - few) / each))
        return " ".join([WORD] * count), sources

    def _text_tokens(self, words: int, sources: list[bytes]) -> int:
        prompt = self._build(" ".join([WORD] * words), sources)
        return len(prompt.tokens) - prompt.num_image_tokens

    def _build(self, question: str, sources: list[bytes]) -> Prompt:
        return Prompt.build(question, sources, self.config, self.runtime.tokenizer)

    def _row(
        self,
        name: str,
        unit: str,
        amount: int,
        run: Callable[[], float | None],
        limit: Callable[[Chip], float],
    ) -> Row:
        """Run once and then as often as planned; ``run`` may time itself."""
        self.progress(name)
        seconds = []
        for _ in range(self.plan.repetitions + 1):
            start = time.perf_counter()
            own = run()
            seconds.append(time.perf_counter() - start if own is None else own)
        bounds = {name: limit(chip) for name, chip in self.chips.items()}
        return Row(name, unit, amount, tuple(seconds[1:]), bounds)
