"""Bodies of requests and what they lead to, read only as far as they may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.requests import ClientDisconnect, Request

from .errors import APIError
from .policy import Policy


class Bodies:
    """Reads bodies, and counts the bytes of those under way.

    Args:
        policy: how much there may be.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._held = 0

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as long as the context is open.

        Raises:
            APIError: 408, 413 or 415; it is too slow, too long, or no JSON. 503; those of
                others leave no room for it.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise APIError(
                415,
                f"the Content-Type is {kind!r:.60}, expected application/json",
                code="unsupported_media_type",
            )
        length = request.headers.get("content-length")
        if length is not None and int(length) > self._policy.max_body:
            raise self._too_long()
        held = 0
        parts = []
        try:
            try:
                async with asyncio.timeout(self._policy.body_seconds):
                    async for part in request.stream():
                        held += len(part)
                        self._held += len(part)
                        self._check(held)
                        parts.append(part)
                        # Not held by this frame, which lives as long as the request.
                        del part
            except TimeoutError:
                raise APIError(
                    408,
                    f"the body did not arrive in {self._policy.body_seconds:g} seconds",
                    code="request_timeout",
                ) from None
            yield _join(parts)
        finally:
            self._held -= held

    @contextmanager
    def beside(self) -> Iterator[Callable[[int], None]]:
        """Counts bytes that a request has read elsewhere, as long as the context is open.

        Its function takes how many, and raises APIError as ``receive`` does.
        """
        held = 0

        def count(size: int) -> None:
            nonlocal held
            held += size
            self._held += size
            self._check(held)

        try:
            yield count
        finally:
            self._held -= held

    def _check(self, size: int) -> None:
        if size > self._policy.max_body:
            raise self._too_long()
        if self._held > self._policy.body_budget:
            raise APIError(
                503,
                "other requests leave no room for this one",
                code="overloaded",
                retry_after=1,
            )

    def _too_long(self) -> APIError:
        return APIError(
            413,
            f"the request has more than {self._policy.max_body:,} bytes; send smaller or "
            "fewer pictures",
            code="request_too_large",
        )


def _join(parts: list[bytes]) -> bytes:
    """The whole body, which only the caller holds on to."""
    body = b"".join(parts)
    parts.clear()
    return body


async def left(request: Request) -> None:
    """Return once the client has left; for requests whose body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ClientLeft(ClientDisconnect):
    """The client did not wait for the answer."""
