"""A point's batches, for the trainer: rows of text and the pictures that stand in them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.lessons.documents import (
    LONE,
    asked,
    captioned,
    document,
    lesson_scene,
    text,
)
from benchmarks.lessons.points import Form
from benchmarks.shapes.documents import Part
from benchmarks.shapes.draw import draw
from benchmarks.shapes.recipe import picture_rng
from benchmarks.shapes.scene import Scene
from mm1_mlx.config import MM1Config
from mm1_mlx.image import load_picture
from mm1_mlx.messages import Turn
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.sample import (
    Batch,
    Sample,
    build_document,
    build_sample,
    collate,
)

# Of a batch: captions or texts, of which documents are half as many and show as many
# pictures between them; and conversations.
ROWS = 24
ASKED = 16

FORMS: tuple[Form, Form, Form] = ("captions", "interleaved", "texts")


class Documents:
    """The batch of (step, shard), of one form each, in the shares of a mix."""

    def __init__(
        self,
        config: MM1Config,
        tokenizer: Tokenizer,
        seed: int,
        mix: tuple[int, int, int],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self.mix = mix

    def __call__(self, step: int, shard: int) -> Batch:
        rng = picture_rng(self.seed, step, shard)
        form = form_of(step, self.mix)
        if form == "texts":
            return self._batch([], [text(rng) for _ in range(ROWS)])
        if form == "captions":
            scenes = [lesson_scene(rng) for _ in range(ROWS)]
            return self._batch(scenes, [captioned(scenes, i) for i in range(ROWS)])
        scenes = [lesson_scene(rng, counts=(1,)) for _ in range(LONE)]
        scenes += [lesson_scene(rng) for _ in range(ROWS - LONE)]
        return self._batch(scenes, [document(scenes, rng) for _ in range(ROWS // 2)])

    def _batch(
        self, scenes: Sequence[Scene], documents: Sequence[Sequence[Part]]
    ) -> Batch:
        samples, places = [], []
        for parts in documents:
            held = [None if isinstance(part, int) else part for part in parts]
            samples.append(build_document(held, self.config, self.tokenizer))
            places.append([part for part in parts if isinstance(part, int)])
        return shown(samples, places, scenes, self.config, self.tokenizer)


class Questions:
    """The batch of (step, shard): conversations, each about a picture of its own."""

    def __init__(self, config: MM1Config, tokenizer: Tokenizer, seed: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed

    def __call__(self, step: int, shard: int) -> Batch:
        rng = picture_rng(self.seed, step, shard)
        scenes = [lesson_scene(rng) for _ in range(ASKED)]
        samples = []
        for scene in scenes:
            turns: list[Turn] = []
            for q in asked(scene, rng):
                turns.append(("user", [q.text] if turns else [None, q.text]))
                turns.append(("assistant", [q.answer]))
            samples.append(build_sample(turns, self.config, self.tokenizer))
        places = [[i] for i in range(ASKED)]
        return shown(samples, places, scenes, self.config, self.tokenizer)


def form_of(step: int, mix: tuple[int, int, int]) -> Form:
    """What the batch of a step is of: in any stretch of steps, as near the mix as can be.

    Every step has the form that lags most behind its share.
    """
    total = sum(mix)
    given = [0, 0, 0]
    for number in range(1, step + 2):
        lags = [share * number / total - n for share, n in zip(mix, given, strict=True)]
        chosen = lags.index(max(lags))
        given[chosen] += 1
    return FORMS[chosen]


def shown(
    samples: Sequence[Sample],
    places: Sequence[Sequence[int]],
    scenes: Sequence[Scene],
    config: MM1Config,
    tokenizer: Tokenizer,
) -> Batch:
    """The batch of samples, with those of the scenes that they show, drawn."""
    assert config.image is not None
    used = sorted({place for held in places for place in held})
    pictures = [load_picture(draw(scenes[i]), config.image) for i in used]
    numbers = {place: number for number, place in enumerate(used)}
    kept = [[numbers[place] for place in held] for held in places]
    return collate(samples, kept, pictures, config, tokenizer)
