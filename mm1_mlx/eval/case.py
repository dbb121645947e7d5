"""A row of a data file -> a question with the answers that are right.

| keys | hold |
|---|---|
| ``image`` or ``images`` | a path beside the file, a data URI, or encoded bytes |
| ``question`` | text; of grounding the phrase whose object is looked for |
| ``answer`` or ``answers`` | text, or a list of texts or of ``{"answer": text}`` |
| ``caption`` or ``captions`` | what people wrote, for the same as ``answers`` |
| ``choices`` | a list of texts, or ``{"text": [...], "label": [...]}``; ``answer`` is then the number of one, from 0, its label or its text |
| ``box`` | [x1, y1, x2, y2] in pixels of the upright picture |
| ``hint`` | text that stands before the question |
| ``text`` | of LAMBADA a passage, whose last word is the answer |
| ``category`` | figures are also given of each category's questions |

``query`` and ``label`` of ChartQA, and ``options`` of AI2D, as Hugging Face has them, are
read as the like of these. A row of a conversation (``messages``, ``conversations``,
``texts``, ``prompt`` and ``completion``) is read as for training: its last answer that is
learned is asked for, behind the turns before it. Other keys are not looked at.

Examples to show are read here too, not by ``shots.read_shots``: they are rows of the same
data sets, whose other keys are no mistakes, and whose answers are lists or choices.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mm1_mlx.errors import DataError
from mm1_mlx.eval.letters import LETTERS
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import Part, Turn
from mm1_mlx.train.data.example import Example, Record, located
from mm1_mlx.train.data.forms import read_example
from mm1_mlx.train.data.pictures import PictureFolder

Box = tuple[float, float, float, float]
_CONTROLS = ("Cc", "Zl", "Zp")
# The keys of conversations in rows without a question.
_SPOKEN = ({"messages"}, {"conversations"}, {"texts"}, {"prompt", "completion"})
_ANSWERS = ("answer", "answers", "caption", "captions")


@dataclass(frozen=True)
class Case:
    """A question with the answers that are right.

    Attributes:
        origin: what errors call its row: "file.jsonl:17".
        images: its pictures, not opened yet.
        question: what is asked.
        hint: what stands before it.
        answers: those that are right; of a question with choices the text of one.
        choices: what is to be chosen from.
        right: which of the choices is right, counted from 0.
        box: where the object is, in pixels.
        category: figures are given of each one's cases.
        turns: of a conversation those before the answer, the question's last, and None
            where a picture stands.
    """

    origin: str
    images: tuple[ImageSource, ...] = ()
    question: str = ""
    hint: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int | None = None
    box: Box | None = None
    category: str = ""
    turns: tuple[Turn, ...] = ()

    def digest(self) -> bytes:
        """32 bytes that tell it from others, its pictures by their bytes, not names."""
        said = (self.question, self.hint, self.answers, self.choices, self.right)
        turns = [self.turns] if self.turns else []
        written = json.dumps([*said, self.box, self.category, *turns])
        found = hashlib.sha256(written.encode())
        for image in self.images:
            found.update(digest_of(image))
        return found.digest()


def digest_of(image: ImageSource) -> bytes:
    """32 bytes that tell a picture from others; of a file that is missing, zeros."""
    if isinstance(image, Image.Image):
        return hashlib.sha256(image.tobytes()).digest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    if isinstance(image, str):
        return hashlib.sha256(image.encode(errors="surrogatepass")).digest()
    assert isinstance(image, Path)  # No row names a frame of a video.
    if not image.is_file():
        return bytes(32)
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_case(
    record: Record,
    folder: PictureFolder,
    needs: frozenset[str],
    *,
    passage: bool = False,
) -> Case:
    """The question of a row.

    Args:
        record: the row.
        folder: where its pictures are.
        needs: the fields of ``Case`` that may not be empty.
        passage: whether ``text`` is one whose last word is asked. Elsewhere it is not
            looked at: question files of LLaVA and POPE have questions there.

    Raises:
        DataError: names the row and says what is wrong with it.
    """
    values = {key: value for key, value in record.values.items() if value is not None}
    with located(record.origin):
        values = _as_ours(values)
        turns: tuple[Turn, ...] = ()
        if "question" not in values and any(x <= values.keys() for x in _SPOKEN):
            turns, images, said = _conversation(read_example(record, folder))
            own = any(key in values for key in _ANSWERS)
            values |= {"question": _question(turns)} | ({} if own else {"answer": said})
        else:
            images = _pictures(values, folder)
        choices, labels = _choices(values.get("choices", []))
        answers, right = _answers(values), None
        if choices:
            right = _chosen(values.get("answer"), choices, labels)
            answers = (choices[right],)
        question = _text(values, "question")
        if passage and "text" in values and not answers:
            question, answers = _last_word(_text(values, "text"))
        case = Case(
            origin=record.origin,
            images=images,
            question=question,
            hint=_text(values, "hint"),
            answers=answers,
            choices=choices,
            right=right,
            box=_box(values["box"]) if "box" in values else None,
            category=_line(values, "category"),
            turns=turns,
        )
        for name in sorted(needs):
            if not getattr(case, name):
                raise DataError(
                    f"the row has no {name}, which the task needs; its keys are "
                    f"{sorted(map(str, values))[:8]}"
                )
        return case


def _as_ours(values: dict[str, Any]) -> dict[str, Any]:
    """A row of ChartQA or AI2D by our keys; others as they are."""
    if "query" in values and "question" not in values:
        answers = {"answers": values["label"]} if "label" in values else {}
        return {"question": values["query"], **answers} | values
    options, answer = values.get("options"), values.get("answer")
    if not isinstance(options, list) or "choices" in values:
        return values
    if isinstance(answer, str) and answer.isdecimal():
        if answer in options and options.index(answer) != int(answer):
            raise DataError(
                f"answer is {answer!r:.60}, the number of one of the options "
                f"{options!r:.80} and the text of another; give choices and a number"
            )
        answer = int(answer)
    return values | {"choices": options, "answer": answer}


def _conversation(
    example: Example,
) -> tuple[tuple[Turn, ...], tuple[ImageSource, ...], str]:
    """The turns before the last answer that is learned, their pictures, and that.

    Raises:
        DataError: it has none, or one that follows no question.
    """
    if example.kind == "document":
        raise DataError("a document or caption asks nothing; give questions")
    learned = [
        number
        for number, (role, _) in enumerate(example.turns)
        if role == "assistant" and number not in example.unlearned
    ]
    turns = example.turns[: learned[-1]]
    if not turns or turns[-1][0] != "user":
        raise DataError("its last answer follows no turn of the user's")
    seen = sum(part is None for _, parts in turns for part in parts)
    return turns, example.images[:seen], _said(example.turns[learned[-1]][1])


def _question(turns: Sequence[Turn]) -> str:
    """The text of the last turn, every one held against what can be asked."""
    texts = [_said([p for p in parts if p is not None]) for _, parts in turns]
    return texts[-1]


def _said(parts: Sequence[Part]) -> str:
    """A turn's text, which is all that there is.

    Raises:
        DataError: it holds a picture or a region.
    """
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise DataError(
            "a turn refers to a region, or an answer to a picture, by which nothing is "
            "counted; leave it out"
        )
    return "".join(texts)


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise DataError(f"{key} is {value!r:.60}, expected text")
    return _checked(value, key)


def _line(values: Mapping[str, Any], key: str) -> str:
    """A text that may stand in a table: on a terminal a control character acts."""
    text = _text(values, key)
    if any(unicodedata.category(letter) in _CONTROLS for letter in text):
        raise DataError(f"{key} is {text!r:.60}, expected a line without control codes")
    return text


def _checked(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{key} is {text!r:.60}, which is not valid Unicode") from None
    return text


def _pictures(
    values: Mapping[str, Any], folder: PictureFolder
) -> tuple[ImageSource, ...]:
    if values.get("image") and values.get("images"):
        raise DataError("it has both image and images, expected one of them")
    given = values.get("images") or values.get("image") or []
    return tuple(
        folder.find(x) for x in (given if isinstance(given, list) else [given])
    )


def _answers(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of ``answer``, ``answers``, ``caption`` or ``captions``."""
    keys = [key for key in _ANSWERS if key in values]
    if len(keys) > 1:
        raise DataError(f"it has both {keys[0]} and {keys[1]}, expected one of them")
    if not keys:
        return ()
    given = values[keys[0]]
    found = given if isinstance(given, list) else [given]
    return tuple(_answer(answer, keys[0]) for answer in found)


