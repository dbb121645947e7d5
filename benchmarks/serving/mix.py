"""What the clients of ``load`` ask for, and what the runtime alone answers to it."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm1_mlx.answer import join
from mm1_mlx.runtime import TINY, Runtime, stream

# Where pictures may be split, so that ``detail`` makes a difference.
RESOLUTION = "2x192"
SEED = 0
# How many requests of the mix have an optional field.
SHARE = 0.4
PICTURES = ("red-star.png", "four-shapes.png")
QUESTIONS = (
    "What colour is the star?",
    "Describe the picture.",
    "How many shapes are there?",
    "Is there a purple heart?",
)
TEXTS = ("USER: What is this? ASSISTANT:", "A red star and", "There are two")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
# The answer's schema by the response format.
FORMATS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"type": "json_object"}, {"type": "object"}),
    (
        {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA}},
        SCHEMA,
    ),
)
# Up to the rounding of several rows at once.
NEAR = 2e-3


@dataclass(frozen=True)
class Question:
    """A prompt, and what is shown with it: names of pictures, and their details."""

    text: str
    pictures: tuple[str, ...] = ()
    details: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class Case:
    """A request, in OpenAI's words and in the runtime's.

    Attributes:
        kind: of the endpoint.
        fields: what OpenAI's client is asked with, but for the model.
        questions: its prompts.
        options: what the runtime is asked with, but for the seed.
    """

    kind: Literal["chat", "completion"]
    fields: dict[str, Any]
    questions: tuple[Question, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        told = {k: v for k, v in self.fields.items() if k not in ("messages", "prompt")}
        return f"{self.kind} {self.questions} {told}"


@dataclass(frozen=True)
class Said:
    """One answer: its text, why it ended, and its tokens' log probabilities."""

    text: str
    reason: str
    scores: tuple[float, ...] | None = None

    def agrees(self, alone: Said, *, stopped: bool) -> bool:
        """Whether it is the answer of the runtime alone.

        Args:
            alone: that answer.
            stopped: whether a stop string may have cut it; its tokens are not told.
        """
        if (self.text, self.reason) != (alone.text, alone.reason):
            return False
        if self.scores is None or alone.scores is None:
            return self.scores is alone.scores
        cut = stopped and self.reason == "stop"
        if len(self.scores) != len(alone.scores) and not (cut and self.scores):
            return False
        pairs = zip(self.scores, alone.scores, strict=False)
        return len(self.scores) <= len(alone.scores) and all(
            abs(a - b) < NEAR for a, b in pairs
        )


@dataclass(frozen=True)
class Reply:
    """All answers to a request, in their order, and how many tokens they say they are."""

    answers: tuple[Said, ...]
    tokens: int | None

    def agrees(self, alone: Reply, case: Case) -> bool:
        """Whether it is what the runtime alone answers."""
        stopped = bool(case.fields.get("stop"))
        return (
            len(self.answers) == len(alone.answers)
            and self.tokens in (None, alone.tokens)
            and all(
                a.agrees(b, stopped=stopped)
                for a, b in zip(self.answers, alone.answers, strict=True)
            )
        )


def cases(count: int) -> list[Case]:
    """Requests, the same ones every time; the first has every field at once."""
    draw = random.Random(SEED)
    return [
        _case(draw, 1.0 if i == 0 else SHARE, chat=i % 4 != 3) for i in range(count)
    ]


def alone(runtime: Runtime, case: Case) -> Reply:
    """What the runtime answers, one answer after another."""
    answers, tokens = [], 0
    for question in case.questions:
        for i in range(case.fields.get("n", 1)):
            options = dict(case.options)
            if "seed" in case.fields:
                options["seed"] = (case.fields["seed"] + i) % 2**64
            shown = [TINY / name for name in question.pictures]
            # The last ones may be split; the mix puts those of low detail first.
            split = sum(detail != "low" for detail in question.details)
            pieces = list(stream(runtime, question.text, shown, tiled=split, **options))
            answer = join(pieces)
            stats = pieces[-1].stats
            assert stats is not None
            tokens += stats.generated_tokens
            scores = tuple(p.score.logprob for p in pieces if p.score is not None)
            told = options["top_logprobs"] is not None
            answers.append(
                Said(answer.text, answer.finish_reason, scores if told else None)
            )
    return Reply(tuple(answers), tokens)


def _case(draw: random.Random, share: float, *, chat: bool) -> Case:
    def maybe() -> bool:
        return draw.random() < share

    fields: dict[str, Any] = {"temperature": draw.choice((0, 0.7, 1.2))}
    options: dict[str, Any] = {"temperature": fields["temperature"]}
    if fields["temperature"]:
        fields["seed"] = draw.randrange(-(2**63), 2**63)
    for name, value, told in (
        ("top_p", 0.9, 0.9),
        ("stop", ["heart", "square"], ["heart", "square"]),
        ("presence_penalty", 0.8, 0.8),
        ("frequency_penalty", 0.6, 0.6),
        ("logit_bias", {"300": 2, "301": -100}, {300: 2.0, 301: -100.0}),
    ):
        if maybe():
            fields[name], options[name] = value, told
    if maybe():
        fields["n"] = draw.choice((2, 3))
    options["top_logprobs"] = top = draw.choice((1, 3)) if maybe() else None
    most = options["max_tokens"] = draw.choice((8, 24, 40))
    if maybe() or draw.random() < 0.5:
        fields["stream"] = True
        fields["stream_options"] = {"include_usage": True}
    if not chat:
        texts = draw.sample(TEXTS, draw.choice((1, 2)))
        fields |= {"prompt": texts if texts[1:] else texts[0], "max_tokens": most}
        if top is not None:
            fields["logprobs"] = top
        options["raw"] = True
        return Case("completion", fields, tuple(map(Question, texts)), options)
    fields[draw.choice(("max_tokens", "max_completion_tokens"))] = most
    if top is not None:
        fields |= {"logprobs": True, "top_logprobs": top}
    if maybe():
        fields["response_format"], options["schema"] = draw.choice(FORMATS)
    names = tuple(draw.sample(PICTURES, draw.choice((1, 2)))) if maybe() else ()
    if not names and draw.random() < 0.5:
        names = (draw.choice(PICTURES),)
    kinds = [draw.choice((None, "low", "auto", "high")) for _ in names]
    details = tuple(sorted(kinds, key=lambda detail: detail != "low"))
    question = Question(draw.choice(QUESTIONS), names, details)
    fields["messages"] = messages(question.text, _urls(names, details))
    return Case("chat", fields, (question,), options)


def messages(text: str, urls: Sequence[dict[str, str]] = ()) -> list[dict[str, Any]]:
    """A conversation of one question, behind its pictures."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": url} for url in urls
    ]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return [{"role": "user", "content": content}]


def data_uri(picture: bytes) -> str:
    """A PNG as a URL."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _urls(names: Sequence[str], details: Sequence[str | None]) -> list[dict[str, str]]:
    return [
        {"url": data_uri((TINY / name).read_bytes())}
        | ({"detail": detail} if detail else {})
        for name, detail in zip(names, details, strict=True)
    ]
