"""A dozen drawn pictures with questions, as files of every kind of task."""

import json

import pytest

from mm1_mlx.quantize.shapes import COLOURS, case, things_of

COUNT = 12


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder: pictures, and JSONL files by the kind of question."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = {name: [] for name in ("ask", "caption", "letter", "yes-no", "box", "rank")}
    for seed in range(COUNT):
        shown, things = case(seed), things_of(seed)
        name = f"{seed}.png"
        shown.picture.save(folder / name)
        picture = {"image": name}
        rows["ask"].append(
            picture | {"question": shown.question, "answer": shown.answer,
                       "category": "even" if seed % 2 == 0 else "odd"}
        )  # fmt: skip
        parts = [f"a {thing.colour} {thing.shape}" for thing in things]
        rows["caption"].append(
            picture | {"captions": [" and ".join(parts), ", ".join(reversed(parts))]}
        )
        first = things[0]
        others = [colour for colour in COLOURS if colour != first.colour][:3]
        choices = sorted([first.colour, *others])
        asked = f"What colour is the {first.shape}?"
        chosen = picture | {"question": asked, "choices": choices}
        rows["letter"].append(chosen | {"answer": choices.index(first.colour)})
        rows["rank"].append(chosen | {"answer": first.colour})
        rows["yes-no"].append(
            picture | {"question": f"Is there a {COLOURS[seed % 8]} {first.shape}?",
                       "answer": "yes" if COLOURS[seed % 8] == first.colour else "no"}
        )  # fmt: skip
        x, y, r = (96 * v for v in (first.x, first.y, first.radius))
        rows["box"].append(
            picture | {"question": f"the {first.colour} {first.shape}",
                       "box": [x - r, y - r, x + r, y + r]}
        )  # fmt: skip
    for name, held in rows.items():
        write(folder / f"{name}.jsonl", held)
    texts = {
        "arc-easy": {"question": "What is red?", "choices": {"text": ["a star", "two"],
                     "label": ["1", "2"]}, "answer": "1"},
        "winogrande": {"question": "The _ is red.", "choices": ["star", "how"], "answer": 0},
        "lambada": {"text": "The star is red"},
        "triviaqa": {"question": "What is red", "answers": ["star", "the star"]},
    }  # fmt: skip
    for name, row in texts.items():
        write(folder / f"{name}.jsonl", [row] * 2)
    solved = [
        {"image": f"{i}.png", "question": "How many shapes are there?",
         "answer": str(len(things_of(i)))}
        for i in range(COUNT)
    ]  # fmt: skip
    write(folder / "train.jsonl", solved)
    return folder
