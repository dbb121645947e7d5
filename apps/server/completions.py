"""``/v1/completions``: texts, and how the model goes on with them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from .answering import Answers, answer
from .asking import Question, ask_completions
from .fields import CompletionRequest
from .keeper import Loaded
from .logprobs import Scored, completion_logprobs
from .pictures import PictureReader
from .replies import Completion, CompletionChoice, FinishReason
from .service import Service
from .written import Written


async def answer_completions(request: Request) -> Response:
    """The texts that go on from prompts, whole or as a stream."""
    return await answer(request, CompletionRequest, _Completions)


class _Completions(Answers):
    prefix, reply, chunk = "cmpl", Completion, Completion

    def __init__(
        self, service: Service, loaded: Loaded, fields: CompletionRequest
    ) -> None:
        self._question = ask_completions(fields)
        super().__init__(service, loaded, fields, len(self._question.asks))
        self._scores = fields.logprobs is not None

    async def question(self, reader: PictureReader) -> Question:  # noqa: ARG002
        return self._question

    def choice(self, number: int, answer: Written) -> CompletionChoice:
        return self._choice(number, answer.text, answer.told, answer.reason)

    def choices(
        self, number: int, text: str, told: list[Scored], reason: FinishReason | None
    ) -> list[CompletionChoice]:
        if not (text or told or reason):
            return []
        return [self._choice(number, text, told, reason)]

    def _choice(
        self, number: int, text: str, told: list[Scored], reason: FinishReason | None
    ) -> CompletionChoice:
        return CompletionChoice(
            index=number,
            text=text,
            logprobs=completion_logprobs(told, self.spelling) if self._scores else None,
            finish_reason=reason,
        )
