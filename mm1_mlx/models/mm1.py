"""MM1 = vision x connector x decoder, in mlx-lm's language-model protocol.

mlx-lm's ``generate_step``, caches and samplers drive it unchanged; a picture enters as
``input_embeddings``.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mm1_mlx.caches.quantized import KVCache
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.layout import Picture, Span, group_tiles
from mm1_mlx.models import parallel
from mm1_mlx.models.arrange import arrange
from mm1_mlx.models.connector import build_connector
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.region import RegionSampler
from mm1_mlx.models.text import TextEncoder
from mm1_mlx.models.vision import VisionEncoder


class MM1(nn.Module):
    """Logits [B, T, V] for tokens [B, T], or for embeddings [B, T, D] in their place.

    A part that the config leaves out is missing: an encoder alone, a decoder alone.
    """

    def __init__(self, config: MM1Config) -> None:
        super().__init__()
        self.config = config
        # That each hold a part of the decoder's layers.
        self.processes = 1
        if config.vision:
            self.vision = VisionEncoder(config.vision)
        if config.connector:
            self.connector = build_connector(config.connector)
        if config.region:
            self.region = RegionSampler(config.region)
        if config.decoder:
            self.decoder = Decoder(config.decoder)
        if config.text:
            self.text = TextEncoder(config.text)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        return self.decoder(inputs, cache, input_embeddings)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's blocks: one cache each."""
        return self.decoder.layers

    def tensors(self) -> dict[str, mx.array]:
        """Every weight by its path, which is its name on disk."""
        return named_tensors(self)

    def make_cache(self) -> list[Any]:
        """An empty key-value cache per decoder block."""
        return [KVCache() for _ in self.layers]

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Keep this process's part of the decoder's layers; ``parallel.py``."""
        group = group or mx.distributed.init()
        parallel.shard(self.decoder, group)
        self.processes = group.size()

    def encode(
        self,
        pictures: Sequence[Picture],
        image_tokens: Callable[[NDArray[np.float32]], mx.array] | None = None,
    ) -> list[mx.array]:
        """Image tokens [T_i, D] of every picture, those of its regions last.

        Args:
            pictures: what is seen.
            image_tokens: of tiles [N, H, W, 3] those [N, K, D] of encoder and connector,
                where something else computes them.

        Raises:
            ConfigError: the model has not the parts for it.
        """
        if image_tokens is not None:
            return self._encode_elsewhere(pictures, image_tokens)
        for part in ("vision", "connector"):
            if pictures and part not in self:
                raise ConfigError(f"the model has no {part}, so it cannot see pictures")
        tokens: dict[tuple[int, int], mx.array] = {}
        features: dict[tuple[int, int], mx.array] = {}
        for group in group_tiles(pictures):
            seen = self.vision(mx.array(group.pixels))  # [N, L, C]
            tokens.update(zip(group.places, self.connector(seen), strict=True))
            features.update(zip(group.places, seen, strict=True))
        return [
            self._join(
                picture,
                [tokens[i, j] for j in range(len(picture.tiles))],
                [features[i, j] for j in range(len(picture.tiles))],
            )
            for i, picture in enumerate(pictures)
        ]

    def _encode_elsewhere(
        self,
        pictures: Sequence[Picture],
        image_tokens: Callable[[NDArray[np.float32]], mx.array],
    ) -> list[mx.array]:
        if any(picture.regions for picture in pictures):
            raise ConfigError(
                "regions are read off patch features, which are not there; ask with "
                "--vision-backend mlx, or refer to boxes in text"
            )
        tokens: dict[tuple[int, int], mx.array] = {}
        for group in group_tiles(pictures):
            tokens.update(zip(group.places, image_tokens(group.pixels), strict=True))
        return [
            self._join(picture, [tokens[i, j] for j in range(len(picture.tiles))], [])
            for i, picture in enumerate(pictures)
        ]

    def _join(
        self, picture: Picture, tokens: list[mx.array], features: list[mx.array]
    ) -> mx.array:
        """The image tokens of one picture's tiles and regions, in order."""
        image = self.config.image
        joined = arrange(
            tokens,
            picture,
            image.tiling if image else None,
            self.connector.newline if "newline" in self.connector else None,
        )
        if not picture.regions:
            return joined
        if "region" not in self:
            raise ConfigError("the model has no region sampler; refer to boxes in text")
        return mx.concatenate([joined, self.region(features, picture)])

    def embed(
        self, tokens: mx.array, image_tokens: Sequence[mx.array], spans: Sequence[Span]
    ) -> mx.array:
        """Embeddings [T, D] of tokens [T] with image tokens in the spans' places.

        Raises:
            PromptError: the spans and the image tokens do not fit together.
        """
        embeddings = self.decoder.embed(tokens)
        if not spans:
            return embeddings
        # Row t of the result is row index[t] of the text followed by the pictures.
        index = np.arange(tokens.size)
        row = tokens.size
        starts = [row]
        for picture in image_tokens:
            row += picture.shape[0]
            starts.append(row)
        _check_lengths(spans, [x.shape[0] for x in image_tokens])
        for span in spans:
            start = starts[span.picture] + span.offset
            index[span.start : span.stop] = np.arange(start, start + span.length)
        images = [x.astype(embeddings.dtype) for x in image_tokens]
        return mx.concatenate([embeddings, *images])[mx.array(index)]


def named_tensors(module: nn.Module) -> dict[str, mx.array]:
    """Every weight of a module by its path."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))


def _check_lengths(spans: Sequence[Span], lengths: Sequence[int]) -> None:
    """Pass only if the spans of every picture end where its image tokens end."""
    held: dict[int, int] = {}
    for span in spans:
        if span.picture >= len(lengths):
            raise PromptError(
                f"prompt has a place for picture {span.picture + 1} but "
                f"{len(lengths)} pictures were given"
            )
        last = span.offset + span.length
        held[span.picture] = max(held.get(span.picture, 0), last)
    for picture, places in held.items():
        if places != lengths[picture]:
            raise PromptError(
                f"picture {picture + 1} has {lengths[picture]} image tokens but "
                f"the prompt holds {places} places for it"
            )
