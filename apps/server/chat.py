"""``/v1/chat/completions``: a conversation, and the answers that go on from it."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response

from .answering import Answers, answer
from .asking import Question, ask_chat
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
from .service import Service
from .written import Written


async def answer_chat(request: Request) -> Response:
    """The answers to a conversation, whole or as a stream."""
    return await answer(request, ChatRequest, _Chat)


class _Chat(Answers):
    prefix, reply, chunk = "chatcmpl", ChatCompletion, ChatChunk

    def __init__(self, service: Service, loaded: Loaded, fields: ChatRequest) -> None:
        super().__init__(service, loaded, fields)
        self._fields = fields
        self._views = loaded.views
        self._max_tokens = service.policy.max_tokens

    async def question(self, reader: PictureReader) -> Question:
        return await ask_chat(self._fields, reader, self._views, self._max_tokens)

    def choice(self, number: int, answer: Written) -> ChatChoice:
        return ChatChoice(
            index=number,
            message=ChatMessage(content=answer.text),
            logprobs=self._logprobs(answer.told) if self._fields.logprobs else None,
            finish_reason=answer.reason,
        )

    def opening(self) -> list[ChatChunkChoice]:
        first = Delta(role="assistant", content="")
        return [ChatChunkChoice(index=i, delta=first) for i in range(self.count)]

    def choices(
        self, number: int, text: str, told: list[Scored], reason: FinishReason | None
    ) -> list[ChatChunkChoice]:
        choices = []
        if text or told:
            choices.append(
                ChatChunkChoice(
                    index=number,
                    delta=Delta(content=text),
                    logprobs=self._logprobs(told) if told else None,
                )
            )
        if reason is not None:
            last = ChatChunkChoice(index=number, delta=Delta(), finish_reason=reason)
            choices.append(last)
        return choices

    def _logprobs(self, told: Iterable[Scored]) -> Logprobs:
        return chat_logprobs(told, self.spelling)
