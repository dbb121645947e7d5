"""Few-shot prompting: solved examples with pictures before a question.

MM1 (arXiv 2403.09611), section 4 and appendix: a base model sees examples as one text,
``{IMAGE} A photo of`` for captions and ``{IMAGE} Question: {Q} Short answer:`` for
questions; what separates them is not stated. A chat model sees them as earlier turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.config import PromptConfig
from mm1_mlx.errors import PromptError
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import Message

STYLES = ("auto", "chat", "caption", "vqa")
FIELDS = ("image", "images", "question", "answer", "caption", "reasoning")
MAX_BYTES = 64 << 20
# Where a base model's answer ends: MM1's evaluation, as open_flamingo has it.
STOPS = {"caption": ("\n",), "vqa": ("\n", ".", ",")}
THINK = "Think step by step, then write 'Answer:' and the answer."
_ANSWER = "Answer:"


@dataclass(frozen=True)
class Shot:
    """One solved example; without a question it is a caption of its pictures."""

    images: tuple[ImageSource, ...]
    answer: str
    question: str | None = None
    # The thoughts that lead to the answer.
    reasoning: str | None = None

    @property
    def solution(self) -> str:
        """What the model is shown as its answer."""
        if self.reasoning is None:
            return self.answer
        return f"{self.reasoning} {_ANSWER} {self.answer}"


def read_shots(path: Path) -> list[Shot]:
    """The examples of a JSONL file; a relative picture lies beside the file.

    A line is ``{"image": PATH, "question": TEXT, "answer": TEXT}`` (or ``images``, a
    list), or ``{"image": PATH, "caption": TEXT}``; ``reasoning`` may stand before an answer.

    Raises:
        PromptError: names the line that is not one.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PromptError(f"{str(path)!r} has more than {MAX_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise PromptError(f"{str(path)!r} cannot be read: {reason}") from None
    shots = [
        _read_shot(line, f"{path}:{number}", path.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not shots:
        raise PromptError(f"{str(path)!r} holds no examples, expected a JSON line each")
    return shots


def _read_shot(line: str, where: str, folder: Path) -> Shot:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise PromptError(f"{where}: expected a JSON object, got {line!r:.60}")
    if unknown := sorted(set(row) - set(FIELDS)):
        raise PromptError(f"{where}: unknown field(s) {unknown[:5]}; known: {FIELDS}")
    texts = {
        key: _text(row.get(key), key, where)
        for key in ("question", "answer", "caption", "reasoning")
    }
    answer = texts["answer"] or texts["caption"]
    if answer is None or (texts["answer"] and texts["caption"]):
        raise PromptError(f"{where}: expected either an answer or a caption")
    names = row.get("images", [row.get("image")])
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise PromptError(f"{where}: expected image, a path, or images, a list of them")
    images = tuple(_source(name, folder) for name in names)
    return Shot(images, answer, texts["question"], texts["reasoning"])


def _text(value: Any, key: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise PromptError(f"{where}: {key} is {value!r:.40}, expected text")
    return value


def _source(name: str, folder: Path) -> ImageSource:
    return name if name[:5].lower() == "data:" else folder / name


def choose_style(style: str, shots: Sequence[Shot], config: PromptConfig) -> str:
    """How the examples are shown: a base model's template has no turns."""
    if style not in STYLES:
        raise PromptError(f"shot style {style!r} is not one of {list(STYLES)}")
    if style != "auto":
        return style
    if config.template != "plain":
        return "chat"
    return "vqa" if any(shot.question for shot in shots) else "caption"


def stops_of(style: str, shots: Sequence[Shot]) -> Sequence[str]:
    """The strings that end a base model's answer."""
    thinks = any(shot.reasoning for shot in shots)
    # Thoughts are made of sentences.
    return STOPS.get("caption" if thinks and style == "vqa" else style, ())


def with_shots(
    shots: Sequence[Shot],
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource],
    style: str,
) -> list[Message]:
    """The conversation with the examples before its question.

    Args:
        shots: the examples.
        prompt: a question, or messages.
        images: pictures of the question; they go before its text.
        style: from ``choose_style``.

    Raises:
        PromptError: a base model's text was asked for, and the prompt has turns.
    """
    if style == "chat":
        return _as_turns(shots, _as_messages(prompt, images))
    if not isinstance(prompt, str):
        if [m.get("role") for m in prompt if isinstance(m, Mapping)] != ["user"]:
            raise PromptError(
                f"shot style {style!r} writes one text, but the prompt has turns; use "
                "shot style 'chat'"
            )
        return _as_text(shots, prompt[0].get("content", ""), images, style)
    return _as_text(shots, prompt, images, style)


def _as_messages(
    prompt: str | Sequence[Message], images: Sequence[ImageSource]
) -> list[Message]:
    """The messages, the pictures in the last user message unless it has places for them."""
    messages = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    )
    messages = list(messages)
    if not images:
        return messages
    places = [
        part
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, Mapping) and part.get("type") == "image"
    ]
    if places:
        raise PromptError(
            "with shots, put each picture into its own part of the messages: "
            "{'type': 'image', 'image': PATH}"
        )
    return [*messages[:-1], _with_pictures(messages[-1], images)]


def _with_pictures(message: Message, images: Sequence[ImageSource]) -> Message:
    content = message.get("content", "")
    rest = [_text_part(content)] if isinstance(content, str) else list(content)
    return {**message, "content": [*map(_image_part, images), *rest]}


def _as_turns(shots: Sequence[Shot], messages: list[Message]) -> list[Message]:
    asked = _question_of(messages[-1])
    turns: list[Message] = []
    for shot in shots:
        question = asked if shot.question is None else shot.question
        parts = [*map(_image_part, shot.images), _text_part(question)]
        turns.append({"role": "user", "content": parts})
        turns.append({"role": "assistant", "content": shot.solution})
    systems = [m for m in messages if m.get("role") == "system"]
    return [*systems, *turns, *(m for m in messages if m.get("role") != "system")]


def _question_of(message: Message) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    return " ".join(
        part["text"]
        for part in content
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    )


def _as_text(
    shots: Sequence[Shot], prompt: Any, images: Sequence[ImageSource], style: str
) -> list[Message]:
    question = prompt if isinstance(prompt, str) else _question_of({"content": prompt})
    own = [] if isinstance(prompt, str) else [p for p in prompt if "text" not in p]
    parts: list[dict[str, Any]] = []
    for shot in shots:
        parts += map(_image_part, shot.images)
        asked = question if shot.question is None else shot.question
        parts.append(_text_part(f"{_ask(asked, style)} {shot.solution}\n"))
    parts += [*map(_image_part, images), *own]
    parts.append(_text_part(_ask(question, style)))
    return [{"role": "user", "content": parts}]


def _ask(question: str, style: str) -> str:
    if style == "vqa":
        return f" Question: {question} Short answer:"
    return f" {question or 'A photo of'}"


def _image_part(image: ImageSource) -> dict[str, Any]:
    return {"type": "image", "image": image}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def final_answer(text: str) -> str:
    """What stands behind the last "Answer:" of a chain of thought, else all of it."""
    parts = re.split(rf"\b{_ANSWER}", text)
    return parts[-1].strip()
