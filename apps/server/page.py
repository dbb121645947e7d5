"""The web page's files, held in memory: what is served is what was read at the start."""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ..page import DIST, POLICY

INDEX = "index.html"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Vary": "Accept-Encoding",
}
ABSENT = (
    "mm1 serve: the web page is not part of this installation; the API is at /v1, its "
    "description at /openapi.json\n"
)


@dataclass(frozen=True)
class _File:
    body: bytes
    packed: bytes
    kind: str
    tag: str

    def response(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == self.tag:
            return Response(status_code=304, headers=headers)
        body = self.body
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["Content-Encoding"] = self.packed, "gzip"
        return Response(body, headers=headers, media_type=self.kind)


class Page:
    """The files of a built page.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path = DIST) -> None:
        self._files: dict[str, _File] = {}
        if not (folder / INDEX).is_file():
            return
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self._files["/" if name == INDEX else f"/{name}"] = _read(path, name)

    @property
    def paths(self) -> tuple[str, ...]:
        """What can be asked for."""
        return ("/", *(path for path in self._files if path != "/"))

    async def get(self, request: Request) -> Response:
        """A file of the page."""
        file = self._files.get(request.scope["path"])
        if file is None:
            return PlainTextResponse(ABSENT, headers=HEADERS)
        return file.response(request)


def _read(path: Path, name: str) -> _File:
    body = path.read_bytes()
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return _File(body, gzip.compress(body, mtime=0), kind, tag)
