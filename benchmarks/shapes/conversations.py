"""The second stage: conversations about pictures, patches still labelled beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes.balance import AnswerAdjustment
from benchmarks.shapes.mentions import MentionFinder, Mentions
from benchmarks.shapes.patches import PatchBatch, PatchHeads, label_patches, patch_loss
from benchmarks.shapes.questions import Question, ask_place, caption, questions
from benchmarks.shapes.recipe import Recipe, Stage, picture_rng, random_picture_scene
from benchmarks.shapes.scene import COLOURS, UNNAMED, Pair, Scene
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Turn
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.loss import batch_states, states_loss
from mm1_mlx.train.sample import Batch, Sample, build_sample, collate

# Share of the questions in lower case.
LOWER_CASE = 0.15
# Every row repeats the picture's tokens, so it asks more than once.
QUESTIONS_PER_ROW = 3

# A question, its answer, and the pair it is about where the answer is half of one.
Exchange = tuple[str, str, Pair | None]
Conversation = tuple[Exchange, ...]


@dataclass(frozen=True)
class JointBatch:
    """Rows of conversations, and the labelled pictures they refer to."""

    rows: Batch
    patches: PatchBatch
    # [learned tokens, V], where the losses are balanced.
    adjustment: NDArray[np.float32] | None
    mentions: Mentions


class Tutored(nn.Module):
    """A model whose encoder goes on answering for its patches while it trains."""

    def __init__(self, mm1: MM1, heads: PatchHeads, patch_weight: float) -> None:
        super().__init__()
        self.mm1 = mm1
        self.heads = heads
        self.patch_weight = patch_weight


class Pointing(nn.Module):
    """A tutored model that also points at what a question names."""

    def __init__(self, tutored: Tutored, point_weight: float) -> None:
        super().__init__()
        self.tutored = tutored
        config = tutored.mm1.config
        assert config.decoder is not None
        self.point = nn.Linear(config.decoder.hidden_size, 2)
        self.point_weight = point_weight


def joint_loss(model: Tutored, batch: JointBatch) -> tuple[mx.array, mx.array]:
    """Loss of the answers plus the weighted loss of the patches; answer tokens."""
    loss, count, _ = _joint_loss(model, batch)
    return loss, count


def pointing_loss(model: Pointing, batch: JointBatch) -> tuple[mx.array, mx.array]:
    """``joint_loss`` plus the weighted squared distance of what is pointed at."""
    loss, count, states = _joint_loss(model.tutored, batch)
    named = states.flatten(0, 1)[mx.array(batch.mentions.tokens)]
    misses = (model.point(named) - mx.array(batch.mentions.places)).square().sum(-1)
    return loss + model.point_weight * misses.mean(), count


def _joint_loss(
    model: Tutored, batch: JointBatch
) -> tuple[mx.array, mx.array, mx.array]:
    features = model.mm1.vision(mx.array(batch.patches.pixels))
    image_tokens = list(model.mm1.connector(features))
    states = batch_states(model.mm1, batch.rows, image_tokens)
    balanced = batch.adjustment is not None
    adjustment = mx.array(batch.adjustment) if balanced else None
    answers, count = states_loss(model.mm1, batch.rows, states, adjustment)
    patches = patch_loss(model.heads, features, batch.patches, balanced=balanced)
    return answers + model.patch_weight * patches, count, states


class Conversations:
    """The batch of (step, shard): fresh pictures, each with several conversations.

    Odd steps caption as well: rows of like length waste little padding.
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
        left_out: list[tuple[int, ...]] = []
        for i in range(self.recipe.pictures_per_batch):
            scene = random_picture_scene(rng, self.stage.unnamed)
            scenes.append(scene)
            for conversation in self.talk(scene, rng, told=step % 2 == 1):
                samples.append(self.row(conversation))
                owners.append([i])
                for pair in conversation:
                    left_out += self._left_out(pair)
        rows = self.collate(samples, owners)
        patches = label_patches(scenes, self.recipe.config)
        mentions = self._mentions(rows, [scenes[i] for (i,) in owners])
        balanced = step >= self.stage.balance_from
        adjustment = self._adjustment.table(left_out) if balanced else None
        return JointBatch(rows, patches, adjustment, mentions)

    def collate(
        self, samples: Sequence[Sample], owners: Sequence[Sequence[int]]
    ) -> Batch:
        """The rows of samples about the pictures ``owners``."""
        image_id = self.tokenizer.image_id
        return collate(samples, owners, (), self.recipe.config, image_id)

    def talk(
        self, scene: Scene, rng: np.random.Generator, *, told: bool
    ) -> list[Conversation]:
        """Rows of questions about one picture; a caption opens the first if ``told``."""
        asked = ask(scene, rng, self.recipe.rows_per_picture * QUESTIONS_PER_ROW)
        if told:
            asked = [*_sayable([(*caption(scene, rng), None)]), *asked[:-1]]
        size = QUESTIONS_PER_ROW
        rows = [asked[i : i + size] for i in range(0, len(asked), size)]
        return [tuple(_vary(pair, rng) for pair in row) for row in rows]

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

    def _left_out(self, exchange: Exchange) -> list[tuple[int, ...]]:
        """The tokens left out of the score of every learned token of an exchange."""
        question, answer, about = exchange
        sample = self._sample((question, answer), False)
        learned = zip(sample.tokens, sample.learned, strict=True)
        return self._adjustment([t for t, flag in learned if flag], about)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[Exchange]:
    """At most ``count`` questions, up to half of them about where things are."""
    where: list[Exchange] = []
    others: list[Exchange] = []
    named = sum(o.colour != UNNAMED for o in scene.objects) / len(scene.objects)
    for _ in range(2):
        for q in [*questions(scene, rng), ask_place(scene, rng)]:
            if q is not None and (rng.random() < named or not _denies(q)):
                half = q.target is not None and q.kind in ("colour", "shape")
                about = q.target.pair if q.target is not None and half else None
                kind = where if q.kind in ("where", "place") else others
                kind.append((q.text, q.answer, about))
    where, others = _sayable(where), _sayable(others)
    rng.shuffle(others)
    rng.shuffle(where)
    asked = where[: count // 2]
    asked += others[: count - len(asked)]
    rng.shuffle(asked)
    return asked


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
