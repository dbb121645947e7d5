"""``/v1/completions``: texts, and how the model goes on with them."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .asking import ask_completions, choices_of
from .fields import CompletionRequest
from .keeper import Loaded
from .logprobs import Scored, completion_logprobs
from .replies import Completion, CompletionChoice, CompletionLogprobs, FinishReason
from .service import (
    Pieces,
    Service,
    head_of,
    respond,
    unless_left,
)
from .stream import DONE, Events, EventStream, event
from .written import Written, collect, timings_of, usage_of


async def answer_completions(request: Request) -> Response:
    """The texts that go on from prompts, whole or as a stream."""
    service: Service = request.app.state.service
    async with AsyncExitStack() as stack:
        body = await stack.enter_async_context(service.bodies.read(request))
        fields = await service.read(body, CompletionRequest)
        del body
        service.check_model(fields.model)
        loaded = await stack.enter_async_context(service.keeper.use())
        pool = service.pool(loaded)
        asks = ask_completions(fields)
        count = choices_of(fields, pool.size, len(asks))
        completions = _Completions(service, loaded, fields, len(asks), count)

        async def begin() -> Pieces:
            return await stack.enter_async_context(
                service.pieces(pool, *asks, count=count)
            )

        async def whole() -> Response:
            return await completions.whole(await begin())

        if not fields.stream:
            return await unless_left(request, whole())
        pieces = await unless_left(request, begin())
        return EventStream(completions.events(pieces), stack.pop_all(), service.policy)


class _Completions:
    """The reply to one request: ``count`` texts to each of some prompts."""

    def __init__(
        self,
        service: Service,
        loaded: Loaded,
        fields: CompletionRequest,
        prompts: int,
        count: int,
    ) -> None:
        assert loaded.spelling is not None
        self._number = prompts * count
        self._count = count
        self._spelling = loaded.spelling
        self._scores = fields.logprobs is not None
        options = fields.stream_options
        self._tells_usage = options is not None and bool(options.include_usage)
        self._head = head_of(service, loaded, "cmpl")

    async def whole(self, pieces: Pieces) -> Response:
        """All texts at once."""
        answers = await collect(pieces, self._number, self._spelling)
        choices = [
            self._choice(i, answer.text, answer.told, answer.reason)
            for i, answer in enumerate(answers)
        ]
        return respond(Completion(**self._head, choices=choices, **self._took(answers)))

    async def events(self, pieces: Pieces) -> Events:
        """The texts as they are written."""
        answers = [Written(self._spelling) for _ in range(self._number)]
        # Said to be none, where the last chunk will have it.
        usage: dict[str, Any] = {"usage": None} if self._tells_usage else {}
        async for number, piece in pieces:
            told = answers[number].add(piece)
            ended = piece.finish_reason is not None
            if piece.text or told or ended:
                reason = answers[number].reason if ended else None
                choice = self._choice(number, piece.text, told, reason)
                yield event(Completion(**self._head, choices=[choice], **usage))
        if self._tells_usage:
            yield event(Completion(**self._head, choices=[], **self._took(answers)))
        yield DONE

    def _choice(
        self, number: int, text: str, told: list[Scored], reason: FinishReason | None
    ) -> CompletionChoice:
        logprobs: CompletionLogprobs | None = None
        if self._scores:
            logprobs = completion_logprobs(told, self._spelling)
        return CompletionChoice(
            index=number, text=text, logprobs=logprobs, finish_reason=reason
        )

    def _took(self, answers: list[Written]) -> dict[str, Any]:
        stats = [answer.stats for answer in answers]
        return {
            "usage": usage_of(stats, self._count),
            "timings": timings_of(stats, self._count),
        }
