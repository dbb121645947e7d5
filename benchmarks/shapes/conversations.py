"""The second stage: conversations about pictures, patches still labelled beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks.shapes.patches import PatchBatch, PatchHeads, label_patches, patch_loss
from benchmarks.shapes.questions import caption, questions
from benchmarks.shapes.recipe import Recipe, picture_rng, random_picture_scene
from benchmarks.shapes.scene import UNNAMED, Scene
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Turn
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.loss import answer_loss
from mm1_mlx.train.sample import Batch, Sample, build_sample, collate

# Share of the questions in lower case.
LOWER_CASE = 0.15

Conversation = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class JointBatch:
    """Rows of conversations, and the labelled pictures they refer to."""

    rows: Batch
    patches: PatchBatch


class Tutored(nn.Module):
    """A model whose encoder goes on answering for its patches while it trains."""

    def __init__(self, mm1: MM1, heads: PatchHeads, patch_weight: float) -> None:
        super().__init__()
        self.mm1 = mm1
        self.heads = heads
        self.patch_weight = patch_weight


def joint_loss(model: Tutored, batch: JointBatch) -> tuple[mx.array, mx.array]:
    """Loss of the answers plus the weighted loss of the patches; answer tokens."""
    features = model.mm1.vision(mx.array(batch.patches.pixels))
    image_tokens = list(model.mm1.connector(features))
    answers, count = answer_loss(model.mm1, batch.rows, image_tokens)
    patches = patch_loss(model.heads, features, batch.patches)
    return answers + model.patch_weight * patches, count


class Conversations:
    """The batch of (step, shard): fresh pictures, each with several conversations.

    Even steps ask single questions, odd steps caption and hold longer conversations:
    rows of like length waste little padding.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self._sample = lru_cache(maxsize=100_000)(self._build)

    def __call__(self, step: int, shard: int) -> JointBatch:
        rng = picture_rng(self.recipe.train.seed, step, shard)
        scenes, samples, owners = [], [], []
        for i in range(self.recipe.pictures_per_step):
            scene = random_picture_scene(rng)
            scenes.append(scene)
            for conversation in self._conversations(scene, rng, single=step % 2 == 0):
                samples.append(self._sample(conversation))
                owners.append([i])
        config = self.recipe.config
        rows = collate(samples, owners, (), config, self.tokenizer.image_id)
        return JointBatch(rows, label_patches(scenes, config))

    def _conversations(
        self, scene: Scene, rng: np.random.Generator, *, single: bool
    ) -> list[Conversation]:
        """Rows of one question, or of a caption and of two questions."""
        asked = [(q.text, q.answer) for q in questions(scene, rng)]
        told = [caption(scene, rng)]
        # What has no name is not talked about; what is asked must not need it.
        asked = [pair for pair in asked if UNNAMED not in " ".join(pair).lower()]
        told = [pair for pair in told if UNNAMED not in " ".join(pair).lower()]
        rng.shuffle(asked)
        if single:
            rows = [[pair] for pair in asked[: self.recipe.rows_per_picture]]
        else:
            rows = [told, asked[:2]]
        return [tuple(_vary(pair, rng) for pair in row) for row in rows if row]

    def _build(self, pairs: Conversation) -> Sample:
        turns: list[Turn] = []
        for i, (question, answer) in enumerate(pairs):
            picture: list[str | None] = [None] if i == 0 else []
            turns += [("user", [*picture, question]), ("assistant", [answer])]
        return build_sample(turns, self.recipe.config, self.tokenizer)


def _vary(pair: tuple[str, str], rng: np.random.Generator) -> tuple[str, str]:
    """The pair as people also type it."""
    question, answer = pair
    return (question.lower(), answer) if rng.random() < LOWER_CASE else pair
