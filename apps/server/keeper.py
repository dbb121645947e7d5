"""The served model: loaded, let go when nobody asks for long, and loaded again."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint import load_config
from mm1_mlx.config import MM1Config
from mm1_mlx.embed import Embedder, load_embedder
from mm1_mlx.errors import ConfigError, MM1Error
from mm1_mlx.pool import Pool
from mm1_mlx.runtime import Runtime, find_model, load
from mm1_mlx.spelling import Spelling
from mm1_mlx.worker import Worker

from .errors import APIError
from .modes import Views
from .policy import Policy

# How often it is looked whether the model was idle for long enough.
TICKS = 10


@dataclass
class Loaded:
    """A model in memory.

    Attributes:
        path: the folder it came from.
        config: the model's.
        runtime: answers, None where the model has no decoder.
        pool: shares it out, likewise.
        embedder: embeds, None where the model has no space to embed into.
        worker: the thread that the embedder is used on.
    """

    path: Path
    config: MM1Config
    runtime: Runtime | None = None
    pool: Pool | None = None
    embedder: Embedder | None = None
    worker: Worker | None = None
    views: Views = field(init=False)
    spelling: Spelling | None = field(init=False)

    def __post_init__(self) -> None:
        self.views = Views(self.config)
        self.spelling = Spelling(self.runtime.tokenizer) if self.runtime else None

    @property
    def well(self) -> bool:
        """Whether the threads that run it are there."""
        workers = [self.runtime._worker] if self.runtime else []
        workers += [self.worker] if self.worker else []
        return all(worker.alive for worker in workers)

    def close(self) -> None:
        """Let it go; answers under way are finished first."""
        if self.pool:
            self.pool.close()
        if self.runtime:
            self.runtime.close()
        if self.worker:
            self.embedder = None
            self.worker.close()


class Keeper:
    """Keeps a model ready.

    Args:
        load: loads it; takes its time.
        loaded: what it gave the first time.
        idle_seconds: after which a model that nobody uses is let go; None for never.
        retry_seconds: for which it is not tried again when it could not be loaded.
    """

    def __init__(
        self,
        load: Callable[[], Loaded],
        loaded: Loaded,
        idle_seconds: float | None = None,
        retry_seconds: float = 10.0,
    ) -> None:
        self._load = load
        self._loaded: Loaded | None = loaded
        self._idle_seconds = idle_seconds
        self._retry_seconds = retry_seconds
        self._lock = asyncio.Lock()
        # When it could not be loaded last.
        self._failed = -math.inf
        self._users = 0
        self._used = time.monotonic()

    @property
    def loaded(self) -> Loaded | None:
        """The model, None while it is not in memory."""
        return self._loaded

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Loaded]:
        """The model, which stays in memory as long as the context is open.

        Raises:
            APIError: 503; it had been let go, and cannot be loaded.
        """
        self._users += 1
        try:
            yield self._loaded or await self._reload()
        finally:
            self._users -= 1
            self._used = time.monotonic()

    async def let_go_when_idle(self) -> None:
        """Watch for ever that nobody uses it for too long."""
        if self._idle_seconds is None:
            return
        while True:
            await asyncio.sleep(self._idle_seconds / TICKS)
            idle = time.monotonic() - self._used >= self._idle_seconds
            if idle and not self._users and self._loaded is not None:
                async with self._lock:
                    loaded, self._loaded = self._loaded, None
                    await asyncio.to_thread(loaded.close)

    async def close(self) -> None:
        """Let the model go for good."""
        async with self._lock:
            loaded, self._loaded = self._loaded, None
            if loaded is not None:
                await asyncio.to_thread(loaded.close)

    async def _reload(self) -> Loaded:
        async with self._lock:
            if self._loaded is None:
                left = self._failed + self._retry_seconds - time.monotonic()
                if left > 0:
                    raise self._refusal(left)
                try:
                    self._loaded = await asyncio.to_thread(self._load)
                except (MM1Error, OSError, MemoryError) as error:
                    self._failed = time.monotonic()
                    raise self._refusal(self._retry_seconds) from error
            return self._loaded

    def _refusal(self, seconds: float) -> APIError:
        # Why, and from where, is the owner's business.
        return APIError(
            503,
            "the model cannot be loaded now; ask again later",
            code="model_unavailable",
            retry_after=max(1, math.ceil(seconds)),
        )


# Options of ``load`` that change how a model answers, by the flags that give them.
ANSWERING = {"adapters": "--adapter", "resolution": "--resolution"}


def _check_unused(options: Mapping[str, Any]) -> None:
    for name, flag in ANSWERING.items():
        if options.get(name):
            raise ConfigError(
                f"the model has no decoder, and its embeddings know no {flag}; leave it out"
            )


def open_model(policy: Policy, **options: Any) -> Loaded:
    """A model with all that it can do.

    Args:
        policy: how many are answered at once, and how many may wait.
        options: as ``mm1_mlx.load`` takes them; ``source`` names the model.

    Raises:
        MM1Error: it cannot be loaded.
    """
    path = find_model(options.get("source"))
    config = load_config(path)
    runtime = pool = embedder = worker = None
    try:
        if config.decoder is None:
            _check_unused(options)
        else:
            runtime = load(**options)
            config = runtime.config
            pool = Pool(runtime, size=policy.parallel, max_waiting=policy.max_waiting)
        # A model that answers and embeds is rare, and then held twice.
        if runtime is None or config.text is not None:
            worker = Worker()
            embedder = worker.submit(load_embedder, path).result()
        return Loaded(path, config, runtime, pool, embedder, worker)
    except BaseException:
        if pool:
            pool.close()
        if runtime:
            runtime.close()
        if worker:
            worker.close()
        raise
