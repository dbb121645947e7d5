"""Who may ask at all: ``Host``, ``Origin`` and key, before anything of a request is read."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import APIError
from .policy import Policy, knows_host

BEARER = "bearer "


class Guard:
    """Lets those requests through that may be made.

    Args:
        app: what answers them.
        policy: who may ask.
        open_paths: exact paths that need no key.
    """

    def __init__(
        self, app: ASGIApp, policy: Policy, open_paths: Collection[str]
    ) -> None:
        self.app = app
        self.policy = policy
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] == "http":
            try:
                self._check(scope)
            except APIError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not knows_host(
            host, scope["server"], self.policy
        ):
            raise APIError(
                403,
                f"the Host header {host!r:.80} is none of this server's names; "
                "allow one by --allow-host",
                code="unknown_host",
            )
        if not self._is_visit(scope, headers):
            self._check_origin(headers, host)
        # The path that routes are found by; a URL made of the Host header is not.
        if scope["path"] in self.open_paths or self._is_preflight(scope, headers):
            return
        if self.policy.key is not None:
            self._check_key(headers)

    def _is_visit(self, scope: Scope, headers: Headers) -> bool:
        """Whether somebody followed a link to the page: its files are nobody's secret."""
        return (
            scope["method"] == "GET"
            and scope["path"] in self.open_paths
            and headers.get("origin") is None
            and headers.get("sec-fetch-mode") == "navigate"
            and headers.get("sec-fetch-dest") == "document"
        )

    def _check_origin(self, headers: Headers, host: str) -> None:
        origin = headers.get("origin")
        own = {f"http://{host}"}
        if host.lower().partition(":")[0] in self.policy.hosts:
            # A proxy in front speaks TLS for this server.
            own.add(f"https://{host}")
        foreign = (
            headers.get("sec-fetch-site") == "cross-site"
            if origin is None
            else origin not in own | self.policy.origins
        )
        if foreign:
            raise APIError(
                403,
                f"pages of {origin or 'other sites'!r:.80} may not call this server; "
                "allow one by --allow-origin",
                code="unknown_origin",
            )

    def _is_preflight(self, scope: Scope, headers: Headers) -> bool:
        """Browsers ask without a key whether they may ask; of allowed origins only."""
        return scope["method"] == "OPTIONS" and headers.get("origin") in (
            self.policy.origins
        )

    def _check_key(self, headers: Headers) -> None:
        assert self.policy.key is not None
        given = headers.get("authorization", "")
        scheme, key = given[: len(BEARER)].lower(), given[len(BEARER) :].strip()
        right = hmac.compare_digest(key.encode(), self.policy.key.encode())
        if scheme != BEARER or not right:
            raise APIError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
