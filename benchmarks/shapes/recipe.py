"""The embedded model's recipe: its config, its tokenizer and the pictures it sees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from benchmarks.shapes.corpus import sentences
from benchmarks.shapes.scene import Scene, pick, random_scene, recolour, split_rng
from mm1_mlx.config import MM1Config
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.train.config import TrainConfig

RECIPE = Path(__file__).with_name("recipe.json")
SPECIALS = ("<pad>", "</s>", "<image>")
# Tokens of their own: else their pairs of capitals would be tokens of drawn words too.
ROLES = ("USER:", "ASSISTANT:")
VOCAB_SIZE = 640
# Share of the pictures drawn at the model's size.
NATIVE_SIZE = 0.6


Form = Literal[
    "questions",
    "pairs",
    "reading",
    "parts",
    "episodes",
    "talks",
    "captions",
    "documents",
]


@dataclass(frozen=True)
class Stage:
    """A run of the trainer; the next one goes on with its weights."""

    name: str
    # Labels of patches, or rows of text beside them.
    task: Literal["patches", "rows"]
    train: TrainConfig
    # Of a picture's objects, those in colours without a name: each share as likely.
    unnamed: tuple[float, ...]
    # Of every micro-batch of a step, the forms that it takes in turn.
    forms: tuple[tuple[Form, ...], ...] = ()
    # Of a micro-batch.
    pictures: int = 32
    # Examples of new words, talks or documents in a micro-batch of theirs.
    episodes: int = 24
    # How many questions about the same pictures follow one another, each as likely.
    turns: tuple[int, ...] = (1,)
    # Share of those examples in which a word's show all the same.
    alike: float = 0.0
    # Share of the others in which a word is shown of one pair, and asked for of another.
    narrow: float = 0.0
    # Whether questions that tell something of pairs not shown are left out.
    fair: bool = False
    # What is added to the score of a no where it is asked whether something is there.
    doubt: float = 0.0
    # And to that of a number, for every one by which it is less than six.
    doubt_few: float = 0.0
    # What a no gives of its target to a yes there, and a number to the one above it.
    soften_no: float = 0.0
    soften_number: float = 0.0
    # Whether numbers are doubted and softened only where a colour or a shape is named.
    doubt_some: bool = False
    # Whether the state before a thing is named in an answer has to tell where it is.
    point_ahead: bool = False
    # Share of the talks in which pictures stand behind the first question about them.
    behind: float = 0.0
    # Rows beside a batch of talks about things of all pairs that are told in words.
    told: int = 0
    # Of the questions of a kind, those that are asked; all where nothing is said.
    shares: Mapping[str, float] = field(default_factory=dict)
    # A row of n learned tokens counts as n to the power of 1 less this.
    row_power: float = 0.5
    # What the rows of a form count, 1 where nothing is said.
    weights: Mapping[str, float] = field(default_factory=dict)
    # Forms whose pictures the encoder does not learn from, which takes a third of the time.
    only_seen: tuple[Form, ...] = ()
    # Whether the encoder stays as it is.
    freeze_vision: bool = False
    # Of the sines and cosines that the connector's positions begin with.
    position_scale: float = 0.0
    # Weights that were kept, of which its own become the mean at its end: "sft-13-000100" are
    # those behind step 100 of sft-13, and at step 0 a stage begins.
    averaged: tuple[str, ...] = ()
    # The step that it was ended at, before its schedule would have ended it.
    until: int | None = None

    @property
    def end(self) -> int:
        """The step that it ends at."""
        return self.until or self.train.steps


@dataclass(frozen=True)
class Recipe:
    """``recipe.json``, read."""

    config: MM1Config
    stages: tuple[Stage, ...]
    questions_per_picture: int
    patch_weight: float
    point_weight: float
    attribute_weight: float
    match_weight: float


def load_recipe() -> Recipe:
    """The committed recipe."""
    values = json.loads(RECIPE.read_text())
    config, train = make_config(values.pop("model")), values.pop("train")
    stages = []
    for stage in values.pop("stages"):
        stage["train"] = TrainConfig(**train | stage["train"])
        stage["unnamed"] = tuple(stage["unnamed"])
        stage["forms"] = tuple(map(tuple, stage.get("forms", ())))
        stage["only_seen"] = tuple(stage.get("only_seen", ()))
        stage["averaged"] = tuple(stage.get("averaged", ()))
        stage["turns"] = tuple(stage.get("turns", (1,)))
        stages.append(Stage(**stage))
    return Recipe(config, tuple(stages), **values)


def make_config(parts: Mapping[str, Mapping[str, Any]]) -> MM1Config:
    """The config of sections that say what the others, and the tokenizer, leave open."""
    vision, decoder = parts["vision"], parts["decoder"]
    size = vision["image_size"]
    defaults = {
        "connector": {
            "input_size": vision["hidden_size"],
            "num_features": (size // vision["patch_size"]) ** 2,
            "output_size": decoder["hidden_size"],
        },
        "decoder": {
            "vocab_size": VOCAB_SIZE,
            "head_dim": decoder["hidden_size"] // decoder["num_attention_heads"],
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        "image": {"size": size, "mean": list(CLIP_MEAN), "std": list(CLIP_STD)},
    }
    sections = {
        name: {**defaults.get(name, {}), **part} for name, part in parts.items()
    }
    prompt = {"template": "llava", "image_token_id": SPECIALS.index("<image>")}
    return MM1Config.from_dict(sections | {"prompt": prompt})


def train_tokenizer(folder: Path, num_scenes: int = 3000) -> None:
    """Write a byte-level BPE of the generator's own sentences into ``folder``.

    Digits and what is drawn stay single characters: they are spelled, not known by heart.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, normalized=False) for name in ROLES])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(ROLES),
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences(num_scenes), trainer)
    backend.add_tokens([AddedToken(name, normalized=False) for name in ROLES])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def picture_rng(seed: int, step: int, shard: int) -> np.random.Generator:
    """The generator of one micro-batch, of the training split."""
    return split_rng("train", 1 + (seed * 2**32 + step) * 16 + shard)


def random_picture_scene(
    rng: np.random.Generator, unnamed_shares: Sequence[float]
) -> Scene:
    """A training scene, mostly of the model's size."""
    scene = random_scene(rng, short_side=picture_side(rng))
    return recolour(scene, pick(rng, unnamed_shares), rng)


def picture_side(rng: np.random.Generator) -> int:
    """A picture's short side in pixels, mostly the model's."""
    return 96 if rng.random() < NATIVE_SIZE else int(rng.integers(64, 193))


def open_tokenizer(folder: Path, config: MM1Config) -> Tokenizer:
    """The recipe's tokenizer, trained into ``folder`` if it is not there yet."""
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(folder)
    assert config.prompt is not None
    return load_tokenizer(folder, config.prompt)
