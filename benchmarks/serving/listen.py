"""Streams of answers as a client hears them: when tokens came, and how many they were."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.serving.servers import PATIENCE, FaultError

PATH = "/v1/chat/completions"
DATA = "data: "


@dataclass(frozen=True)
class Heard:
    """One answer: seconds to its first token and to its end, and its tokens."""

    first: float
    last: float
    tokens: int


def hear(url: str, request: dict[str, Any]) -> Heard:
    """One answer, of just as many tokens as were asked for.

    Raises:
        FaultError: it has others, or tells a first token before there was one.
    """
    first: float | None = None
    usage: dict[str, int] = {}
    known = 0.0
    request = request | {"stream": True, "stream_options": {"include_usage": True}}
    with _client() as client:
        start = time.perf_counter()
        for event in _events(client, url, request):
            if event["choices"] and first is None:
                # Servers here send no choice before the first token, and some send one
                # for a token that has no text yet.
                first = time.perf_counter() - start
            usage = event.get("usage") or usage
            known = (event.get("timings") or {}).get("ttft_seconds", known)
        last = time.perf_counter() - start
    wanted, tokens = request["max_tokens"], usage.get("completion_tokens")
    if tokens is None or tokens != wanted or first is None:
        raise FaultError(f"{url} answered {tokens} tokens in place of {wanted}")
    # By the server's own clock, which starts later.
    if first < known:
        raise FaultError(
            f"{url} sent an event {known - first:.3g} s before the first token"
        )
    return Heard(first, last, tokens)


@dataclass
class Endless:
    """An answer that another client is sent; a context manager.

    Its end token is impossible, and it is cancelled when the context ends.

    Args:
        url: the server's.
        request: for more tokens than will be waited for.
    """

    url: str
    request: dict[str, Any]
    # When each of its events came, by ``time.perf_counter``.
    times: list[float] = field(default_factory=list)
    _came: threading.Condition = field(default_factory=threading.Condition)
    _enough: threading.Event = field(default_factory=threading.Event)
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _writing: Future[None] | None = None

    def __enter__(self) -> Self:
        self._writing = self._threads.submit(self._write)
        try:
            # The first may tell the role alone.
            self.wait(2)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def wait(self, events: int = 1) -> None:
        """Wait for so many more of its tokens: it is still being written.

        Raises:
            FaultError: it has ended, or there came none for long.
        """
        writing = self._writing
        assert writing is not None
        with self._came:
            wanted = len(self.times) + events
            came = self._came.wait_for(
                lambda: len(self.times) >= wanted or writing.done(), PATIENCE
            )
        if writing.done():
            writing.result()
            raise FaultError(
                f"{self.url} ended the long answer before the others were there"
            )
        if not came:
            raise FaultError(f"{self.url} sent no token of the long answer")

    def longest_gap(self, since: float) -> float:
        """The most seconds between two of its tokens, from the last one before ``since``."""
        return max(b - a for a, b in pairwise(self.times) if b > since)

    def _write(self) -> None:
        request = self.request | {"stream": True}
        try:
            with _client() as client:
                for event in _events(client, self.url, request):
                    if event["choices"]:
                        with self._came:
                            self.times.append(time.perf_counter())
                            self._came.notify_all()
                    if self._enough.is_set():
                        return
        finally:
            with self._came:
                self._came.notify_all()

    def _close(self) -> None:
        self._enough.set()
        self._threads.shutdown()


def _client() -> httpx.Client:
    """Made before the clock starts: certificates, which nobody needs here, take long."""
    return httpx.Client(timeout=PATIENCE, verify=False)


def _events(
    client: httpx.Client, url: str, request: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The objects of a stream that ends as it should."""
    with client.stream("POST", url + PATH, json=request) as response:
        if response.status_code != 200:
            raise FaultError(
                f"{url} answered {response.status_code}: {response.read()!r:.500}"
            )
        for line in response.iter_lines():
            if line == f"{DATA}[DONE]":
                return
            if line.startswith(DATA):
                event = json.loads(line.removeprefix(DATA))
                if "choices" not in event:
                    raise FaultError(f"{url} sent {line:.500}")
                yield event
    raise FaultError(f"{url} ended a stream without [DONE]")
