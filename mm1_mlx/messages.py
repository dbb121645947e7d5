"""Chat messages and pictures -> turns, and the pictures in the order they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm1_mlx.errors import PromptError
from mm1_mlx.image import ImageSource
from mm1_mlx.video import NUM_FRAMES, load_frames

Message = Mapping[str, Any]
# A role, and its parts: text, or None where a picture stands.
Turn = tuple[str, list[str | None]]

ROLES = ("system", "user", "assistant")
PARTS = ("text", "image", "image_url", "video")
GIVE_AS_MANY = "give one for each place"


def collect(
    messages: str | Sequence[Message], images: Sequence[ImageSource]
) -> tuple[list[Turn], list[ImageSource]]:
    """The conversation's turns, and its pictures in order.

    Raises:
        PromptError: a message is not one, or pictures and places differ in number.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not messages:
        raise PromptError("there are no messages, so there is nothing to answer")
    if isinstance(images, ImageSource):
        raise PromptError(
            f"images is one {type(images).__name__}, expected a list of pictures"
        )
    given = list(images)
    sources: list[ImageSource] = []
    turns = [_read_message(message, given, sources) for message in messages]
    if given and not any(None in parts for _, parts in turns):
        users = [parts for role, parts in turns if role == "user"]
        if not users:
            raise PromptError("pictures need a user message to stand in")
        users[-1][:0] = [None] * len(given)
        sources, given = given, []
    if given:
        raise PromptError(
            f"prompt has {len(sources)} places for pictures but "
            f"{len(sources) + len(given)} images were given; {GIVE_AS_MANY}"
        )
    return turns, sources


def _read_message(
    message: Message, given: list[ImageSource], sources: list[ImageSource]
) -> Turn:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise PromptError(f"message role {role!r} is not one of {list(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return role, [_checked(content)]
    if not isinstance(content, list | tuple):
        raise PromptError(
            f"message content must be a string or a list of parts, got {content!r:.80}"
        )
    parts = [piece for part in content for piece in _read_part(part, given, sources)]
    return role, _join_texts(parts)


def _checked(text: str) -> str:
    """The text, if it is one: undecodable bytes of a command line arrive as halves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(
            f"prompt {text!r:.60} is not valid UTF-8; convert it first"
        ) from None
    return text


def _join_texts(parts: list[str | None]) -> list[str | None]:
    """The parts with neighbouring texts as one: "<ima" and "ge>" is a typed "<image>"."""
    joined: list[str | None] = []
    for part in parts:
        if part is not None and joined and joined[-1] is not None:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _read_part(
    part: Any, given: list[ImageSource], sources: list[ImageSource]
) -> list[str | None]:
    """What a part puts into its turn; its pictures join ``sources``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PARTS:
        raise PromptError(f"message part {kind!r} is not one of {list(PARTS)}")
    source = part.get(kind)
    if kind == "text":
        if not isinstance(source, str):
            raise PromptError(f"message part 'text' holds {source!r:.60}, expected text")
        return [_checked(source)]
    if kind == "video":
        frames = load_frames(_need(source), part.get("frames", NUM_FRAMES))
        sources += frames
        return [None] * len(frames)
    if kind == "image_url":
        source = _data_uri(source)
    if source is None:
        if not given:
            raise PromptError(
                f"prompt has more places for pictures than the {len(sources)} images "
                f"given; {GIVE_AS_MANY}"
            )
        source = given.pop(0)
    sources.append(source)
    return [None]


def _need(video: Any) -> Any:
    if video is None:
        raise PromptError(
            "a video part has no video; give a path, or a list of pictures as "
            "{'type': 'video', 'video': PATH}"
        )
    return video


def _data_uri(source: Any) -> str:
    """The URI of an ``image_url`` part, if it carries the picture itself."""
    url = source.get("url") if isinstance(source, Mapping) else source
    # Messages may come from elsewhere; a name in them must not open a file here.
    if not (isinstance(url, str) and url[:5].lower() == "data:"):
        raise PromptError(
            f"image_url is {url!r:.60}, expected a data URI; give a file as "
            "{'type': 'image', 'image': PATH}"
        )
    return url
