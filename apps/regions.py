"""Regions named on the command line as parts of a message; boxes of an answer drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import note

Boxes = Annotated[
    list[str] | None,
    typer.Option(
        "--box",
        help="a place in the last picture that the prompt calls <region>: X1,Y1,X2,Y2 in "
        "its pixels; N:X1,Y1,X2,Y2 for picture N, counted from 1; several times",
        show_default=False,
    ),
]
Points = Annotated[
    list[str] | None,
    typer.Option("--point", help="likewise: X,Y or N:X,Y", show_default=False),
]
Masks = Annotated[
    list[str] | None,
    typer.Option(
        "--mask",
        help="likewise: a black picture of its size, white in the region",
        show_default=False,
    ),
]
Draw = Annotated[
    Path | None,
    typer.Option(
        help="write the picture with the boxes of the answer on it: OUT.png",
        show_default=False,
    ),
]
# What a prompt says where a region goes; without it they go behind the prompt's text.
PLACE = "<region>"
_NUMBERED = re.compile(r"(?:(\d{1,4}):)?(.*)", re.DOTALL)
_FORMS = {"box": "X1,Y1,X2,Y2", "point": "X,Y"}


def read_regions(
    boxes: list[str] | None, points: list[str] | None, masks: list[str] | None
) -> list[dict[str, Any]]:
    """A part of a message for each, boxes before points before masks."""
    given = (("box", boxes), ("point", points), ("mask", masks))
    return [_read(kind, text) for kind, texts in given for text in texts or []]


def _read(kind: str, text: str) -> dict[str, Any]:
    match = _NUMBERED.fullmatch(text)
    assert match is not None
    number, rest = match.groups()
    part: dict[str, Any] = {"type": "region"}
    if number is not None:
        if int(number) == 0:
            raise typer.BadParameter(f"--{kind} {text!r}: pictures are counted from 1")
        part["picture"] = int(number) - 1
    if kind == "mask":
        from mm1_mlx.folders import user_path

        return part | {"mask": str(user_path(rest)) if rest.startswith("~") else rest}
    return part | {kind: _numbers(kind, text, rest)}


def _numbers(kind: str, text: str, rest: str) -> list[float]:
    form = _FORMS[kind]
    try:
        numbers = [float(x) for x in rest.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != form.count(",") + 1:
        raise typer.BadParameter(f"--{kind} {text!r} is not {form} or N:{form}")
    return [int(x) if x.is_integer() else x for x in numbers]


def place_regions(prompt: str, regions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompt's text with the regions in their places, as parts of a message."""
    if not regions:
        return [{"type": "text", "text": prompt}]
    texts = prompt.split(PLACE)
    if len(texts) == 1:
        # Behind the text, and apart from it.
        texts = [f"{prompt} ", *[" "] * (len(regions) - 1), ""]
    if len(texts) != len(regions) + 1:
        raise typer.BadParameter(
            f"the prompt says {PLACE} {len(texts) - 1} times, but {len(regions)} regions "
            "were given; say it once for each, or not at all"
        )
    parts: list[dict[str, Any]] = []
    for text, region in zip(texts, [*regions, None], strict=True):
        parts += [{"type": "text", "text": text}] if text else []
        parts += [region] if region else []
    return parts


def find_boxes(text: str, image: str | bytes, config: Any) -> tuple[Any, list[Any]]:
    """The upright picture, and the boxes in it that an answer names."""
    from mm1_mlx.grounding import load_upright, parse_boxes

    picture = load_upright(image)
    return picture, parse_boxes(text, picture.size, config.prompt.coordinate_range)


def draw_answer(text: str, image: str | bytes, config: Any, out: Path) -> None:
    """Write the picture with the answer's boxes, and say how many on stderr."""
    from mm1_mlx.grounding import draw_boxes, save_drawing

    picture, boxes = find_boxes(text, image, config)
    save_drawing(draw_boxes(picture, boxes), out)
    note(f"{out}: {len(boxes)} boxes")
