"""Real answers of the embedded model, with pictures: ``python -m benchmarks.shapes.gallery``.

Of every kind the first held-out case that is answered right, and the first that is not,
are shown; nothing else is chosen. New words are for pairs that training shows: those for
held-out ones are told by little more than chance. Writes gallery/*.png and the tables between
the marks in README.md here, and of some kinds in the project's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mm1_mlx.blas import preload_blas

preload_blas()

from PIL import Image  # noqa: E402

from benchmarks.shapes.cases import Case, part_cases  # noqa: E402
from benchmarks.shapes.evaluate import BATCH, answerer  # noqa: E402
from benchmarks.shapes.scene import Split  # noqa: E402
from benchmarks.shapes.tables import PROJECT, README, filled  # noqa: E402
from mm1_mlx.grounding import draw_boxes, parse_boxes  # noqa: E402

FOLDER = Path(__file__).with_name("gallery")
MARK = "gallery"
WORDS = "words"
# What is shown: a part of the evaluation, a kind in it, and what the row is called.
KINDS = (
    ("scenes", "caption", "a caption"),
    ("scenes", "count", "counting"),
    ("pairs", "two pictures", "two pictures"),
    ("scenes", "box", "a box, drawn where the answer says"),
    (WORDS, "new word, 8 shots", "a new word from eight examples"),
    ("reading", "read", "a word or number"),
    ("small", "read small, with parts", "small writing"),
    ("style", "in a word", "one word, as asked"),
    ("talks", "follow-up", "a question behind others"),
    ("talks", "after other pictures", "a picture behind others"),
)
# Beside the answer with parts, that to the same picture without.
SMALL, WHOLE = "read small, with parts", "read small, one picture"
# Kinds that the project's README shows.
BRIEF = ("caption", "two pictures", "box", "new word, 8 shots", SMALL)
# Cases of a part that are looked at.
LOOKED_AT = 200
SIDE, SHOT_SIDE, GAP = 192, 96, 6

# A kind, a file's name, and a title, what was asked and what was answered.
Rows = list[tuple[str, str, tuple[str, str, str]]]


@dataclass(frozen=True)
class Answered:
    """A case and what was said."""

    case: Case
    answer: str

    @property
    def right(self) -> bool:
        """Whether it is right."""
        return self.case.is_right(self.answer)


def answered(model: str | None, number: int) -> dict[str, list[Answered]]:
    """What was said to the first cases of every part, by their kinds."""
    found: dict[str, list[Answered]] = {}
    with ExitStack() as stack:
        answer = answerer(model, stack)
        for part in dict.fromkeys(part for part, _, _ in KINDS):
            split: Split = "validation" if part == WORDS else "held_out"
            cases = iter(part_cases(part, number, split))
            while some := list(islice(cases, BATCH)):
                for case, text in zip(some, answer(some), strict=True):
                    found.setdefault(case.kind, []).append(Answered(case, text))
    return found


def picture(shown: Answered) -> Image.Image:
    """The case's pictures beside one another, examples above; with boxes, if any."""
    case = shown.case
    earlier = [image for pictures, _, _ in case.before for image in pictures]
    tiles = [_scaled(image, SIDE) for image in (*earlier, *case.pictures)]
    if case.judge == "box":
        boxes = parse_boxes(shown.answer, tiles[0].size)
        tiles[0] = draw_boxes(tiles[0], boxes)
    row = _beside(tiles)
    if not case.shots:
        return row
    examples = _beside([_scaled(image, SHOT_SIDE) for image, _ in case.shots])
    whole = Image.new(
        "RGB",
        (max(row.width, examples.width), row.height + examples.height + GAP),
        "white",
    )
    whole.paste(examples, (0, 0))
    whole.paste(row, (0, examples.height + GAP))
    return whole


def _scaled(image: Image.Image, side: int) -> Image.Image:
    factor = side / max(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS)


def _beside(tiles: Sequence[Image.Image]) -> Image.Image:
    width = sum(tile.width for tile in tiles) + GAP * (len(tiles) - 1)
    row = Image.new("RGB", (width, max(tile.height for tile in tiles)), "white")
    x = 0
    for tile in tiles:
        row.paste(tile, (x, 0))
        x += tile.width + GAP
    return row


def choose(found: dict[str, list[Answered]]) -> Iterator[tuple[str, str, Answered]]:
    """A file name, a title and a case of each row: the first right one, the first wrong."""
    for _, kind, title in KINDS:
        for right in (True, False):
            case = next((a for a in found[kind] if a.right == right), None)
            if case is not None:
                name = kind.replace(",", "").replace(" ", "-")
                yield f"{name}-{'right' if right else 'wrong'}.png", title, case


def write(found: dict[str, list[Answered]]) -> Rows:
    """Write the pictures; a row for each, and the kind that it is of."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.png"):
        old.unlink()
    rows = []
    for name, title, shown in choose(found):
        picture(shown).save(FOLDER / name, optimize=True)
        case = shown.case
        told = ", ".join(word for _, word in case.shots)
        asked = f"({told}) {case.question}" if told else case.question
        talked = "".join(f"{q} {a}<br>" for _, q, a in case.before)
        said = f"**{shown.answer}**"
        if not shown.right:
            said = f"{shown.answer} (wrong: {case.expected})"
        if case.kind == SMALL:
            whole = found[WHOLE][found[SMALL].index(shown)]
            said = f"as one picture: {whole.answer}<br>with four parts: {said}"
        rows.append((case.kind, name, (title, talked + asked, said)))
    return rows


def table(rows: Rows, folder: str) -> str:
    """The rows as Markdown, their pictures in a folder."""
    lines = ["| | | asked | answered |", "|---|---|---|---|"]
    for _, name, (title, asked, said) in rows:
        lines.append(f"| {title} | ![]({folder}/{name}) | {asked} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="model folder (default: mm1-tiny)")
    parser.add_argument("-n", type=int, default=LOOKED_AT, help="cases looked at")
    arguments = parser.parse_args()
    rows = write(answered(arguments.model, arguments.n))
    brief = [row for row in rows if row[0] in BRIEF]
    for path, some in ((README, rows), (PROJECT, brief)):
        folder = FOLDER.relative_to(path.parent).as_posix()
        path.write_text(filled(path.read_text(), MARK, table(some, folder)))


if __name__ == "__main__":
    main()
