"""Every request has an id, is counted, and may be a line on stderr."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import CLIENT_LEFT, bug
from .metrics import Metrics

HEADER = "x-request-id"
# Of a caller's own name for a request, in characters.
MAX_ID = 64
_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_ID}}}")


class Watch:
    """Names, counts and tells requests.

    Args:
        app: what answers them.
        metrics: where they are counted.
        say: prints a line, or None.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, say: Callable[[str], None] | None
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.say = say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        name = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = name
        start, status = time.perf_counter(), CLIENT_LEFT
        started = ended = False

        async def sender(message: Message) -> None:
            nonlocal status, started, ended
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)
            if message["type"] == "http.response.body":
                ended = not message.get("more_body", False)

        try:
            await self.app(scope, receive, sender)
        # It left: there is nobody to tell.
        except ClientDisconnect:
            pass
        except Exception as error:
            failure = bug(error, name).response()
            if not started:
                await failure(scope, receive, sender)
        finally:
            status = status if ended else CLIENT_LEFT
            took = time.perf_counter() - start
            # Paths that are none of ours would be as many as anybody likes.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.count_request(path, status, took)
            if self.say is not None:
                client = scope["client"][0] if scope.get("client") else "-"
                target = scope["path"][:200]
                self.say(
                    f"{client} {scope['method']} {target!r} {status} {took:.3f}s {name}"
                )
