"""Optimizers: which weights each one is for, and what it keeps of them."""

from __future__ import annotations

from math import prod
from typing import Literal, get_args

import mlx.core as mx

from mm1_mlx.errors import ConfigError

Name = Literal["adamw", "muon", "adafactor"]


def is_matrix(path: str, tensor: mx.array) -> bool:
    """Whether a weight maps vectors to vectors, which an embedding table does not."""
    return _is_matrix(path, tuple(tensor.shape))


def kept_numbers(optimizer: str, path: str, shape: tuple[int, ...]) -> int:
    """How many numbers an optimizer keeps of a weight, from step to step.

    AdamW two of every number; Muon one of a matrix's, and AdamW what is none; AdaFactor
    the sums of rows and columns.

    Raises:
        ConfigError: there is no such optimizer.
    """
    match optimizer:
        case "adamw":
            return 2 * prod(shape)
        case "muon":
            return (1 if _is_matrix(path, shape) else 2) * prod(shape)
        case "adafactor" if len(shape) < 2:
            return prod(shape)
        case "adafactor":
            return prod(shape[:-1]) + prod((*shape[:-2], shape[-1]))
    raise ConfigError(f"optimizer {optimizer!r} is not one of {list(get_args(Name))}")


def _is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and "embed_tokens" not in path and "position" not in path
