"""Rows that share what stands before them: a picture is read once for all its questions.

A prompt about a picture begins alike whatever is asked, so the decoder reads that much,
the prefix, once, and every row attends to its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask
from numpy.typing import NDArray

from benchmarks.shapes.mentions import Mentions
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.train.sample import Batch


@dataclass(frozen=True)
class Examples:
    """Things in a prompt that are named behind them, in rows of T tokens.

    Tokens are counted through the flattened rows.
    """

    # [M]: the tokens at which the decoder has to know what is shown, and its classes.
    tokens: NDArray[np.int32]
    shapes: NDArray[np.int32]
    colours: NDArray[np.int32]
    # [Q]: the tokens behind which a name that was told before is read.
    queries: NDArray[np.int32]
    # [Q, T]: where in that row earlier examples have what is read there.
    told: NDArray[np.bool_]


@dataclass(frozen=True)
class Rows:
    """Rows of like length, and what their loss is made of."""

    batch: Batch
    # [learned tokens, V]: what balances their scores.
    adjustment: NDArray[np.float32]
    # [learned tokens]: how much each counts.
    weights: NDArray[np.float32]
    # [learned tokens]: what takes a share of each as a target, and that share.
    rivals: NDArray[np.int32]
    shares: NDArray[np.float32]
    mentions: Mentions
    # [B]: the prefix of each; None where rows have none.
    owners: NDArray[np.int32] | None = None
    examples: Examples | None = None


class Recorder:
    """A cache of one layer that keeps what it is given."""

    offset = 0
    keys: mx.array
    values: mx.array

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The keys and values [B, H, P, D] as they came."""
        self.keys, self.values = keys, values
        return keys, values


class Behind:
    """A cache of one layer for rows [R] that each stand behind one of the prefixes."""

    def __init__(self, prefix: Recorder, owners: mx.array) -> None:
        self.keys, self.values = prefix.keys[owners], prefix.values[owners]
        self.offset = prefix.keys.shape[2]

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The prefix's keys and values with these behind them."""
        return (
            mx.concatenate([self.keys, keys], axis=2),
            mx.concatenate([self.values, values], axis=2),
        )


def layer_states(
    decoder: Decoder, x: mx.array, caches: Sequence[Any] | None = None
) -> list[mx.array]:
    """The states [B, T, D] behind every block, not normed."""
    held = caches or [None] * len(decoder.layers)
    mask = create_attention_mask(x, held[0])
    states = []
    for layer, cache in zip(decoder.layers, held, strict=True):
        x, _ = layer(x, mask, cache)
        states.append(x)
    return states