def _answer(answer: Any, key: str) -> str:
    found = answer.get("answer") if isinstance(answer, Mapping) else answer
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str):
        raise DataError(f"{key} holds {answer!r:.60}, expected text")
    return _checked(found, key)


def _choices(given: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is to be chosen from, and what each is called."""
    if isinstance(given, Mapping):
        texts, labels = given.get("text"), given.get("label")
    else:
        texts, labels = given, list(LETTERS)
    for value in (texts, labels):
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise DataError(f"choices is {given!r:.60}, expected a list of texts")
    assert isinstance(texts, list)
    assert isinstance(labels, list)
    if len(texts) == 1 or len(texts) > len(LETTERS) or len(texts) > len(labels):
        raise DataError(
            f"choices has {len(texts)} texts, expected 2 to {len(LETTERS)}, and a label "
            "for each"
        )
    if any(not _checked(text, "choices").strip() for text in texts):
        raise DataError("choices holds an empty text")
    return tuple(texts), tuple(labels[: len(texts)])


def _chosen(answer: Any, choices: tuple[str, ...], labels: tuple[str, ...]) -> int:
    """Which choice the row says is right."""
    named: set[int] = set()
    if type(answer) is int:
        # Not by texts: where numbers are to be chosen from, a number counts them.
        named = {i for i, label in enumerate(labels) if label == str(answer)}
        named |= {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        pairs = enumerate(zip(labels, choices, strict=True))
        named = {i for i, names in pairs if answer in names}
    if len(named) == 1:
        return named.pop()
    if named:
        way_out = (
            "its label or its text" if type(answer) is int else "its number from 0"
        )
        raise DataError(
            f"answer is {answer!r:.60}, which names {len(named)} of the choices "
            f"{list(choices)!r:.80} called {list(labels)!r:.60}; give {way_out}"
        )
    raise DataError(
        f"answer is {answer!r:.60}, expected the number of a choice from 0 to "
        f"{len(choices) - 1}, one of {list(labels)}, or a choice's text"
    )


def _last_word(text: str) -> tuple[str, tuple[str, ...]]:
    """A passage without its last word, and that."""
    before, space, last = text.strip().rpartition(" ")
    if not space or not before or not last:
        raise DataError(
            f"text is {text!r:.60}, expected words of which the last is asked"
        )
    return before, (last,)


def _box(given: Any) -> Box:
    numbers = isinstance(given, list) and all(
        type(x) in (int, float) and abs(x) < 1e9 for x in given
    )
    if not numbers or len(given) != 4 or given[0] >= given[2] or given[1] >= given[3]:
        raise DataError(
            f"box is {given!r:.60}, expected [left, top, right, bottom] in pixels, not "
            "COCO's [x, y, width, height]"
        )
    if max(given) <= 1:
        raise DataError(
            f"box is {given!r:.60}, shares of the picture; expected [left, top, right, "
            "bottom] in pixels"
        )
    return tuple(map(float, given))  # type: ignore[return-value]
