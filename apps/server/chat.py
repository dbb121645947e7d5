"""``/v1/chat/completions``: a conversation, and the answers that go on from it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from .asking import ask_chat, choices_of
from .fields import ChatRequest
from .keeper import Loaded
from .logprobs import Scored, chat_logprobs
from .pictures import PictureReader
from .replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
    Delta,
    FinishReason,
    Logprobs,
)
from .service import (
    Pieces,
    Service,
    head_of,
    respond,
    unless_left,
)
from .stream import DONE, Events, EventStream, event
from .written import Written, collect, timings_of, usage_of


async def answer_chat(request: Request) -> Response:
    """The answers to a conversation, whole or as a stream."""
    service: Service = request.app.state.service
    async with AsyncExitStack() as stack:
        body = await stack.enter_async_context(service.bodies.read(request))
        fields = await service.read(body, ChatRequest)
        del body
        service.check_model(fields.model)
        loaded = await stack.enter_async_context(service.keeper.use())
        pool = service.pool(loaded)
        count = choices_of(fields, pool.size)
        chat = _Chat(service, loaded, fields, count)

        async def begin() -> Pieces:
            reader = PictureReader(
                service.policy, stack.enter_context(service.bodies.beside())
            )
            ask = await ask_chat(
                fields, reader, loaded.views, service.policy.max_tokens
            )
            return await stack.enter_async_context(
                service.pieces(pool, ask, count=count)
            )

        async def whole() -> Response:
            return await chat.whole(await begin())

        if not fields.stream:
            return await unless_left(request, whole())
        pieces = await unless_left(request, begin())
        return EventStream(chat.events(pieces), stack.pop_all(), service.policy)


class _Chat:
    """The reply to one request."""

    def __init__(
        self, service: Service, loaded: Loaded, fields: ChatRequest, count: int
    ) -> None:
        assert loaded.spelling is not None
        self._count = count
        self._spelling = loaded.spelling
        self._scores = bool(fields.logprobs)
        options = fields.stream_options
        self._tells_usage = options is not None and bool(options.include_usage)
        self._head = head_of(service, loaded, "chatcmpl")

    async def whole(self, pieces: Pieces) -> Response:
        """All answers at once."""
        answers = await collect(pieces, self._count, self._spelling)
        stats = [answer.stats for answer in answers]
        reply = ChatCompletion(
            **self._head,
            choices=[
                ChatChoice(
                    index=i,
                    message=ChatMessage(content=answer.text),
                    logprobs=self._logprobs(answer.told),
                    finish_reason=answer.reason,
                )
                for i, answer in enumerate(answers)
            ],
            usage=usage_of(stats, self._count),
            timings=timings_of(stats, self._count),
        )
        return respond(reply)

    async def events(self, pieces: Pieces) -> Events:
        """The answers as they are written."""
        answers = [Written(self._spelling) for _ in range(self._count)]
        for i in range(self._count):
            yield self._chunk(i, Delta(role="assistant", content=""))
        async for number, piece in pieces:
            told = answers[number].add(piece)
            if piece.text or told:
                yield self._chunk(number, Delta(content=piece.text), told)
            if piece.finish_reason is not None:
                yield self._chunk(number, Delta(), reason=answers[number].reason)
        if self._tells_usage:
            stats = [answer.stats for answer in answers]
            usage = usage_of(stats, self._count)
            timings = timings_of(stats, self._count)
            yield event(
                ChatChunk(**self._head, choices=[], usage=usage, timings=timings)
            )
        yield DONE

    def _chunk(
        self,
        number: int,
        delta: Delta,
        told: list[Scored] | None = None,
        reason: FinishReason | None = None,
    ) -> bytes:
        choice = ChatChunkChoice(
            index=number,
            delta=delta,
            logprobs=self._logprobs(told) if told else None,
            finish_reason=reason,
        )
        # Said to be none, where the last chunk will have it.
        usage: dict[str, Any] = {"usage": None} if self._tells_usage else {}
        return event(ChatChunk(**self._head, choices=[choice], **usage))

    def _logprobs(self, told: list[Scored]) -> Logprobs | None:
        return chat_logprobs(told, self._spelling) if self._scores else None
