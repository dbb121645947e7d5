"""What a terminal shows: Markdown as it is written, and small pictures."""

import base64
import io
import random
import re
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mm1_mlx.apps.chat import preview
from mm1_mlx.apps.chat.markdown import Block, closed_blocks
from mm1_mlx.apps.chat.pictures import read_picture
from mm1_mlx.apps.chat.view import PlainView, TerminalView
from mm1_mlx.runtime import TINY

TEXT = """\
# A title

Two lines of
one paragraph, with `code` and a [link](https://example.org).

| a | b |
|---|---|
| 1 | 2 |

1. one

   more of one
2. two
   - inner

```python
print("a")

# not a title
```
> said
> twice

Underlined
===

last <box>(1,2)</box>"""


def shown(text, width=60):
    out = io.StringIO()
    Console(file=out, width=width).print(Block(text), end="")
    return out.getvalue()


def test_blocks_are_closed_one_by_one_and_nothing_is_lost():
    blocks, left = [], ""
    for letter in TEXT:
        left += letter
        if letter == "\n":
            new, left = closed_blocks(left)
            blocks += new
    assert "".join(blocks) + left == TEXT
    whole, rest = closed_blocks(TEXT)
    assert [*whole, rest] == [*blocks, left]
    assert len(whole) == 6


def test_what_the_last_line_will_be_is_not_known_yet():
    assert closed_blocks("1. one\n\n2") == ([], "1. one\n\n2")
    assert closed_blocks("a\n\nb\n") == (["a\n\n"], "b\n")
    assert closed_blocks("```\na\n\nb\n") == ([], "```\na\n\nb\n")
    assert closed_blocks("") == ([], "")


def test_line_breaks_links_and_tags_are_seen():
    text = shown("a\nb [here](https://example.org) <box>(1,2)</box> <b>\n\n<p>\n")
    assert text.splitlines() == [
        "a",
        "b here (https://example.org) <box>(1,2)</box> <b>",
        "",
        "<p>",
    ]
    assert "\x1b]8" not in text


def test_no_blank_lines_stand_around_a_block():
    for block in ("| a |\n|---|\n| 1 |\n", "```\na\n```\n", "# a\n", "- a\n\n"):
        lines = shown(block).splitlines()
        assert lines[0].strip()
        assert lines[-1].strip()
    assert shown(" \n\n") == ""


class Screen:
    """A terminal of some lines: what scrolled out of it, and what stands there."""

    def __init__(self, height):
        self.lines, self.row, self.height = [""], 0, height

    def feed(self, said):
        for match in re.finditer(r"\x1b\[([\d;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+", said):
            text, number = match[0], match[1] or ""
            if text == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            elif match[2] == "A":
                self.row -= int(number or 1)
                # What has scrolled out cannot be reached.
                assert self.row >= len(self.lines) - self.height
            elif match[2] == "K":
                self.lines[self.row] = ""
            elif match[2] is None and text != "\r":
                self.lines[self.row] += text


@pytest.mark.parametrize("seed", range(3))
def test_a_long_answer_leaves_all_of_it_in_the_scrollback(seed):
    long = "\n".join(f"- item {i}" for i in range(80))
    text = f"{TEXT}\n\n{long}\n\nThe end."
    out = io.StringIO()
    console = Console(
        file=out, width=60, height=20, force_terminal=True, color_system=None
    )
    view, stream = TerminalView(preview=False, console=console), random.Random(seed)
    screen = Screen(20)
    with view.answer() as answering:
        answering.reading(3, 10)
        left = text
        while left:
            count = stream.randint(1, 40)
            answering.add(left[:count])
            left = left[count:]
            answering._live.refresh()
    screen.feed(out.getvalue())
    blocks, rest = closed_blocks(text)
    expected = "\n".join(shown(block) for block in [*blocks, rest])
    assert [line.rstrip() for line in screen.lines[: screen.row]] == [
        line.rstrip() for line in expected.splitlines()
    ]


def test_an_answer_cannot_steer_the_terminal():
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, color_system=None)
    with TerminalView(preview=False, console=console).answer() as answering:
        answering.add("a\x1b]0;title\x07\x1b[31mred\x9b2J\x08 b\n\nnext \x1b[2J")
    said = out.getvalue()
    assert "\x1b]0" not in said
    assert "\x1b[31m" not in said
    assert "\x1b[2J" not in said
    assert "]0;title[31mred2J b" in said


def test_a_pipe_gets_the_answer_as_it_is(capfd):
    with PlainView().answer() as answering:
        answering.reading(1, 2)
        answering.add("**a**")
        answering.add(" b")
    assert capfd.readouterr() == ("**a** b\n", "")


STAR = Image.open(TINY / "red-star.png").convert("RGB")


