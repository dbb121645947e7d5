"""Prompts with pictures that a packed model is learned on and measured by.

A file names them, one JSON object a line, pictures by their paths from the file's folder:

    {"prompt": "What is this?", "images": ["a.png", "b.png"]}

A folder gives its pictures, each with one of our questions. Without either the pictures
are drawn. Answers are not needed: what matters is what the unpacked model would say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.errors import PromptError
from mm1_mlx.image import ImageSource
from mm1_mlx.quantize.pictures import draw_picture

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
    """A question, and the pictures it is about."""

    prompt: str
    pictures: tuple[ImageSource, ...] = ()


def examples(
    source: Path | None, count: int, *, sees: bool
) -> tuple[list[Example], list[Example]]:
    """What is learned on, and every fourth example held out to measure by.

    Args:
        source: a JSONL file or a folder of pictures; None for what is built in.
        count: how many there are at most.
        sees: whether the model takes pictures.

    Raises:
        PromptError: there are none to be had, or too few.
    """
    if count < MIN_EXAMPLES:
        raise PromptError(
            f"{count} example(s) are too few to learn on and to measure by, at least "
            f"{MIN_EXAMPLES} are needed"
        )
    if source is None:
        found = _drawn(count) if sees else [Example(text) for text in TEXTS]
    else:
        found = _read(source) if source.is_file() else _pictures(source)
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


def _read(path: Path) -> list[Example]:
    try:
        # By line feeds alone: JSON may hold other separators as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise PromptError(f"{path} is no text; give JSON lines") from None
    return [
        _example(path, number, line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _example(path: Path, number: int, line: str) -> Example:
    try:
        values: Any = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    fields = set(values) if isinstance(values, dict) else set()
    images = values.get("images", []) if fields else []
    if (
        not fields
        or fields - {"prompt", "images"}
        or not isinstance(values.get("prompt"), str)
        or not isinstance(images, list)
        or not all(isinstance(name, str) for name in images)
    ):
        raise PromptError(
            f"{path}, line {number}: {line.strip()[:60]!r} is not an object with a "
            'prompt and images, such as {"prompt": "What is this?", "images": ["a.png"]}'
        )
    return Example(values["prompt"], tuple(path.parent / name for name in images))
