"""Positions that a connector can be started with."""

import mlx.core as mx
import numpy as np


def sine_cosine_positions(grid: int, width: int) -> mx.array:
    """Sines and cosines [grid * grid, width] of a square's columns, then of its rows.

    Centred over the square. Wavelengths run from 2 pi to 2 pi times the grid's side, so
    that near and far places differ.

    Source: arXiv 1706.03762, section 3.5, for two directions as in arXiv 2111.06377.
    """
    frequencies = grid ** -np.linspace(0, 1, width // 4, endpoint=False)
    angles = np.arange(grid)[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns = np.broadcast_to(waves, (grid, grid, width // 2))
    rows = columns.transpose(1, 0, 2)
    table = np.concatenate([columns, rows], axis=-1).reshape(grid * grid, width)
    return mx.array((table - table.mean(axis=0)).astype(np.float32))
