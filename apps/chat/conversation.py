"""What was said so far, and the pictures that wait for the next question."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shown:
    """A picture of a conversation.

    Attributes:
        name: its path, as it was given.
        data: the encoded file, so that it may go away while it is talked about.
        size: width and height in pixels, upright.
    """

    name: str
    data: bytes = field(repr=False)
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} ({self.size[0]} x {self.size[1]})"


@dataclass(frozen=True)
class Exchange:
    """A question with its pictures, and the answer."""

    pictures: tuple[Shown, ...]
    question: str
    answer: str


@dataclass
class Conversation:
    """The exchanges so far.

    Attributes:
        system: the system message, or None.
        exchanges: what was asked and answered.
        waiting: the pictures of the next question.
    """

    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    waiting: list[Shown] = field(default_factory=list)

    @property
    def pictures(self) -> list[Shown]:
        """All pictures in order, those that wait last."""
        before = [shown for one in self.exchanges for shown in one.pictures]
        return before + self.waiting

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The conversation up to a question about the pictures that wait."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for one in self.exchanges:
            messages.append(_user(one.pictures, one.question))
            messages.append({"role": "assistant", "content": one.answer})
        return [*messages, _user(self.waiting, question)]

    def keep(self, question: str, answer: str) -> None:
        """Add an exchange about the pictures that wait."""
        self.exchanges.append(Exchange(tuple(self.waiting), question, answer))
        self.waiting = []

    def take_back(self) -> Exchange:
        """The last exchange, taken away; its pictures wait again, before any others."""
        last = self.exchanges.pop()
        self.waiting[:0] = last.pictures
        return last

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.exchanges.clear()
        self.waiting.clear()


def _user(pictures: Any, question: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": shown.data} for shown in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
