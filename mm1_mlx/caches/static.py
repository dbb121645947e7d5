"""A key-value cache of a fixed size, whose position is an array: what a trace can hold."""

from __future__ import annotations

import mlx.core as mx


class StaticKVCache:
    """Keys and values of a layer with room for ``capacity`` positions from the start.

    Args:
        keys: [B, Hkv, capacity, D]; what lies from ``offset`` on is never read.
        values: likewise.
        offset: a scalar, how many positions are in use.
    """

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.offset = offset

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Put keys and values [B, Hkv, T, D] behind the others; all, unused ones too.

        The offset stays: every layer is traced at the one of its inputs.
        """
        at = self.offset.reshape(1)
        self.keys = mx.slice_update(self.keys, keys, at, axes=(2,))
        self.values = mx.slice_update(self.values, values, at, axes=(2,))
        return self.keys, self.values

    def make_mask(
        self,
        N: int,
        return_array: bool = False,  # noqa: ARG002  (it always is one)
        window_size: int | None = None,
    ) -> mx.array:
        """Which keys each of N queries sees, bool [N, capacity]."""
        keys = mx.arange(self.keys.shape[2])
        queries = (self.offset + mx.arange(N))[:, None]
        seen = keys <= queries
        return seen if window_size is None else seen & (keys > queries - window_size)
