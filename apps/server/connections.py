"""Connections that are too slow or too many are closed, which uvicorn leaves to proxies."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .policy import Policy

TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"Retry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)
# Of a request's head, in bytes.
MAX_HEAD = 16 << 10


def protocol(policy: Policy) -> type[asyncio.Protocol]:
    """HTTP/1.1 with a deadline for a request's head and a limit of connections; uvicorn's otherwise."""

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > policy.max_connections:
                transport.write(TOO_MANY)
                transport.close()
            else:
                self._expect()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            # uvicorn's own timer ends with the first byte, which may stay the only one.
            self._expect()
            super().data_received(data)
            if self._answers():
                self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _answers(self) -> bool:
            cycle: Any = self.cycle
            return cycle is not None and not cycle.response_complete

        def _expect(self) -> None:
            if self._deadline is None and not self._answers():
                seconds = policy.header_seconds
                self._deadline = self.loop.call_later(seconds, self._late)

        def _forget(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _late(self) -> None:
            self._deadline = None
            if not self._answers() and not self.transport.is_closing():
                self.transport.abort()

    return Protocol