def test_half_blocks_show_two_pixels_a_cell():
    pixels = np.zeros((4, 3, 3), np.uint8)
    pixels[0, 1] = (255, 0, 0)
    pixels[1, 1] = (0, 0, 255)
    text = preview.half_blocks(Image.fromarray(pixels), 3, 2)
    assert text.plain == "▀▀▀\n▀▀▀"
    style = next(span.style for span in text.spans if span.start == 1)
    assert style.color.triplet == (255, 0, 0)
    assert style.bgcolor.triplet == (0, 0, 255)


def test_kittys_pieces_are_a_png():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    said = preview.kitty(Image.fromarray(noise), 20, 7)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", said)
    assert "".join(f"\x1b_G{key};{piece}\x1b\\" for key, piece in pieces) == said
    assert len(pieces) > 2
    assert pieces[0][0] == "a=T,f=100,q=2,c=20,r=7,m=1"
    assert [key for key, _ in pieces[1:]] == ["m=1"] * (len(pieces) - 2) + ["m=0"]
    assert all(len(piece) <= 4096 for _, piece in pieces)
    data = base64.b64decode("".join(piece for _, piece in pieces))
    assert Image.open(io.BytesIO(data)).size == (300, 200)


def test_iterm2_gets_a_png():
    said = preview.iterm2(STAR, 8, 4)
    match = re.fullmatch(r"\x1b\]1337;File=(.*):(.*)\x07", said)
    assert "inline=1" in match[1].split(";")
    assert Image.open(io.BytesIO(base64.b64decode(match[2]))).format == "PNG"


def drawn(said):
    """The picture that sixels draw, by their definition."""
    body = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', said, re.DOTALL)
    width, height = int(body[1]), int(body[2])
    picture = np.full((height, width, 3), -1)
    palette, colour, x, top = {}, None, 0, 0
    for token in re.finditer(
        r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)(.)|(.)", body[3], re.DOTALL
    ):
        if token[1]:
            colour = int(token[1])
            if token[2]:
                palette[colour] = [int(token[i]) * 255 / 100 for i in (2, 3, 4)]
        elif token[0] == "$":
            x = 0
        elif token[0] == "-":
            x, top = 0, top + 6
        else:
            letter, count = (token[6], int(token[5])) if token[5] else (token[7], 1)
            for bit in range(6):
                if ord(letter) - 63 >> bit & 1:
                    picture[top + bit, x : x + count] = palette[colour]
            x += count
    return picture


def test_sixels_draw_the_picture():
    picture = drawn(preview.sixel(STAR, 12, 6))
    assert picture.shape == (120, 120, 3)
    assert picture.min() >= 0  # Every pixel was drawn.
    expected = np.asarray(STAR.resize((120, 120))).astype(int)
    assert np.abs(picture - expected).mean() < 8


@pytest.mark.parametrize(
    ("environment", "sixel", "way"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, False, preview.kitty),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, False, preview.kitty),
        ({"TERM": "xterm", "TERM_PROGRAM": "iTerm.app"}, True, preview.iterm2),
        ({"TERM": "xterm", "LC_TERMINAL": "iTerm2"}, False, preview.iterm2),
        ({"TERM": "xterm"}, True, preview.sixel),
        ({"TERM": "xterm"}, False, preview.half_blocks),
        ({"TERM": "dumb"}, True, preview.half_blocks),
        # Begun in kitty, but tmux draws.
        (
            {"TERM": "tmux-256color", "TMUX": "a", "KITTY_WINDOW_ID": "1"},
            False,
            preview.half_blocks,
        ),
        ({"TERM": "screen", "LC_TERMINAL": "iTerm2"}, True, preview.sixel),
    ],
)
def test_a_terminals_own_way_is_taken(environment, sixel, way):
    assert preview.choose(environment, lambda: sixel) is way


def test_what_a_terminal_says_of_itself_is_understood():
    assert preview.draws_sixels(b"\x1b[?62;4;22c")
    assert not preview.draws_sixels(b"\x1b[?4;22c")  # The first is its class.
    assert not preview.draws_sixels(b"\x1b[?62;44c")
    assert not preview.draws_sixels(b"")


def test_who_is_no_terminal_is_not_asked(monkeypatch, tmp_path):
    with (tmp_path / "empty").open("w+") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert preview._says_sixel() is False


@pytest.mark.parametrize("size", [(1, 16_000), (16_000, 1), (1, 1), (640, 480)])
def test_a_preview_of_any_shape_fits(size):
    columns, rows = preview.fit(size, 32)
    assert 1 <= columns <= 32
    assert 1 <= rows <= preview.ROWS


def test_the_preview_is_of_the_upright_picture(tmp_path, monkeypatch):
    wide = Image.new("RGB", (80, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "turned.jpg", exif=exif)
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, color_system=None)
    TerminalView(preview=True, console=console).picture(
        read_picture(tmp_path / "turned.jpg")
    )
    lines = out.getvalue().splitlines()
    assert len(lines) == preview.ROWS
    assert {len(line) for line in lines} == {preview.ROWS}  # 40 x 80 pixels
