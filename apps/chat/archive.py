"""A conversation in a file, as messages of OpenAI's form.

A picture is named by its path beside the file while that holds it still, and is part of
the file where it does not.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.files import read_json, replace_json

from .conversation import Conversation, Exchange, Shown
from .pictures import read_picture

FORMAT = "mm1-chat-1"


def is_chat(path: Path) -> bool:
    """Whether a file holds a saved conversation."""
    try:
        content = read_json(path)
    except MM1Error:
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def save(path: Path, conversation: Conversation, model: str) -> None:
    """Write a conversation, at once; pictures that wait are left out.

    Raises:
        OSError: it cannot be written.
    """
    messages: list[dict[str, Any]] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for one in conversation.exchanges:
        parts: list[dict[str, Any]] = [_part(shown, path) for shown in one.pictures]
        parts.append({"type": "text", "text": one.question})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": one.answer})
    digests = [
        hashlib.sha256(shown.data).hexdigest()
        for one in conversation.exchanges
        for shown in one.pictures
    ]
    content = {
        "format": FORMAT,
        "model": model,
        "messages": messages,
        "pictures_sha256": digests,
    }
    replace_json(path, content)


def load(path: Path) -> tuple[Conversation, list[str]]:
    """A saved conversation, and the names of pictures that have changed since.

    Raises:
        MM1Error: it is none, or a picture of it cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PromptError(f"{path} is no chat that /save wrote")
    conversation = Conversation()
    try:
        messages = list(content["messages"])
        digests = list(content["pictures_sha256"])
        if messages and messages[0]["role"] == "system":
            conversation.system = _text(messages.pop(0)["content"])
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            if (user["role"], assistant["role"]) != ("user", "assistant"):
                raise TypeError
            *pictures, text = user["content"]
            shown = tuple(_shown(part, path) for part in pictures)
            question, answer = _text(text["text"]), _text(assistant["content"])
            conversation.exchanges.append(Exchange(shown, question, answer))
        pairs = list(zip(conversation.pictures, digests, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, MM1Error):
            raise
        raise PromptError(
            f"{path} is damaged: no questions and answers in turn"
        ) from None
    changed = [
        shown.name
        for shown, digest in pairs
        if hashlib.sha256(shown.data).hexdigest() != digest
    ]
    return conversation, changed


def _part(shown: Shown, path: Path) -> dict[str, Any]:
    source = Path(shown.name)
    try:
        same = source.read_bytes() == shown.data
    except OSError:
        same = False
    if same:
        url = os.path.relpath(source.absolute(), path.absolute().parent)
    else:
        url = f"data:image/*;base64,{base64.b64encode(shown.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _shown(part: Any, path: Path) -> Shown:
    url = _text(part["image_url"]["url"])
    return read_picture(url if url[:5] == "data:" else path.parent / url)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
