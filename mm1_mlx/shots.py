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
from mm1_mlx.messages import Message, collect
from mm1_mlx.video import NUM_FRAMES, load_frames

STYLES = ("auto", "chat", "caption", "vqa")
# A part of a message's content, and the kinds that are pictures.
Part = Mapping[str, Any]
PICTURES = ("image", "image_url", "video")
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
        # Not splitlines: JSON texts may hold other separators as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
    if "image" in row and "images" in row:
        raise PromptError(f"{where}: expected image or images, not both")
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
        PromptError: a base model's text was asked for, and the prompt has turns; or a
            message or an example is not one.
    """
    for shot in shots:
        if not isinstance(shot, Shot):
            raise PromptError(f"shots holds {shot!r:.60}, expected a Shot")
    # Whatever a message may get wrong is said here.
    collect(prompt, images)
    before = sum(len(shot.images) for shot in shots)
    messages = _as_messages(prompt, images, before)
    if style == "chat":
        return _as_turns(shots, messages)
    if [message["role"] for message in messages] != ["user"]:
        raise PromptError(
            f"shot style {style!r} writes one text, but the prompt has turns; use "
            "shot style 'chat'"
        )
    return _as_text(shots, _parts_of(messages[0]), style)


def _as_messages(
    prompt: str | Sequence[Message], images: Sequence[ImageSource], before: int
) -> list[Message]:
    """The messages behind ``before`` pictures, every picture in a part of its own."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages: list[dict[str, Any]] = [
        {**message, "content": _parts_of(message)} for message in turns
    ]
    asked = any(_asks_for_picture(p) for m in messages for p in m["content"])
    given = [_image_part(image) for image in images]
    if given and not asked:
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        content = [*given, *messages[last]["content"]]
        messages[last] = {**messages[last], "content": content}
    waiting = iter(given)
    seen = before
    for message in messages:
        for i, part in enumerate(message["content"]):
            if _asks_for_picture(part):
                message["content"][i] = next(waiting)
            elif part["type"] == "region":
                message["content"][i] = _numbered(part, before, seen)
            elif part["type"] == "video":
                message["content"][i] = part = _loaded(part)
            seen += len(part["video"]) if "video" in part else part["type"] in PICTURES
    return [*messages]


def _numbered(part: Part, before: int, seen: int) -> Part:
    """A region that names its picture, which it goes on meaning wherever it is put."""
    number = part.get("picture")
    return {**part, "picture": seen - 1 if number is None else number + before}


def _loaded(video: Part) -> Part:
    """A video as its frames, so that they are read once."""
    frames = load_frames(video["video"], video.get("frames", NUM_FRAMES))
    return {**video, "video": frames, "frames": len(frames)}


def _asks_for_picture(part: Part) -> bool:
    return part["type"] == "image" and part.get("image") is None


def _parts_of(message: Message) -> list[Part]:
    content = message["content"]
    return [_text_part(content)] if isinstance(content, str) else list(content)


def _as_turns(shots: Sequence[Shot], messages: list[Message]) -> list[Message]:
    asked = _text_of(_parts_of(messages[-1]))
    turns: list[Message] = []
    for shot in shots:
        question = asked if shot.question is None else shot.question
        parts = [*map(_image_part, shot.images), _text_part(question)]
        turns.append({"role": "user", "content": parts})
        turns.append({"role": "assistant", "content": shot.solution})
    systems = [m for m in messages if m["role"] == "system"]
    return [*systems, *turns, *(m for m in messages if m["role"] != "system")]


def _text_of(parts: Sequence[Part]) -> str:
    return " ".join(part["text"] for part in parts if part["type"] == "text")


def _as_text(shots: Sequence[Shot], parts: Sequence[Part], style: str) -> list[Message]:
    """One user message: every example's pictures and line, then the question's."""
    seen = [part for part in parts if part["type"] in PICTURES]
    asked = [part for part in parts if part["type"] not in PICTURES]
    question = _text_of(asked)
    content: list[Part] = []
    for shot in shots:
        content += map(_image_part, shot.images)
        own = question if shot.question is None else shot.question
        before, after = _ask(style, own)
        content.append(_text_part(f"{before}{own}{after} {shot.solution}\n"))
    before, after = _ask(style, question)
    content += [*seen, _text_part(before), *asked, _text_part(after)]
    return [{"role": "user", "content": content}]


def _ask(style: str, question: str) -> tuple[str, str]:
    """What a base model reads before and behind a question."""
    if style == "vqa":
        return " Question: ", " Short answer:"
    return " " if question else " A photo of", ""


def _image_part(image: ImageSource) -> Part:
    return {"type": "image", "image": image}


def _text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def final_answer(text: str) -> str:
    """What stands behind the last "Answer:" of a chain of thought, else all of it."""
    parts = re.split(rf"\b{_ANSWER}", text)
    return parts[-1].strip()
