"""A row of a data file -> a question with the answers that are right.

| keys | hold |
|---|---|
| ``image`` or ``images`` | a path beside the file, a data URI, or encoded bytes; or ``file_name``, a path |
| ``question`` | text; of grounding the phrase whose object is looked for; "<image>" in it is a picture's place |
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
learned is asked for, behind the turns before it. Films and sounds are refused as there, and
so are places for pictures that are not there. Other keys are not looked at.

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
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import Part, Turn
from mm1_mlx.train.data.example import Example, Record, located
from mm1_mlx.train.data.forms import read_example
from mm1_mlx.train.data.pictures import PictureFolder, check_seen, pictures_of
from mm1_mlx.train.data.places import check_places
from mm1_mlx.train.data.questions import (
    ANSWERS,
    Question,
    as_ours,
    check_options,
    read_question,
    text_of,
)

Box = tuple[float, float, float, float]
_CONTROLS = ("Cc", "Zl", "Zp")
# The keys of conversations in rows without a question.
_SPOKEN = ({"messages"}, {"conversations"}, {"texts"}, {"prompt", "completion"})


@dataclass(frozen=True)
class Case:
    """A question with the answers that are right.

    Attributes:
        origin: what errors call its row: "file.jsonl:17".
        images: its pictures, not opened yet.
        question: what is asked; if "<image>" stands in it, in ``hint`` or in
            ``choices``, one does for each picture, which a chat model sees there.
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
        values = as_ours(values)
        turns: tuple[Turn, ...] = ()
        if "question" not in values and any(x <= values.keys() for x in _SPOKEN):
            turns, images, said = _conversation(read_example(record, folder))
            own = any(key in values for key in ANSWERS)
            values |= {"question": _question(turns)} | ({} if own else {"answer": said})
            # Training does not look at one beside a conversation.
            values.pop("hint", None)
            asked = read_question(values)
        else:
            images = tuple(pictures_of(values, folder.find))
            asked = _read_alone(values, images)
        question, answers = asked.text, asked.answers
        if passage and "text" in values and not answers:
            question, answers = _last_word(text_of(values, "text"))
        case = Case(
            origin=record.origin,
            images=images,
            question=question,
            hint=asked.hint,
            answers=answers,
            choices=asked.choices,
            right=asked.right,
            box=_box(values["box"]) if "box" in values else None,
            category=_line(values, "category"),
            turns=turns,
        )
        for name in sorted(needs):
            if name == "box" and "bbox" in values and case.box is None:
                raise DataError(
                    "it has bbox, COCO's [x, y, width, height], and RefCOCO has several "
                    "phrases a row; give a row for each, the phrase as question and box "
                    "as [left, top, right, bottom]"
                )
            if not getattr(case, name):
                raise DataError(
                    f"the row has no {name}, which the task needs; its keys are "
                    f"{sorted(map(str, values))[:8]}"
                )
        return case


def _read_alone(values: Mapping[str, Any], images: tuple[ImageSource, ...]) -> Question:
    """The question of a row that is no conversation, held against what training takes.

    Raises:
        DataError: it would be asked without some of what it is about, or has another
            number of places than pictures.
    """
    check_seen(values, "leave it out")
    if "question" in values:
        check_options(values)
    asked = read_question(values)
    check_places((asked.hint, asked.text, *asked.choices), images)
    return asked


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


def _line(values: Mapping[str, Any], key: str) -> str:
    """A text that may stand in a table: on a terminal a control character acts."""
    text = text_of(values, key)
    if any(unicodedata.category(letter) in _CONTROLS for letter in text):
        raise DataError(f"{key} is {text!r:.60}, expected a line without control codes")
    return text


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
