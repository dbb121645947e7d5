"""The embedded model's recipe: its config, its tokenizer and the pictures it sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.shapes.questions import caption, questions
from benchmarks.shapes.scene import Scene, pick, random_scene, recolour, split_rng
from mm1_mlx.config import MM1Config
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.train.config import TrainConfig

RECIPE = Path(__file__).with_name("recipe.json")
SPECIALS = ("<pad>", "</s>", "<image>")
VOCAB_SIZE = 512
# Share of the pictures drawn at the model's size.
NATIVE_SIZE = 0.6


@dataclass(frozen=True)
class Stage:
    """A run of the trainer; the next one goes on with its weights."""

    name: str
    # Labels of patches, or conversations beside them.
    task: Literal["patches", "conversations"]
    train: TrainConfig
    # Of a picture's objects, those in colours without a name: each share as likely.
    unnamed: tuple[float, ...]
    # Of the sines and cosines that the connector's positions begin with.
    position_scale: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """``recipe.json``, read."""

    config: MM1Config
    stages: tuple[Stage, ...]
    pictures_per_batch: int
    questions_per_picture: int
    patch_weight: float
    point_weight: float


def load_recipe() -> Recipe:
    """The committed recipe."""
    values = json.loads(RECIPE.read_text())
    config, train = _config(values.pop("model")), values.pop("train")
    stages = []
    for stage in values.pop("stages"):
        stage["train"] = TrainConfig(**train, **stage["train"])
        stage["unnamed"] = tuple(stage["unnamed"])
        stages.append(Stage(**stage))
    return Recipe(config, tuple(stages), **values)


def _config(parts: dict[str, dict[str, Any]]) -> MM1Config:
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
    sections = {name: defaults.get(name, {}) | part for name, part in parts.items()}
    prompt = {"template": "llava", "image_token_id": SPECIALS.index("<image>")}
    return MM1Config.from_dict(sections | {"prompt": prompt})


def train_tokenizer(folder: Path, num_scenes: int = 4000) -> None:
    """Write a byte-level BPE of the generator's own sentences into ``folder``."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sentences(num_scenes), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
    )
    fast.save_pretrained(folder)


def _sentences(num_scenes: int) -> list[str]:
    rng = split_rng("train", 0)
    sentences = []
    for _ in range(num_scenes):
        scene = random_scene(rng)
        pairs = [(q.text, q.answer) for q in questions(scene, rng)]
        for question, answer in [*pairs, caption(scene, rng)]:
            turn = f"USER: \n{question} ASSISTANT: {answer}"
            sentences += [turn, turn.lower()]
    return sentences


def picture_rng(seed: int, step: int, shard: int) -> np.random.Generator:
    """The generator of one micro-batch, of the training split."""
    return split_rng("train", 1 + (seed * 2**32 + step) * 16 + shard)


def random_picture_scene(
    rng: np.random.Generator, unnamed_shares: Sequence[float]
) -> Scene:
    """A training scene, mostly of the model's size."""
    short_side = 96 if rng.random() < NATIVE_SIZE else int(rng.integers(64, 193))
    scene = random_scene(rng, short_side=short_side)
    return recolour(scene, pick(rng, unnamed_shares), rng)


def open_tokenizer(folder: Path, config: MM1Config) -> Tokenizer:
    """The recipe's tokenizer, trained into ``folder`` if it is not there yet."""
    if not (folder / "tokenizer.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer(folder)
    assert config.prompt is not None
    return load_tokenizer(folder, config.prompt)
