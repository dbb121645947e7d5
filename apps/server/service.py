"""What all endpoints share: the model, the policy, the counters, and how they answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mm1_mlx.answer import Piece
from mm1_mlx.batch import Ask
from mm1_mlx.errors import BusyError, MM1Error
from mm1_mlx.pool import Pool

from .bodies import Bodies, ClientLeft, left
from .errors import APIError, bug
from .fields import Fields
from .keeper import Keeper, Loaded
from .metrics import Metrics
from .parsing import parse
from .policy import Policy
from .replies import Abilities

T = TypeVar("T")
F = TypeVar("F", bound=Fields)
Events = AsyncGenerator[bytes, None]
# Of answers, with their numbers.
Pieces = AsyncIterator[tuple[int, Piece]]

DONE = b"data: [DONE]\n\n"
# A line that clients leave out, and that shows whether they are there.
PULSE = b": still here\n\n"
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
        metrics: what is counted.
        bodies: reads requests.
    """

    name: str
    created: int
    keeper: Keeper
    policy: Policy
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
        if not loaded.well:
            raise APIError(
                503,
                "the model's thread has ended; the server must be started again",
                code="model_unavailable",
            )
        return loaded.pool

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


def event(reply: BaseModel) -> bytes:
    """An object as an event of a stream."""
    return b"data: " + reply.__pydantic_serializer__.to_json(reply) + b"\n\n"


def respond(reply: BaseModel) -> Response:
    """An object as a whole response."""
    return Response(reply.model_dump_json(), media_type="application/json")


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


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
            _with_pulse(self._with_errors(events), policy.pulse_seconds),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._stack = stack
        self._seconds = policy.send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        self._name = scope["state"]["request_id"]
        async with self._stack:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        """Send them; the generator is closed, whatever happens."""

        async def sender(message: Any) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await send(message)
            except TimeoutError:
                raise ClientLeft from None

        body: Any = self.body_iterator
        try:
            await super().stream_response(sender)
        finally:
            await body.aclose()

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


def _error_event(error: APIError) -> bytes:
    return b"data: " + bytes(JSONResponse(error.body()).body) + b"\n\n"


async def _with_pulse(events: Events, seconds: float) -> Events:
    """The events, and a comment where none came for so long."""
    async with aclosing(events):
        coming: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                if coming is None:
                    coming = asyncio.ensure_future(anext(events, None))
                await asyncio.wait({coming}, timeout=seconds)
                if not coming.done():
                    yield PULSE
                    continue
                held, coming = coming.result(), None
                if held is None:
                    return
                yield held
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
