"""From a question to its reply, whole or as a stream: what chats and completions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from .asking import Question, choices_of, tells_usage
from .fields import Sampling
from .keeper import Loaded
from .logprobs import Scored
from .pictures import PictureReader
from .replies import FinishReason
from .service import Pieces, Service, as_json, head_of, unless_left
from .stream import DONE, Events, EventStream, event
from .written import Written, collect, timings_of, usage_of

S = TypeVar("S", bound=Sampling)


async def answer(
    request: Request,
    kind: type[S],
    make: Callable[[Service, Loaded, S], Answers],
) -> Response:
    """The reply to a request.

    Args:
        request: of a client.
        kind: the class of its fields.
        make: what puts its question and writes the answers.
    """
    service: Service = request.app.state.service
    async with AsyncExitStack() as stack:
        fields, loaded = await stack.enter_async_context(service.receive(request, kind))
        pool = service.pool(loaded)
        answers = make(service, loaded, fields)

        async def begin() -> Pieces:
            beside = stack.enter_context(service.bodies.beside())
            question = await answers.question(PictureReader(service.policy, beside))
            return await stack.enter_async_context(
                service.pieces(pool, question, answers.count)
            )

        async def whole() -> Response:
            return await answers.whole(await begin())

        if not fields.stream:
            return await unless_left(request, whole())
        pieces = await unless_left(request, begin())
        return EventStream(answers.events(pieces), stack.pop_all(), service.policy)


class Answers(ABC):
    """The answers to one request, ``count`` to each of its prompts.

    Args:
        service: the server's.
        loaded: the model that answers.
        fields: the request's.
        prompts: how many it has.
    """

    # What the reply's id begins with; the classes of a whole reply and of an event.
    prefix: ClassVar[str]
    reply: ClassVar[type[BaseModel]]
    chunk: ClassVar[type[BaseModel]]

    def __init__(
        self, service: Service, loaded: Loaded, fields: Sampling, prompts: int = 1
    ) -> None:
        assert loaded.spelling is not None
        self.count = choices_of(fields, service.pool(loaded).size, prompts)
        self.spelling = loaded.spelling
        self._number = prompts * self.count
        self._tells_usage = tells_usage(fields)
        self._head = head_of(service, loaded, self.prefix)

    @abstractmethod
    async def question(self, reader: PictureReader) -> Question:
        """What the model is asked."""

    @abstractmethod
    def choice(self, number: int, answer: Written) -> BaseModel:
        """A whole answer."""

    def opening(self) -> Sequence[BaseModel]:
        """Choices of the first events, before anything is written."""
        return ()

    @abstractmethod
    def choices(
        self, number: int, text: str, told: list[Scored], reason: FinishReason | None
    ) -> Sequence[BaseModel]:
        """Choices of the events that a piece of an answer becomes.

        Args:
            number: the answer's.
            text: what the piece adds to it.
            told: the scores that come with it.
            reason: why it ended, None where it goes on.
        """

    async def whole(self, pieces: Pieces) -> Response:
        """All answers at once."""
        answers = await collect(pieces, self._number, self.spelling)
        choices = [self.choice(i, answer) for i, answer in enumerate(answers)]
        return as_json(self.reply(**self._head, choices=choices, **self._took(answers)))

    async def events(self, pieces: Pieces) -> Events:
        """The answers as they are written."""
        answers = [Written(self.spelling) for _ in range(self._number)]
        for choice in self.opening():
            yield self._event(choice)
        async for number, piece in pieces:
            told = answers[number].add(piece)
            ended = piece.finish_reason is not None
            reason = answers[number].reason if ended else None
            for choice in self.choices(number, piece.text, told, reason):
                yield self._event(choice)
        if self._tells_usage:
            took = self._took(answers)
            yield event(self.chunk(**self._head, choices=[], **took))
        yield DONE

    def _event(self, choice: BaseModel) -> bytes:
        # Said to be none, where the last chunk will have it.
        usage = {"usage": None} if self._tells_usage else {}
        return event(self.chunk(**self._head, choices=[choice], **usage))

    def _took(self, answers: list[Written]) -> dict[str, Any]:
        stats = [answer.stats for answer in answers]
        return {
            "usage": usage_of(stats, self.count),
            "timings": timings_of(stats, self.count),
        }
