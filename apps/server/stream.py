"""Server-sent events: answers as they are written, until the client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from .bodies import ClientLeft
from .errors import APIError, bug
from .policy import Policy

Events = AsyncGenerator[bytes, None]

DONE = b"data: [DONE]\n\n"
# A line that clients leave out, and that shows whether they are there.
PULSE = b": still here\n\n"


def event(reply: BaseModel) -> bytes:
    """An object as an event of a stream."""
    return b"data: " + reply.__pydantic_serializer__.to_json(reply) + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events, which end where the client has left or takes none.

    Args:
        events: encoded, ``[DONE]`` among them; errors become the last one.
        stack: what they need, which is closed behind them, or instead of them.
        policy: how long is waited.
    """

    def __init__(self, events: Events, stack: AsyncExitStack, policy: Policy) -> None:
        # Of the request, for the log.
        self._name = "-"
        super().__init__(
            _with_pulse(self._with_errors(events), policy.pulse_seconds),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._stack = stack
        self._seconds = policy.send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        self._name = scope["state"]["request_id"]
        async with self._stack:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send them; the generator is closed, whatever happens."""

        async def sender(message: Any) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                raise ClientLeft from None

        body: Any = self.body_iterator
        try:
            await super().stream_response(sender)
        finally:
            await body.aclose()

    async def _with_errors(self, events: Events) -> Events:
        """The events, and behind them what ended them."""
        async with aclosing(events):
            try:
                async for held in events:
                    yield held
            except APIError as error:
                yield _error_event(error)
            except Exception as error:
                yield _error_event(bug(error, self._name))


def _error_event(error: APIError) -> bytes:
    return b"data: " + bytes(JSONResponse(error.body()).body) + b"\n\n"


async def _with_pulse(events: Events, seconds: float) -> Events:
    """The events, and a comment where none came for so long."""
    async with aclosing(events):
        coming: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                if coming is None:
                    coming = asyncio.ensure_future(anext(events, None))
                await asyncio.wait({coming}, timeout=seconds)
                if not coming.done():
                    yield PULSE
                    continue
                held, coming = coming.result(), None
                if held is None:
                    return
                yield held
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
