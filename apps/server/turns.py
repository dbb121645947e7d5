"""How many requests may wait for what one thread computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import APIError


class Turns:
    """How many requests wait for vectors, or are given some.

    Args:
        most: how many there may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Be one of them.

        Raises:
            APIError: 429; there are too many.
        """
        if self._taken == self._most:
            raise APIError(
                429,
                f"{self._taken} requests wait already; ask again later",
                code="queue_full",
                retry_after=1,
            )
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1
