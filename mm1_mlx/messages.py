"""Chat messages and pictures -> turns, and the pictures in the order they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm1_mlx.errors import PromptError
from mm1_mlx.image import ImageSource
from mm1_mlx.video import NUM_FRAMES, load_frames

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Region:
    """A place in a picture that a message refers to.

    Attributes:
        kind: ``box``, ``point`` or ``mask``.
        shape: in pixels of the picture: [x1, y1, x2, y2], [x, y], or a mask as
            ``regions.read_mask`` takes it.
        picture: which of the prompt's pictures, counted from 0; in a message None is the
            latest before it, in a turn of ``collect`` it is always a number.
    """

    kind: str
    shape: Any
    picture: int | None = None


@dataclass(frozen=True)
class RegionToken:
    """Where the token of a region of a picture stands, after ``regions.refer``."""

    picture: int


# Text, None where a picture stands, or a place in one.
Part = str | Region | RegionToken | None
# A role, and its parts.
Turn = tuple[str, list[Part]]

ROLES = ("system", "user", "assistant")
PARTS = ("text", "image", "image_url", "video", "region")
SHAPES = ("box", "point", "mask")
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
    return _with_pictures_named(turns, len(sources)), sources


def _with_pictures_named(turns: list[Turn], count: int) -> list[Turn]:
    """The turns whose regions all say which of ``count`` pictures they are in."""
    before, named = 0, []
    for role, parts in turns:
        written: list[Part] = []
        for part in parts:
            before += part is None
            if isinstance(part, Region):
                part = _with_picture_named(part, before, count)
            written.append(part)
        named.append((role, written))
    return named


def _with_picture_named(region: Region, before: int, count: int) -> Region:
    number = region.picture
    if number is None:
        if before == 0:
            raise PromptError(
                f"a {region.kind} refers to the latest picture before it, but there is "
                "none; put the picture first, or name one: 'picture': 0"
            )
        number = before - 1
    if type(number) is not int or not 0 <= number < count:
        raise PromptError(
            f"a {region.kind} refers to picture {number!r:.40}, counted from 0, but the "
            f"prompt has {count} pictures; give the number of one of them"
        )
    return replace(region, picture=number)


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
    if not content:
        raise PromptError(
            f"the {role} message's content is an empty list; give it text"
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


def _join_texts(parts: list[Part]) -> list[Part]:
    """The parts with neighbouring texts as one: "<ima" and "ge>" is a typed "<image>"."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(last, str):
            joined[-1] = last + part
        else:
            joined.append(part)
    return joined


def _read_part(
    part: Any, given: list[ImageSource], sources: list[ImageSource]
) -> list[Part]:
    """What a part puts into its turn; its pictures join ``sources``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PARTS:
        raise PromptError(f"message part {kind!r} is not one of {list(PARTS)}")
    source = part.get(kind)
    if kind == "text":
        if not isinstance(source, str):
            raise PromptError(
                f"message part 'text' holds {source!r:.60}, expected text"
            )
        return [_checked(source)]
    if kind == "region":
        return [_read_region(part)]
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


def _read_region(part: Mapping[str, Any]) -> Region:
    shapes = [key for key in SHAPES if part.get(key) is not None]
    if len(shapes) != 1:
        raise PromptError(
            f"a region has {shapes or 'no shape'}, expected one of {list(SHAPES)}: "
            "{'type': 'region', 'box': [x1, y1, x2, y2]}"
        )
    return Region(shapes[0], part[shapes[0]], part.get("picture"))


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
