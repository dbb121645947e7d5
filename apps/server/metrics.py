"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from mm1_mlx.answer import Stats

# Seconds.
FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
REQUEST = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mm1_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "mm1_request_seconds",
            "From a request's head to its answer's end.",
            ["path"],
            buckets=REQUEST,
            registry=registry,
        )
        self._first_token = Histogram(
            "mm1_first_token_seconds",
            "From a question to its answer's first token, waiting included.",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self._tokens = Counter(
            "mm1_tokens",
            "Tokens: of prompts, of their pictures, known from before, and generated.",
            ["kind"],
            registry=registry,
        )
        for kind in ("prompt", "image", "cached", "generated"):
            self._tokens.labels(kind)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Tell a number that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """A request that was answered, or whose client left."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def count_answer(self, stats: Stats) -> None:
        """An answer that has ended."""
        self._first_token.observe(stats.timings.first_token)
        for kind, count in (
            ("prompt", stats.prompt_tokens),
            ("image", stats.image_tokens),
            ("cached", stats.cached_tokens),
            ("generated", stats.generated_tokens),
        ):
            self._tokens.labels(kind).inc(count)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
