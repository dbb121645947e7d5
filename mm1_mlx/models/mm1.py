"""MM1 = vision x connector x decoder, in mlx-lm's language-model protocol.

mlx-lm's ``generate_step``, caches and samplers drive it unchanged; a picture enters as
``input_embeddings``.
"""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.layout import Span, TileGroup
from mm1_mlx.models.connector import CONNECTORS
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.vision import ENCODERS


class MM1(nn.Module):
    """Logits [B, T, V] for tokens [B, T], or for embeddings [B, T, D] in their place.

    A part that the config leaves out is missing: an encoder alone, a decoder alone.
    """

    def __init__(self, config: MM1Config) -> None:
        super().__init__()
        self.config = config
        if config.vision:
            self.vision = ENCODERS[config.vision.kind](config.vision)
        if config.connector:
            # The table's classes each take their own config; the kind pairs them.
            self.connector = CONNECTORS[config.connector.kind](config.connector)
        if config.decoder:
            self.decoder = Decoder(config.decoder)

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

    def encode(self, groups: Sequence[TileGroup]) -> list[mx.array]:
        """Image tokens [T_i, D] of every picture.

        Args:
            groups: the pictures' tiles by resolution, from ``layout.group_tiles``.
        """
        for part in ("vision", "connector"):
            if groups and part not in self:
                raise ConfigError(f"the model has no {part}, so it cannot see pictures")
        tiles: dict[tuple[int, int], mx.array] = {}
        for group in groups:
            tokens = self.connector(self.vision(mx.array(group.pixels)))  # [N, K, D]
            tiles.update(zip(group.places, tokens, strict=True))
        pictures: dict[int, list[mx.array]] = {}
        for picture, tile in sorted(tiles):
            pictures.setdefault(picture, []).append(tiles[picture, tile])
        return [arrange(pictures[i]) for i in range(len(pictures))]

    def embed(
        self, tokens: mx.array, image_tokens: Sequence[mx.array], spans: Sequence[Span]
    ) -> mx.array:
        """Embeddings [T, D] of tokens [T] with image tokens in the spans' places.

        Raises:
            PromptError: the spans and the image tokens do not fit together.
        """
        embeddings = self.decoder.embed_tokens(tokens)
        if not spans:
            return embeddings
        # Row t of the result is row index[t] of the text followed by the pictures.
        index = np.arange(tokens.size)
        row = tokens.size
        starts = [row]
        for picture in image_tokens:
            row += picture.shape[0]
            starts.append(row)
        for span in spans:
            if span.picture >= len(image_tokens):
                raise PromptError(
                    f"prompt has a place for picture {span.picture + 1} but "
                    f"{len(image_tokens)} pictures were given"
                )
            start, stop = starts[span.picture : span.picture + 2]
            if span.length != stop - start:
                raise PromptError(
                    f"picture {span.picture + 1} has {stop - start} image tokens but "
                    f"the prompt holds {span.length} places for it"
                )
            index[span.start : span.stop] = np.arange(start, stop)
        images = [x.astype(embeddings.dtype) for x in image_tokens]
        return mx.concatenate([embeddings, *images])[mx.array(index)]


def named_tensors(module: nn.Module) -> dict[str, mx.array]:
    """Every weight of a module by its path."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(module.parameters())))


def arrange(tiles: Sequence[mx.array]) -> mx.array:
    """Image tokens [T, D] of one picture from its tiles' [K, D], in order."""
    return tiles[0] if len(tiles) == 1 else mx.concatenate(list(tiles))
