"""What all endpoints share: the model, the policy, the counters, and how they answer."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from mm1_mlx.answer import Piece
from mm1_mlx.embed import Embedder
from mm1_mlx.errors import BusyError, ContextError, MM1Error, PromptError
from mm1_mlx.pool import Pool
from mm1_mlx.worker import Worker

from .asking import Question
from .bodies import Bodies, ClientLeft, left
from .errors import APIError
from .fields import ModelRequest
from .keeper import Keeper, Loaded
from .metrics import Metrics
from .parsing import parse
from .policy import Policy
from .replies import Abilities
from .turns import Turns

T = TypeVar("T")
F = TypeVar("F", bound=ModelRequest)
# Of answers, with their numbers.
Pieces = AsyncIterator[tuple[int, Piece]]

# Bodies longer than this are read by another thread than the one that serves everybody.
LONG = 1 << 20
MOST_RETRY = 120
# Fields of requests, by the settings that have other names.
SETTINGS = {"schema": "response_format"}


@dataclass
class Service:
    """A served model and what is allowed of it.

    Attributes:
        name: the model's id.
        created: when it was made, in seconds since 1970.
        keeper: keeps it ready.
        policy: what is allowed.
        metrics: what is counted.
        bodies: reads requests.
        turns: of those who want vectors.
    """

    name: str
    created: int
    keeper: Keeper
    policy: Policy
    metrics: Metrics = field(default_factory=Metrics)
    bodies: Bodies = field(init=False)
    turns: Turns = field(init=False)
    # Known also while the model is not in memory.
    abilities: Abilities = field(init=False)

    def __post_init__(self) -> None:
        self.bodies = Bodies(self.policy)
        self.turns = Turns(self.policy.max_waiting)
        assert self.keeper.loaded is not None
        self.abilities = _abilities(self.keeper.loaded)

    @asynccontextmanager
    async def receive(
        self, request: Request, kind: type[F]
    ) -> AsyncIterator[tuple[F, Loaded]]:
        """A request's checked fields and the model that it is for.

        As long as the context is open, the model stays and the request's bytes count.

        Raises:
            APIError: the body or its fields are none. 404; another model is asked for.
                503; the model had been let go, and cannot be loaded.
        """
        async with self.bodies.receive(request) as body:
            if len(body) < LONG:
                fields = parse(body, kind)
            else:
                fields = await asyncio.to_thread(parse, body, kind)
            del body
            self.check_model(fields.model)
            async with self.keeper.use() as loaded:
                yield fields, loaded

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
    async def pieces(
        self, pool: Pool, question: Question, count: int
    ) -> AsyncIterator[Pieces]:
        """The pieces of all answers, the first of which has come.

        Args:
            pool: what answers.
            question: what is asked.
            count: how many answers to each part of it are wanted.

        Raises:
            APIError: the question cannot be answered, or not now.
        """
        async with aclosing(pool.answers(*question.asks, count=count)) as answers:
            with refusals(question.field, question.pictures):
                first = await anext(answers)
            yield self._counted(first, answers, question)

    async def _counted(
        self, first: tuple[int, Piece], answers: Pieces, question: Question
    ) -> Pieces:
        held: tuple[int, Piece] | None = first
        with refusals(question.field, question.pictures):
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


@contextmanager
def refusals(field: str, pictures: Sequence[str]) -> Iterator[None]:
    """The model's refusals as what callers are told.

    Args:
        field: of the request; what the model was given of it.
        pictures: the fields of the pictures in it, in order.
    """
    try:
        yield
    except BusyError as error:
        seconds = min(MOST_RETRY, max(1, math.ceil(error.seconds)))
        raise APIError(
            429, str(error), code="queue_full", retry_after=seconds
        ) from error
    except MM1Error as error:
        param = _at_fault(error, field, pictures)
        # OpenAI's code, by which clients know that they may ask with less.
        long = isinstance(error, ContextError)
        code = "context_length_exceeded" if long else "invalid_prompt"
        raise APIError(400, str(error), param=param, code=code) from error


def _at_fault(error: MM1Error, field: str, pictures: Sequence[str]) -> str:
    """The field that the model's refusal is of."""
    if isinstance(error, PromptError):
        if error.setting is not None:
            return SETTINGS.get(error.setting, error.setting)
        if error.picture is not None:
            return pictures[error.picture]
    return field


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


def as_json(reply: BaseModel) -> Response:
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
