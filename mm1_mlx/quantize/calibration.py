"""Prompts with pictures that a packed model is learned on and measured by.

A file names them, one JSON object a line, pictures by their paths from the file's folder:

    {"prompt": "What is this?", "images": ["a.png", "b.png"]}

or is one to train on, in any form of ``train/data/forms.py`` that asks something: up to
its first answer. A folder gives its pictures, each with one of our questions. Without
either the pictures are drawn. Answers are not needed: what matters is what the unpacked
model would say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DataError, PromptError
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import Message, Part
from mm1_mlx.quantize.pictures import draw_picture
from mm1_mlx.train.data.example import Record, located
from mm1_mlx.train.data.files import Files, find_files
from mm1_mlx.train.data.forms import read_example
from mm1_mlx.train.data.pictures import PictureFolder

QUESTIONS = (
    "Describe this picture.",
    "What do you see?",
    "What colours are in the picture?",
    "How many things are there?",
    "What is in the middle?",
    "What is on the left?",
    "Is there anything round?",
    "What is the largest thing in the picture?",
)
# For a model that takes text only.
TEXTS = (
    "Name three colours and something that has each of them.",
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse.",
    "What is 17 times 23?",
    "Translate 'good morning' into French, German and Spanish.",
    "List the planets from the sun outwards.",
    "How do I boil an egg?",
    "Write a Python function that reverses a list.",
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MIN_EXAMPLES = 4


@dataclass(frozen=True)
class Example:
    """A question, or messages up to one, and the pictures for their places."""

    prompt: str | Sequence[Message]
    pictures: tuple[ImageSource, ...] = ()


def examples(
    source: Path | None, count: int, *, sees: bool
) -> tuple[list[Example], list[Example]]:
    """What is learned on, and every fourth example held out to measure by.

    Args:
        source: a file of rows (JSONL, parquet or tar) or a folder of pictures; None for
            what is built in.
        count: how many there are at most.
        sees: whether the model takes pictures.

    Raises:
        PromptError: there are none to be had, or too few.
        DataError: a file or a row cannot be used.
    """
    if count < MIN_EXAMPLES:
        raise PromptError(
            f"{count} example(s) are too few to learn on and to measure by, at least "
            f"{MIN_EXAMPLES} are needed"
        )
    if source is None:
        found = _drawn(count) if sees else [Example(text) for text in TEXTS]
    else:
        found = _read(source, count) if source.is_file() else _pictures(source)
        if len(found) < MIN_EXAMPLES:
            raise PromptError(
                f"{source} has {len(found)} example(s) to calibrate on, at least "
                f"{MIN_EXAMPLES} are needed"
            )
    found = found[:count]
    held_out = found[3::4]
    return [x for i, x in enumerate(found) if i % 4 != 3], held_out


def _drawn(count: int) -> list[Example]:
    return [Example(_question(i), (draw_picture(i),)) for i in range(count)]


def _question(i: int) -> str:
    # Not in step with every fourth, which is held out.
    return QUESTIONS[(i + i // len(QUESTIONS)) % len(QUESTIONS)]


def _pictures(folder: Path) -> list[Example]:
    if not folder.is_dir():
        raise PromptError(
            f"calibration {str(folder)!r} does not exist; give a folder of pictures or a "
            "JSONL file"
        )
    # A Mac leaves "._a.png" beside "a.png" where its disk is another's.
    paths = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    return [Example(_question(i), (path,)) for i, path in enumerate(paths)]


def _read(path: Path, count: int) -> list[Example]:
    rows = Files(find_files(path))
    return [_example(rows[i]) for i in range(min(count, len(rows)))]


def _example(row: Record) -> Example:
    folder = PictureFolder(
        row.folder,
        way_out="put the file of prompts where all its pictures are below it",
    )
    with located(row.origin):
        if row.values.keys() <= {"prompt", "images"} and "prompt" in row.values:
            return _prompt(row.values, folder)
        example = read_example(row, folder)
        if example.kind == "document":
            raise DataError(
                "a document or caption asks nothing; give questions, or a folder of "
                "pictures"
            )
        asked = list(takewhile(lambda turn: turn[0] != "assistant", example.turns))
        parts = [part for _, turn in asked for part in turn]
        messages = [
            {"role": role, "content": [_message_part(part) for part in turn]}
            for role, turn in asked
        ]
        return Example(messages, example.images[: parts.count(None)])


def _prompt(values: Mapping[str, Any], folder: PictureFolder) -> Example:
    prompt, images = values["prompt"], values.get("images", [])
    if not isinstance(prompt, str) or not isinstance(images, list):
        raise DataError(
            "it is not an object with a prompt and images, such as "
            '{"prompt": "What is this?", "images": ["a.png"]}'
        )
    return Example(prompt, tuple(folder.find(image) for image in images))


def _message_part(part: Part) -> dict[str, Any]:
    if part is None:
        return {"type": "image"}
    if isinstance(part, str):
        return {"type": "text", "text": part}
    raise DataError("it asks of a region, by which nothing is measured; leave it out")
