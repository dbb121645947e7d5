"""Server-sent events: answers as they are written, until the client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from types import TracebackType
from typing import Any, Self

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
            self._with_errors(events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._stack = stack
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        self._name = scope["state"]["request_id"]
        async with self._stack:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send them; the generator is closed, whatever happens."""
        body: Any = self.body_iterator
        async with aclosing(body), _Line(send, self._policy) as line:
            await line.begin(self.status_code, self.raw_headers)
            async for held in body:
                await line.write(held)
            await line.write(b"", more=False)

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


class _Line:
    """What a client is sent, and a comment where it is nothing for a while.

    A context manager, which ends where the client takes nothing.

    Raises:
        ClientLeft: it did not.
    """

    def __init__(self, send: Send, policy: Policy) -> None:
        self._send = send
        self._policy = policy
        self._clock = asyncio.get_running_loop().time
        self._patience = asyncio.timeout(None)
        self._written = self._clock()
        self._writes = False

    async def __aenter__(self) -> Self:
        await self._patience.__aenter__()
        # One task for all of a stream, and none for every event.
        self._pulse = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pulse.cancel()
        await asyncio.gather(self._pulse, return_exceptions=True)
        try:
            await self._patience.__aexit__(kind, error, trace)
        except TimeoutError:
            raise ClientLeft from None

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send what stands before the events."""
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await self._take(start)

    async def write(self, part: bytes, *, more: bool = True) -> None:
        """Send a part of the body, the last one where there are no ``more``."""
        await self._take(
            {"type": "http.response.body", "body": part, "more_body": more}
        )

    async def _take(self, message: dict[str, Any]) -> None:
        self._writes = True
        self._patience.reschedule(self._clock() + self._policy.send_seconds)
        await self._send(message)
        self._patience.reschedule(None)
        self._writes, self._written = False, self._clock()

    async def _beat(self) -> None:
        """Show that the stream is alive whenever nothing was sent for so long."""
        wait = seconds = self._policy.pulse_seconds
        while True:
            await asyncio.sleep(wait)
            # What a client does not take is no silence.
            silent = 0.0 if self._writes else self._clock() - self._written
            if silent >= seconds:
                await self.write(PULSE)
                silent = 0.0
            wait = seconds - silent


def _error_event(error: APIError) -> bytes:
    return b"data: " + bytes(JSONResponse(error.body()).body) + b"\n\n"
