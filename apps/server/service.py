"""What all endpoints share: the model, the policy, the counters, and how they answer."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from mm1_mlx.answer import Piece
from mm1_mlx.batch import Ask
from mm1_mlx.embed import Embedder
from mm1_mlx.errors import BusyError, MM1Error
from mm1_mlx.pool import MAX_WAITING, Pool
from mm1_mlx.worker import Worker

from .bodies import Bodies, ClientLeft, left
from .errors import APIError
from .fields import Fields
from .keeper import Keeper, Loaded
from .metrics import Metrics
from .parsing import parse
from .policy import Policy
from .replies import Abilities
from .turns import Turns

T = TypeVar("T")
F = TypeVar("F", bound=Fields)
# Of answers, with their numbers.
Pieces = AsyncIterator[tuple[int, Piece]]

# Bodies longer than this are read by another thread than the one that serves everybody.
LONG = 1 << 20
MOST_RETRY = 120


@dataclass
class Service:
    """A served model and what is allowed of it.

    Attributes:
        name: the model's id.
        created: when it was made, in seconds since 1970.
        keeper: keeps it ready.
        policy: what is allowed.
        turns: of those who want vectors.
        metrics: what is counted.
        bodies: reads requests.
    """

    name: str
    created: int
    keeper: Keeper
    policy: Policy
    turns: Turns = field(default_factory=lambda: Turns(MAX_WAITING))
    metrics: Metrics = field(default_factory=Metrics)
    bodies: Bodies = field(init=False)
    # Known also while the model is not in memory.
    abilities: Abilities = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.policy)
        assert self.keeper.loaded is not None
        self.abilities = _abilities(self.keeper.loaded)

    async def read(self, body: bytes, kind: type[F]) -> F:
        """The checked fields of a body.

        Raises:
            APIError: 400; they are none.
        """
        if len(body) < LONG:
            return parse(body, kind)
        return await asyncio.to_thread(parse, body, kind)

    def check_model(self, name: str | None) -> None:
        """Pass only if the model of this name is served.

        Raises:
            APIError: 404; it is another's.
        """
        if name is not None and name != self.name:
            raise APIError(
                404,
                f"the model {name!r:.100} is not served here, but {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def pool(self, loaded: Loaded) -> Pool:
        """What answers.

        Raises:
            APIError: 400; the model only embeds. 503; its thread has ended.
        """
        if loaded.pool is None:
            raise APIError(
                400,
                f"the model {self.name!r} has no decoder, so it cannot answer; it has "
                "embeddings",
                param="model",
                code="model_cannot_answer",
            )
        _check_well(loaded)
        return loaded.pool

    def embedder(self, loaded: Loaded) -> tuple[Embedder, Worker]:
        """What embeds, and the thread that it is used on.

        Raises:
            APIError: 400; the model only answers. 503; its thread has ended.
        """
        if loaded.embedder is None or loaded.worker is None:
            raise APIError(
                400,
                f"the model {self.name!r} has no embeddings; serve a CLIP model",
                param="model",
                code="model_cannot_embed",
            )
        _check_well(loaded)
        return loaded.embedder, loaded.worker

    @asynccontextmanager
    async def pieces(self, pool: Pool, *asks: Ask, count: int) -> AsyncIterator[Pieces]:
        """The pieces of all answers, the first of which has come.

        Raises:
            APIError: the question cannot be answered, or not now.
        """
        async with aclosing(pool.answers(*asks, count=count)) as answers:
            with _Refusals():
                first = await anext(answers)
            yield self._counted(first, answers)

    async def _counted(self, first: tuple[int, Piece], answers: Pieces) -> Pieces:
        held: tuple[int, Piece] | None = first
        with _Refusals():
            while held is not None:
                if held[1].stats is not None:
                    self.metrics.count_answer(held[1].stats)
                yield held
                held = await anext(answers, None)


def _check_well(loaded: Loaded) -> None:
    if not loaded.well:
        raise APIError(
            503,
            "the model's thread has ended; the server must be started again",
            code="model_unavailable",
        )


def _abilities(loaded: Loaded) -> Abilities:
    decoder, pool = loaded.config.decoder, loaded.pool
    return Abilities(
        answers=pool is not None,
        embeds=loaded.embedder is not None,
        context=decoder.max_position_embeddings if decoder else None,
        max_choices=pool.size if pool else 0,
        resolution=loaded.views.modes,
    )


class _Refusals:
    """The model's refusals as what callers are told."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, BusyError):
            seconds = min(MOST_RETRY, max(1, math.ceil(error.seconds)))
            raise APIError(
                429, str(error), code="queue_full", retry_after=seconds
            ) from error
        if isinstance(error, MM1Error):
            raise APIError(400, str(error), code="invalid_prompt") from error


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is ended where the client leaves before.

    Raises:
        ClientLeft: it did.
    """
    job = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientLeft
        return job.result()
    finally:
        gone.cancel()
        job.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


def respond(reply: BaseModel) -> Response:
    """An object as a whole response."""
    return Response(reply.model_dump_json(), media_type="application/json")


def head_of(service: Service, loaded: Loaded, kind: str) -> dict[str, Any]:
    """What all objects of an answer say.

    Args:
        service: the server's.
        loaded: the model that answers.
        kind: what the answer's id begins with.
    """
    assert loaded.runtime is not None
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": service.name,
        "system_fingerprint": f"fp_{loaded.runtime.digest[:12]}",
    }
