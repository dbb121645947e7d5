"""A row's keys and values -> an example: what the forms of public data sets mean.

| form | keys | becomes |
|---|---|---|
| llava | ``conversations`` [{from, value}], ``image`` | a conversation, "<image>" its places |
| messages | ``messages`` [{role, content, weight}], ``images`` | a conversation |
| turns | ``texts`` [{user, assistant}], ``images`` | a conversation (the Cauldron) |
| question | ``question``, ``answer``, ``image`` | a conversation (``questions``) |
| completion | ``prompt``, ``completion`` | a conversation (mlx-lm) |
| parts | ``parts`` [text or {type: ...}], ``images`` | a document, as it is written |
| interleaved | ``texts`` and ``images``, null in the other | a document (OBELICS) |
| caption | ``caption`` or ``text``, ``image`` | a document, or the answer to a prompt |
| text | ``text`` | a document |

Of several answers or captions the one that most people gave is learned, else the first.
Options are listed behind their question as they are when asked, and a letter is the
answer, unless the row's prompt asks for something else: then the option's text is.

``image`` may be a list, ``images`` always is one, ``file_name`` is a path. Of other keys
films and sounds (``pictures.UNSEEN``) are refused, for without them a row teaches to
guess; of a row whose form is named they are passed over, as all others are. In a document
each picture begins a line and a space follows it, as in the examples that ``shots`` shows a
base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DataError
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import collect
from mm1_mlx.train.data.example import Example, Kind, Record, located
from mm1_mlx.train.data.pictures import (
    Find,
    PictureFolder,
    check_seen,
    has_pictures,
    pictures_of,
)
from mm1_mlx.train.data.places import (
    PLACE,
    Content,
    Messages,
    asked_in,
    image_parts,
    objects_in,
    text_part,
    texts_in,
    with_places,
)
from mm1_mlx.train.data.questions import (
    CAPTIONS,
    LETTERS,
    answers_of,
    as_ours,
    check_options,
    list_options,
    most_said,
    read_question,
    with_hint,
)
from mm1_mlx.train.paper import LETTER

_ROLES = {"human": "user", "gpt": "assistant"}
_SPEAKERS = ("human", "gpt", "user", "assistant", "system")

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Draft:
    """A row as messages, and the pictures for the places that bring none."""

    messages: Messages
    images: list[ImageSource]
    # A document is one message of the user's.
    kind: Kind


def read_example(
    record: Record,
    folder: PictureFolder,
    form: str | None = None,
    prompt: str | None = None,
) -> Example:
    """The example of a row.

    Args:
        record: the row.
        folder: where its pictures are.
        form: one of ``FORMS``, None to recognise it by its keys.
        prompt: what is added to every question, or asked of a caption's picture.

    Raises:
        DataError: names the row and says what is wrong with it.
    """
    values = {key: value for key, value in record.values.items() if value is not None}
    with located(record.origin):
        if form is None:
            _check_whole(values)
        draft = FORMS[form or recognise(values)](values, folder.find, prompt)
        turns, sources = collect(draft.messages, draft.images)
        if draft.kind == "conversation":
            unlearned = _check_answers(draft.messages)
        else:
            turns, unlearned = [("document", turns[0][1])], frozenset()
        return Example(
            *(tuple(turns), tuple(sources), record.origin, draft.kind, unlearned)
        )


def recognise(values: Values) -> str:
    """The form of a row, by the keys that hold something.

    Raises:
        DataError: it is none that is known.
    """
    if "conversations" in values:
        turns = values["conversations"]
        named = isinstance(turns, list) and any(
            isinstance(turn, Mapping) and "role" in turn for turn in turns
        )
        return "messages" if named else "llava"
    for form in ("messages", "parts"):
        if form in values:
            return form
    if "texts" in values:
        texts = values["texts"]
        spoken = isinstance(texts, list) and any(isinstance(t, Mapping) for t in texts)
        return "turns" if spoken else "interleaved"
    asked = as_ours(values)
    if "question" in asked and ("answer" in asked or "answers" in asked):
        return "question"
    if "prompt" in values and "completion" in values:
        return "completion"
    if any(key in values for key in CAPTIONS) or (
        "text" in values and has_pictures(values)
    ):
        return "caption"
    if "text" in values:
        return "text"
    raise DataError(
        f"a row with the keys {sorted(map(str, values))[:8]} has no form that is known; "
        f"the forms are {list(FORMS)}"
    )


def _check_whole(values: Values) -> None:
    """Pass only if a row holds nothing that its form would leave out.

    Raises:
        DataError: it holds a film or a sound, or places for pictures that are not there.
    """
    check_seen(values, "name the rows' form in a mixture to do without")
    if recognise(values) != "messages":
        return
    messages = values.get("messages", values.get("conversations"))
    typed = any(PLACE in text for m in objects_in(messages) for text in asked_in(m))
    if typed and not has_pictures(values):
        raise DataError(
            f"it has {PLACE} but no pictures for it; name them as images, or the form "
            "'messages' in a mixture if text is meant"
        )


def _check_answers(messages: Messages) -> frozenset[int]:
    """Which answers are only read, by their weight in OpenAI's form.

    Raises:
        DataError: an answer is empty, or none is learned.
    """
    answers = {i: m for i, m in enumerate(messages) if m["role"] == "assistant"}
    if not answers:
        raise DataError("it has no assistant turn, so nothing is learned of it")
    for message in answers.values():
        content = message["content"]
        texts = [content] if isinstance(content, str) else texts_in(content)
        others = not isinstance(content, str) and len(texts) < len(content)
        if not others and not "".join(texts).strip():
            raise DataError("an assistant turn is empty, expected an answer")
    weights = {i: m.get("weight", 1) for i, m in answers.items()}
    if wrong := [x for x in weights.values() if x is not None and x not in (0, 1)]:
        raise DataError(
            f"the weight of an assistant turn is {wrong[0]!r:.40}, expected 0 or 1"
        )
    unlearned = frozenset(i for i, weight in weights.items() if weight == 0)
    if len(unlearned) == len(answers):
        raise DataError(
            "every assistant turn has weight 0, so nothing is learned of it"
        )
    return unlearned


# Reading values


def _need(values: Values, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    value = values.get(key)
    if not isinstance(value, kind):
        raise DataError(f"{key} is {value!r:.60}, expected {what}")
    return value


def _text(values: Values, key: str) -> str:
    return str(_need(values, key, str, "text"))


def _with_prompt(messages: Messages, prompt: str | None) -> Messages:
    """The messages with the prompt behind every question that does not end with it."""
    if prompt is None:
        return messages
    asked = []
    for message in messages:
        content = message["content"]
        if message["role"] != "user":
            asked.append(message)
            continue
        parts = [text_part(content)] if isinstance(content, str) else list(content)
        last = parts[-1] if parts else {}
        text = last.get("text") if isinstance(last, Mapping) else None
        if not isinstance(text, str):
            parts.append(text_part(prompt))
        elif not text.rstrip().endswith(prompt):
            parts[-1] = text_part(f"{text.rstrip()}\n{prompt}" if text else prompt)
        asked.append({**message, "content": parts})
    return asked


# The forms


def _llava(values: Values, find: Find, prompt: str | None) -> Draft:
    messages = []
    for turn in _need(values, "conversations", list, "a list of turns"):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in _SPEAKERS:
            raise DataError(
                f"a turn is from {speaker!r:.40}, expected one of {list(_SPEAKERS)}"
            )
        role = _ROLES.get(speaker, speaker)
        messages.append({"role": role, "content": _text(turn, "value")})
    return _conversation(messages, pictures_of(values, find), prompt)


def _messages(values: Values, find: Find, prompt: str | None) -> Draft:
    messages = []
    key = "messages" if "messages" in values else "conversations"
    for message in _need(values, key, list, "a list of messages"):
        if not isinstance(message, Mapping):
            raise DataError(f"a message is {message!r:.60}, expected an object")
        content = message.get("content")
        if isinstance(content, list):
            content = [_found(part, find) for part in content]
        elif not isinstance(content, str):
            raise DataError(
                f"a message's content is {content!r:.60}, expected text or a list of parts"
            )
        messages.append({**message, "content": content, "role": message.get("role")})
    images = pictures_of(values, find)
    if not images:
        # A typed "<image>" is text where there are no pictures to place.
        return Draft(_with_prompt(messages, prompt), images, "conversation")
    return _conversation(messages, images, prompt)


def _turns(values: Values, find: Find, prompt: str | None) -> Draft:
    messages: Messages = []
    for turn in _need(values, "texts", list, "a list of turns"):
        if not isinstance(turn, Mapping):
            raise DataError(f"a turn is {turn!r:.60}, expected {{user, assistant}}")
        messages.append({"role": "user", "content": _text(turn, "user")})
        messages.append({"role": "assistant", "content": _text(turn, "assistant")})
    return _conversation(messages, pictures_of(values, find), prompt)


def _question(values: Values, find: Find, prompt: str | None) -> Draft:
    values = as_ours(values)
    _text(values, "question")
    check_options(values)
    asked = read_question(values)
    if not asked.answers:
        raise DataError("its answers are an empty list, expected one at least")
    text = with_hint(asked.hint, context=bool(asked.choices)) + asked.text
    answer = most_said(asked.answers)
    if asked.choices:
        assert asked.right is not None
        text += f"\n{list_options(asked.choices)}"
        prompt = LETTER if prompt is None else prompt
        if "letter" in prompt.lower():
            answer = LETTERS[asked.right]
    return _pair(text, answer, pictures_of(values, find), prompt)


def _completion(values: Values, find: Find, prompt: str | None) -> Draft:
    asked, answered = (_text(values, key) for key in ("prompt", "completion"))
    return _pair(asked, answered, pictures_of(values, find), prompt)


def _pair(
    asked: str, answered: str, images: list[ImageSource], prompt: str | None
) -> Draft:
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answered},
    ]
    return _conversation(messages, images, prompt)


def _conversation(
    messages: Messages, images: list[ImageSource], prompt: str | None
) -> Draft:
    if not messages:
        raise DataError("it has no turns")
    placed = _with_prompt(with_places(messages, images), prompt)
    return Draft(placed, images, "conversation")


def _parts(values: Values, find: Find, prompt: str | None) -> Draft:
    content: Content = [
        text_part(part) if isinstance(part, str) else _found(part, find)
        for part in _need(values, "parts", list, "a list of parts")
    ]
    return _document(content, pictures_of(values, find), prompt)


def _interleaved(values: Values, find: Find, prompt: str | None) -> Draft:
    texts = _need(values, "texts", list, "a list of texts, null where a picture is")
    images = _need(values, "images", list, "a list of pictures, null where text is")
    if len(texts) != len(images):
        raise DataError(
            f"it has {len(texts)} texts but {len(images)} images, expected as many, "
            "null where the other is"
        )
    content, sources = [], []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise DataError(
                f"texts[{number}] and images[{number}] are both "
                f"{'null' if text is None else 'given'}, expected one of them"
            )
        if image is not None:
            sources.append(find(image))
            content += image_parts(1)
        elif isinstance(text, str):
            content.append(text_part(text))
        else:
            raise DataError(f"texts[{number}] is {text!r:.60}, expected text")
    return _document(_spaced(content), sources, prompt)


def _caption(values: Values, find: Find, prompt: str | None) -> Draft:
    images = pictures_of(values, find)
    said = {key: values[key] for key in CAPTIONS if key in values}
    answers = answers_of(said) if said else (_text(values, "text"),)
    caption = most_said(answers or ("",)).strip()
    if not images:
        raise DataError("a caption has no picture; name it as image, or give text")
    *before, caption = (stretch.strip() for stretch in caption.split(PLACE))
    if before and (len(before) != len(images) or any(before)):
        raise DataError(
            f"its caption has {PLACE}, which would be learned as text; leave it out, its "
            f"{len(images)} pictures stand before it, or write a document in parts"
        )
    if not caption:
        raise DataError("its caption is empty")
    places = image_parts(len(images))
    if prompt is None:
        return _document(_spaced([*places, text_part(caption)]), images, None)
    messages: Messages = [
        {"role": "user", "content": [*places, text_part(prompt)]},
        {"role": "assistant", "content": caption},
    ]
    return Draft(messages, images, "conversation")


def _plain(values: Values, find: Find, prompt: str | None) -> Draft:
    if images := pictures_of(values, find):
        raise DataError(f"a text has {len(images)} pictures; give it as a caption")
    return _document([text_part(_text(values, "text"))], [], prompt)


def _document(content: Content, images: list[ImageSource], prompt: str | None) -> Draft:
    if prompt is not None:
        raise DataError(
            f"a document asks nothing, so the prompt {prompt[:40]!r} has no place in it; "
            "take the prompts from its data set"
        )
    texts = [part.get("text") for part in content]
    if not any(isinstance(text, str) and text.strip() for text in texts):
        raise DataError("a document without text teaches nothing")
    return Draft([{"role": "user", "content": content}], images, "document")


def _found(part: Any, find: Find) -> Any:
    """A part of a message, the picture that it names found in its folder."""
    if not isinstance(part, Mapping):
        raise DataError(f"a part is {part!r:.60}, expected an object with a type")
    kind = part.get("type")
    if kind == "image":
        names = (part.get(key) for key in ("image", "path", "url"))
        source = next((name for name in names if name is not None), None)
        return {"type": "image", "image": None if source is None else find(source)}
    if kind == "image_url":
        # Of a data set it may name a file, which is looked for where pictures may lie.
        return {"type": "image", "image": find(part.get("image_url"))}
    if kind == "video":
        video = part.get("video")
        if isinstance(video, list):
            return {**part, "video": [find(frame) for frame in video]}
        found = find(video)
        if isinstance(found, Path) and found.is_dir():
            # Each of a folder's may be a link out of it.
            for frame in found.iterdir():
                find(str(frame.absolute()))
        return {**part, "video": found}
    if kind == "region" and part.get("mask") is not None:
        return {**part, "mask": find(part["mask"])}
    return part


def _spaced(content: Content) -> Content:
    """Every picture at the beginning of a line, a space behind it."""
    spaced: Content = []
    for part in content:
        before = spaced[-1] if spaced else None
        if part["type"] == "text":
            text = part["text"].strip()
            seen = before is not None and before["type"] == "image"
            line = "\n" if before is not None and not seen else ""
            spaced.append(text_part(f"{' ' if seen else line}{text}"))
            continue
        if before is not None and before["type"] == "text":
            spaced[-1] = text_part(before["text"] + "\n")
        spaced.append(part)
    return spaced


Read = Callable[[Values, Find, str | None], Draft]
FORMS: dict[str, Read] = {
    "llava": _llava,
    "messages": _messages,
    "turns": _turns,
    "question": _question,
    "completion": _completion,
    "parts": _parts,
    "interleaved": _interleaved,
    "caption": _caption,
    "text": _plain,
}
