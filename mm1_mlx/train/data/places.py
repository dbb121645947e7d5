"""Where pictures stand in messages: "<image>" in a text, or a part without a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mm1_mlx.errors import DataError
from mm1_mlx.image import ImageSource

# What stands in the text where a picture does.
PLACE = "<image>"

# The parts of a message.
Content = list[dict[str, Any]]
Messages = list[dict[str, Any]]


def with_places(messages: Messages, images: list[ImageSource]) -> Messages:
    """The messages with a place for each picture.

    Raises:
        DataError: they differ in number.
    """
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    places = sum(text.count(PLACE) for m in messages for text in asked_in(m))
    if not images and not places:
        return messages
    asked = sum(
        isinstance(part, Mapping)
        and part.get("type") == "image"
        and part.get("image") is None
        for m in messages
        if isinstance(m["content"], list)
        for part in m["content"]
    )
    if places + asked == 0 and images and users:
        # Beside the first question, where whoever wrote none meant them to be.
        first = messages[users[0]]
        content = first["content"]
        shown = [text_part(content)] if isinstance(content, str) else content
        placed = {**first, "content": [*image_parts(len(images)), *shown]}
        return [*messages[: users[0]], placed, *messages[users[0] + 1 :]]
    _check_count(places + asked, images)
    return [
        {**m, "content": _placed(m["content"])}
        if any(PLACE in text for text in asked_in(m))
        else m
        for m in messages
    ]


def check_places(texts: Iterable[str], images: Sequence[ImageSource]) -> None:
    """Pass only if a question's texts have no places, or one for each picture.

    Raises:
        DataError: they differ in number.
    """
    if places := sum(text.count(PLACE) for text in texts):
        _check_count(places, images)


def _check_count(places: int, images: Sequence[ImageSource]) -> None:
    if places != len(images):
        raise DataError(
            f"it has {places} places for pictures ({PLACE}) but {len(images)} pictures; "
            "give one for each place"
        )


def without_places(text: str) -> str:
    """The text alone, for where all pictures stand before it."""
    return text.replace(PLACE, "").strip("\n") if PLACE in text else text


def objects_in(values: Any) -> list[Mapping[str, Any]]:
    """Those of a list's items that are objects; none of what is no list."""
    items = values if isinstance(values, list) else []
    return [item for item in items if isinstance(item, Mapping)]


def asked_in(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message, if it is the user's."""
    content = message.get("content")
    if message.get("role") != "user":
        return []
    return [content] if isinstance(content, str) else texts_in(content)


def texts_in(content: Any) -> list[str]:
    """The texts of a list of parts."""
    texts = [x.get("text") for x in objects_in(content) if x.get("type") == "text"]
    return [text for text in texts if isinstance(text, str)]


def image_parts(count: int) -> Content:
    """Places of so many pictures."""
    return [{"type": "image"}] * count


def text_part(text: str) -> dict[str, Any]:
    """A part of text."""
    return {"type": "text", "text": text}


def _cut_at_places(text: str, *, alone: bool = True) -> Content:
    """The text in parts; the template writes what stands between picture and text.

    ``alone`` it is a whole message.
    """
    stretches = [stretch.strip("\n") for stretch in text.split(PLACE)]
    if alone and len(stretches) == 2 and not stretches[1].strip():
        # As LLaVA's ``preprocess_multimodal``: a picture behind its question goes first.
        stretches.reverse()
    content: Content = []
    for number, stretch in enumerate(stretches):
        content += image_parts(min(number, 1))
        content += [text_part(stretch)] if stretch else []
    return content


def _placed(content: str | Content) -> Content:
    """A message's content with pictures where its texts have places for them."""
    if isinstance(content, str):
        return _cut_at_places(content)
    parts: Content = []
    for part in content:
        text = part.get("text") if part.get("type") == "text" else None
        if isinstance(text, str) and PLACE in text:
            parts += _cut_at_places(text, alone=len(content) == 1)
        else:
            parts.append(part)
    return parts
