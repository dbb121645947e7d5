"""A conversation as training targets: every assistant turn, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.layout import Picture, Span
from mm1_mlx.messages import Region, RegionToken, Turn
from mm1_mlx.prompt import check_vocabulary, encode_turns, widen
from mm1_mlx.tokenizer import Tokenizer

# A picture of one tile that somebody else encodes.
_UNSEEN = Picture((np.zeros((1, 1, 3), np.float32),), (1, 1), "")
_NO_REGIONS = "training knows no regions yet, write coordinates as text"


@dataclass(frozen=True)
class Sample:
    """Tokens of a conversation, one image token per picture, and which are learned."""

    tokens: tuple[int, ...]
    # Whether the token is a target: part of an assistant turn, its end included.
    learned: tuple[bool, ...]


def build_sample(
    turns: Sequence[Turn], config: MM1Config, tokenizer: Tokenizer
) -> Sample:
    """The sample of a conversation.

    A turn's targets are the tokens by which the conversation with the turn exceeds the
    one that stops where the assistant is about to answer.

    Raises:
        PromptError: the template or tokenizer rewrites earlier tokens as turns follow, or
            a turn refers to a region of a picture.
    """
    if config.prompt is None:
        raise ConfigError("the model has no prompt format, so it cannot be trained")
    for i, (_, parts) in enumerate(turns):
        if any(isinstance(part, Region | RegionToken) for part in parts):
            raise PromptError(
                f"turn {i + 1} refers to a region of a picture; {_NO_REGIONS}"
            )
    tokens = encode_turns(turns, config.prompt, tokenizer, answer=False)
    learned = [False] * len(tokens)
    for i, (role, _) in enumerate(turns):
        if role != "assistant":
            continue
        before = encode_turns(turns[:i], config.prompt, tokenizer)
        after = encode_turns(turns[: i + 1], config.prompt, tokenizer, answer=False)
        if tokens[: len(after)] != after or after[: len(before)] != before:
            raise PromptError(
                f"turn {i + 1} cannot be told apart: the chat template or tokenizer "
                "writes earlier turns differently when later ones follow"
            )
        learned[len(before) : len(after)] = [True] * (len(after) - len(before))
    return Sample(tuple(tokens), tuple(learned))


@dataclass(frozen=True)
class Batch:
    """Rows of equal length, padded on the right, and the pictures they refer to."""

    tokens: NDArray[np.int32]  # [B, T]
    learned: NDArray[np.bool_]  # [B, T]
    # Positions count through the flattened [B * T]; several rows may share a picture.
    spans: tuple[Span, ...]
    pictures: tuple[Picture, ...]
    # Of every row, without its padding.
    lengths: tuple[int, ...]

    @property
    def real(self) -> NDArray[np.bool_]:
        """Which tokens [B, T] are not padding."""
        return np.arange(self.tokens.shape[1]) < np.array(self.lengths)[:, None]


def collate(
    samples: Sequence[Sample],
    places: Sequence[Sequence[int]],
    pictures: Sequence[Picture],
    config: MM1Config,
    tokenizer: Tokenizer,
) -> Batch:
    """The batch of several samples.

    Args:
        samples: one per row.
        places: for every row, the indices of its pictures in ``pictures``.
        pictures: all pictures; none where the caller encodes them, one tile each.
        config: the model's config.
        tokenizer: the one that made the samples.

    Raises:
        PromptError: a sample holds a token that the decoder has no embedding for, or one
            of a region.
    """
    rows, masks, spans = [], [], []
    for number, (sample, indices) in enumerate(zip(samples, places, strict=True)):
        if tokenizer.region_id in sample.tokens:
            raise PromptError(
                f"sample {number + 1} holds a region's token; {_NO_REGIONS}"
            )
        check_vocabulary(sample.tokens, config, (tokenizer.image_id,))
        row: list[int] = []
        mask: list[bool] = []
        held: list[Span] = []
        count = 0
        for token, learned in zip(sample.tokens, sample.learned, strict=True):
            if token != tokenizer.image_id:
                row.append(token)
                mask.append(learned)
                continue
            index = indices[count]
            # Stands for one tile where the caller encodes the pictures.
            picture = pictures[index] if pictures else _UNSEEN
            widened, inner = widen(picture, count, config, tokenizer)
            held += [replace(s, start=len(row) + s.start, picture=index) for s in inner]
            row += widened
            mask += [False] * len(widened)
            count += 1
        assert count == len(indices), "a row's pictures and places differ in number"
        rows.append(row)
        masks.append(mask)
        spans.append(held)
    T = max(map(len, rows))
    flat = tuple(
        replace(span, start=b * T + span.start)
        for b, held in enumerate(spans)
        for span in held
    )
    return Batch(
        tokens=_pad(rows, T, np.int32),
        learned=_pad(masks, T, np.bool_),
        spans=flat,
        pictures=tuple(pictures),
        lengths=tuple(map(len, rows)),
    )


def _pad(rows: Sequence[Sequence[Any]], length: int, dtype: Any) -> NDArray[Any]:
    padded = np.zeros((len(rows), length), dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
