"""Pictures and texts to vectors of the space that CLIP's two towers share.

The nearness of a picture to the names of classes is a classifier without training
("zero-shot"). Everything runs on the thread that calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mm1_mlx.checkpoint import device_dtype, load_config, load_model
from mm1_mlx.config import MM1Config, PromptConfig, TextConfig
from mm1_mlx.errors import CheckpointError, ConfigError, PromptError
from mm1_mlx.image import ImageSource, load_pictures
from mm1_mlx.models import MM1
from mm1_mlx.runtime import find_model
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")

TEMPLATE = "a photo of a {}."
# Pictures or texts that pass a tower together.
BATCH = 16
# What a tokenizer is loaded from.
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
WAY_OUT = "convert a whole CLIP model, such as openai/clip-vit-large-patch14-336"

Vectors = NDArray[np.float32]


class Embedder:
    """A loaded model with a space that pictures, and mostly texts, are embedded in.

    Args:
        model: the MM1 module.
        path: the folder it came from.

    Raises:
        ConfigError: it has no such space.
    """

    def __init__(self, model: MM1, path: Path) -> None:
        self.model = model
        self.path = path
        self.config: MM1Config = model.config
        vision = self.config.vision
        if vision is None or vision.projection_size is None or not self.config.image:
            raise ConfigError(
                f"{path} has no space that pictures and texts share; {WAY_OUT}"
            )

    @property
    def text(self) -> TextConfig:
        """The text tower's config.

        Raises:
            ConfigError: there is none.
        """
        if self.config.text is None:
            raise ConfigError(f"{self.path} has no text tower; {WAY_OUT}")
        return self.config.text

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The text tower's tokenizer, loaded when first asked for.

        Raises:
            CheckpointError: its files are missing or damaged.
        """
        if not any((self.path / name).is_file() for name in TOKENIZERS):
            raise CheckpointError(
                f"{self.path} has no tokenizer, so it cannot embed texts; put the files "
                "of the model's tokenizer beside its source and convert it again"
            )
        # Its messages and pictures are of no concern here.
        config = PromptConfig(template="plain", image_token_id=0)
        tokenizer = load_tokenizer(self.path, config)
        # Texts that are too long are cut here: no warning is needed.
        tokenizer.hf.model_max_length = sys.maxsize
        return tokenizer


def load_embedder(
    source: str | Path | None = None, dtype: mx.Dtype | None = None
) -> Embedder:
    """A model ready to embed.

    Args:
        source: a model folder, or a hub repository in this format.
        dtype: of the weights; by default what the device computes quickly.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConfigError: it has no space that pictures and texts share.
    """
    path = find_model(source)
    # Before gigabytes are read.
    Embedder(MM1(load_config(path)), path)
    return Embedder(load_model(path, dtype or device_dtype), path)


def embed_images(
    embedder: Embedder, images: Sequence[ImageSource], first: int = 1
) -> Vectors:
    """Vectors [N, P] of length 1 of paths, bytes, data URIs or PIL images.

    Args:
        embedder: from ``load_embedder``.
        images: the pictures.
        first: the number of the first of them, as messages count.

    Raises:
        PromptError: a picture cannot be read.
    """
    config = embedder.config.image
    assert config is not None
    vectors = []
    for batch in _batches([*enumerate(images, start=first)]):
        # CLIP's space is one of whole pictures.
        pictures = (
            load_pictures([image], config, tiled=0, first=number)
            for number, image in batch
        )
        pixels = [picture.tiles[0] for (picture,) in pictures]
        x = embedder.model.vision.project(mx.array(np.stack(pixels)))
        vectors.append(_unit(x))
    return _joined(vectors, embedder)


def embed_texts(embedder: Embedder, texts: Sequence[str]) -> Vectors:
    """Vectors [B, P] of length 1; of a text that is too long its beginning counts.

    Raises:
        CheckpointError: the tokenizer is missing, or is not the text tower's.
        ConfigError: the model has no text tower.
    """
    config, vectors = embedder.text, []
    for batch in _batches(texts):
        tokens = [_tokens(embedder, text) for text in batch]
        longest = max(len(row) for row in tokens)
        rows = [row + [config.pad_token_id] * (longest - len(row)) for row in tokens]
        vectors.append(_unit(embedder.model.text(mx.array(rows))))
    return _joined(vectors, embedder)


def count_tokens(embedder: Embedder, texts: Sequence[str]) -> int:
    """How many tokens of the texts count."""
    return sum(len(_tokens(embedder, text)) for text in texts)


def classify(
    embedder: Embedder,
    images: Sequence[ImageSource],
    classes: Sequence[str],
    template: str = TEMPLATE,
) -> Vectors:
    """Probabilities [N, K] of classes, by the likeness of pictures to their names.

    Args:
        embedder: from ``load_embedder``.
        images: the pictures.
        classes: the classes' names.
        template: the text of a class, ``{}`` standing for its name.

    Raises:
        PromptError: there are no classes, or the template has no place for them.
    """
    if not classes:
        raise PromptError("there are no classes to choose from; give at least one")
    if "{}" not in template:
        raise PromptError(
            f"template {template!r} has no {{}} for the class, such as in {TEMPLATE!r}"
        )
    names = embed_texts(embedder, [template.replace("{}", name) for name in classes])
    pictures = embed_images(embedder, images)
    scale = mx.exp(embedder.model.text.logit_scale.astype(mx.float32))
    logits = scale * mx.array(pictures) @ mx.array(names).T
    return np.array(mx.softmax(logits, axis=-1))


def _tokens(embedder: Embedder, text: str) -> list[int]:
    """The text's tokens, its end among them even where it is cut."""
    config, tokenizer = embedder.text, embedder.tokenizer
    tokens = tokenizer.encode(tokenizer.shield(text), add_special_tokens=True)
    longest = config.max_position_embeddings
    if len(tokens) > longest:
        tokens = [*tokens[: longest - 1], tokens[-1]]
    end = config.eos_token_id
    if max(tokens, default=0) >= config.vocab_size or (
        end is not None and end not in tokens
    ):
        raise CheckpointError(
            f"{embedder.path}: the tokenizer's tokens are not the text tower's, of "
            f"{config.vocab_size} tokens and the end token {end}; convert the model "
            "with its own tokenizer"
        )
    return tokens or [config.pad_token_id]


def _unit(x: mx.array) -> Vectors:
    x = x.astype(mx.float32)
    return np.array(x / mx.linalg.norm(x, axis=-1, keepdims=True))


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def _joined(vectors: list[Vectors], embedder: Embedder) -> Vectors:
    vision = embedder.config.vision
    assert vision is not None
    return np.concatenate(
        [np.zeros((0, vision.projection_size or 0)), *vectors]
    ).astype(np.float32)
