"""The second stage's batches: conversations, and the labelled pictures they are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.balance import AnswerAdjustment, Balance
from benchmarks.shapes.mentions import MentionFinder, Mentions
from benchmarks.shapes.patches import PatchBatch, label_patches
from benchmarks.shapes.questions import Question, ask_place, caption, questions
from benchmarks.shapes.recipe import Recipe, Stage, picture_rng, random_picture_scene
from benchmarks.shapes.scene import COLOURS, UNNAMED, Pair, Scene
from mm1_mlx.messages import Turn
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.sample import Batch, Sample, build_sample, collate

# Share of the questions in lower case.
LOWER_CASE = 0.15

# A question, its answer, and the pair it is about where the answer is half of one.
Exchange = tuple[str, str, Pair | None]
Conversation = tuple[Exchange, ...]


@dataclass(frozen=True)
class JointBatch:
    """Rows of conversations, and the labelled pictures they refer to."""

    rows: Batch
    patches: PatchBatch
    # [learned tokens, V]: what balances their scores.
    adjustment: NDArray[np.float32]
    mentions: Mentions


class Conversations:
    """The batch of (step, shard): fresh pictures, each with several conversations.

    Even steps ask single questions, odd steps caption and ask two in a row: rows of like
    length waste little padding, and no answer can be read off a caption before it.
    """

    def __init__(self, recipe: Recipe, stage: Stage, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.stage = stage
        self.tokenizer = tokenizer
        self._sample = lru_cache(maxsize=100_000)(self._build)
        assert recipe.config.decoder is not None
        vocab_size = recipe.config.decoder.vocab_size
        self._mentions = MentionFinder(tokenizer)
        self._adjustment = AnswerAdjustment(tokenizer, vocab_size)

    def __call__(self, step: int, shard: int) -> JointBatch:
        rng = picture_rng(self.stage.train.seed, step, shard)
        scenes, samples, owners = [], [], []
        balances: list[Balance] = []
        for i in range(self.recipe.pictures_per_batch):
            scene = random_picture_scene(rng, self.stage.unnamed)
            scenes.append(scene)
            for conversation in self.talk(scene, rng, told=step % 2 == 1):
                samples.append(self.row(conversation))
                owners.append([i])
                for pair in conversation:
                    balances += self._balance(pair)
        rows = self.collate(samples, owners)
        patches = label_patches(scenes, self.recipe.config)
        mentions = self._mentions(rows, [scenes[i] for (i,) in owners])
        adjustment = self._adjustment.table(balances)
        return JointBatch(rows, patches, adjustment, mentions)

    def collate(
        self, samples: Sequence[Sample], owners: Sequence[Sequence[int]]
    ) -> Batch:
        """The rows of samples about the pictures ``owners``."""
        return collate(samples, owners, (), self.recipe.config, self.tokenizer)

    def talk(
        self, scene: Scene, rng: np.random.Generator, *, told: bool
    ) -> list[Conversation]:
        """Rows of one question; or, if ``told``, of a caption and of two questions."""
        asked = ask(scene, rng, self.recipe.questions_per_picture)
        rows = [[exchange] for exchange in asked]
        if told:
            rows = [_sayable([(*caption(scene, rng), None)]), asked[:2]]
        return [tuple(_vary(exchange, rng) for exchange in row) for row in rows if row]

    def row(self, pairs: Conversation) -> Sample:
        """The row's sample; in this model's template turns follow one another as is."""
        parts = [self._sample(pair[:2], i == 0) for i, pair in enumerate(pairs)]
        tokens = [token for part in parts for token in part.tokens]
        learned = [flag for part in parts for flag in part.learned]
        return Sample(tuple(tokens), tuple(learned))

    def _build(self, pair: tuple[str, str], picture: bool) -> Sample:
        question, answer = pair
        shown: list[str | None] = [None] if picture else []
        turns: list[Turn] = [("user", [*shown, question]), ("assistant", [answer])]
        return build_sample(turns, self.recipe.config, self.tokenizer)

    def _balance(self, exchange: Exchange) -> list[Balance]:
        """What balances the scores of every learned token of an exchange."""
        question, answer, about = exchange
        sample = self._sample((question, answer), False)
        learned = zip(sample.tokens, sample.learned, strict=True)
        return self._adjustment([t for t, flag in learned if flag], about)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[Exchange]:
    """At most ``count`` questions, of different kinds."""
    named = sum(o.colour != UNNAMED for o in scene.objects) / len(scene.objects)
    asked: list[Exchange] = []
    for q in [*questions(scene, rng), ask_place(scene, rng)]:
        if q is not None and (rng.random() < named or not _denies(q)):
            half = q.kind in ("colour", "shape")
            about = q.target.pair if q.target and half else None
            asked.append((q.text, q.answer, about))
    asked = _sayable(asked)
    rng.shuffle(asked)
    return asked[:count]


def _denies(question: Question) -> bool:
    """Whether the answer is that some colour is not there.

    Where objects have no name, its counterpart cannot be said as often.
    """
    denied = question.kind in ("exists", "count") and question.answer in ("no", "0")
    return denied and any(colour in question.text for colour in COLOURS)


def _sayable(exchanges: Sequence[Exchange]) -> list[Exchange]:
    """What can be said without a name for what has none, every question once."""
    return [
        exchange
        for exchange in {e[0]: e for e in exchanges}.values()
        if UNNAMED not in f"{exchange[0]} {exchange[1]}".lower()
    ]


def _vary(exchange: Exchange, rng: np.random.Generator) -> Exchange:
    """The exchange as people also type it."""
    question, answer, about = exchange
    return (question.lower() if rng.random() < LOWER_CASE else question, answer, about)
