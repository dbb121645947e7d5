"""A small copy of a picture in a terminal, by the best way that it has.

Kitty's and iTerm2's protocols where their names are in the environment, sixels where the
terminal says that it draws them, half blocks in colours else.

Source: https://sw.kovidgoyal.net/kitty/graphics-protocol/,
https://iterm2.com/documentation-images.html,
https://vt100.net/docs/vt3xx-gp/chapter14.html
"""

from __future__ import annotations

import base64
import io
import os
import re
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from .conversation import Shown
from .pictures import upright

# Cells of a preview at most; a cell is about twice as high as wide.
COLUMNS, ROWS = 32, 10
# Pixels of a cell, where they have to be guessed.
CELL = (10, 20)
# How long a terminal may take to say what it is, in seconds: a line to the other end of
# the world and back.
PATIENCE = 0.5
_KITTY_CHUNK = 4096

# An upright picture, columns and rows into what is printed, or written as it is.
Draw = Callable[[Any, int, int], Text | str]


class Preview:
    """Shows small copies of pictures.

    Args:
        console: the terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    @cached_property
    def _draw(self) -> Draw:
        # Asked late: what is typed meanwhile would be taken for the terminal's answer.
        return choose(os.environ, _says_sixel)

    def show(self, shown: Shown) -> None:
        """Draw the picture at most ``COLUMNS`` x ``ROWS`` cells large."""
        image = upright(shown.data, shown.name)
        columns, rows = fit(image.size, min(COLUMNS, self._console.width))
        drawn = self._draw(image, columns, rows)
        if isinstance(drawn, Text):
            self._console.print(drawn)
        else:
            self._console.file.write(drawn + "\n")
            self._console.file.flush()


def choose(environment: Mapping[str, str], says_sixel: Callable[[], bool]) -> Draw:
    """How a terminal draws pictures.

    Args:
        environment: the process's.
        says_sixel: asks the terminal whether it draws sixels.
    """
    terminal = environment.get("TERM", "")
    program = environment.get("TERM_PROGRAM", "")
    # A multiplexer keeps the variables of the terminal it was begun in, but not its ways.
    inner = "TMUX" in environment or terminal.startswith(("screen", "tmux"))
    if not inner:
        if "KITTY_WINDOW_ID" in environment or program == "ghostty":
            return kitty
        if program in ("iTerm.app", "WezTerm") or (
            environment.get("LC_TERMINAL") == "iTerm2"
        ):
            return iterm2
    if terminal in ("dumb", ""):
        return half_blocks
    return sixel if says_sixel() else half_blocks


def fit(size: tuple[int, int], columns: int) -> tuple[int, int]:
    """Columns and rows of cells that a picture of so many pixels is shown in."""
    width, height = size
    scale = min(columns * CELL[0] / width, ROWS * CELL[1] / height)
    return (
        max(1, round(width * scale / CELL[0])),
        max(1, round(height * scale / CELL[1])),
    )


def half_blocks(image: Any, columns: int, rows: int) -> Text:
    """Two pixels a cell: the upper one its letter's colour, the lower its ground's."""
    pixels = np.asarray(image.resize((columns, 2 * rows)))
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        line = Text()
        for top, bottom in zip(upper, lower, strict=True):
            ground = Color.from_rgb(*bottom)
            line.append("▀", Style(color=Color.from_rgb(*top), bgcolor=ground))
        lines.append(line)
    return Text("\n").join(lines)


def kitty(image: Any, columns: int, rows: int) -> str:
    """Kitty's graphics protocol: a PNG in pieces, over so many cells."""
    data = _png(image, columns, rows)
    pieces = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    # q=2: nothing is answered, which would be read as typed.
    keys = [f"a=T,f=100,q=2,c={columns},r={rows},", *[""] * (len(pieces) - 1)]
    return "".join(
        f"\x1b_G{key}m={int(number + 1 < len(pieces))};{piece}\x1b\\"
        for number, (key, piece) in enumerate(zip(keys, pieces, strict=True))
    )


def iterm2(image: Any, columns: int, rows: int) -> str:
    """ITerm2's inline pictures: a PNG over so many cells."""
    data = _png(image, columns, rows)
    return (
        f"\x1b]1337;File=inline=1;width={columns};height={rows};"
        f"preserveAspectRatio=1:{data}\x07"
    )


def sixel(image: Any, columns: int, rows: int) -> str:
    """Columns of six pixels, a colour after another."""
    size = (columns * CELL[0], rows * CELL[1] // 6 * 6 or 6)
    small = image.resize(size).quantize(64)
    palette = np.asarray(small.getpalette()).reshape(-1, 3)
    pixels = np.asarray(small)
    written = [f'\x1bPq"1;1;{size[0]};{size[1]}']
    for number in np.unique(pixels).tolist():
        red, green, blue = (palette[number] * 100 + 127) // 255
        written.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, size[1], 6):
        band = pixels[top : top + 6]
        written.append("$".join(_band(band)) + "-")
    return "".join(written) + "\x1b\\"


def _band(band: Any) -> Iterator[str]:
    """The sixels of six rows of pixels, a colour at a time."""
    bits = 1 << np.arange(6)[:, None]
    for number in np.unique(band).tolist():
        letters = (((band == number) * bits).sum(axis=0) + 63).tolist()
        line = "".join(map(chr, letters))
        runs = (match[0] for match in re.finditer(r"(.)\1*", line, re.DOTALL))
        packed = (f"!{len(r)}{r[0]}" if len(r) > 3 else r for r in runs)
        yield f"#{number}" + "".join(packed)


def _png(image: Any, columns: int, rows: int) -> str:
    small = image.copy()
    # Twice what the cells take, for screens of fine pixels.
    small.thumbnail((2 * columns * CELL[0], 2 * rows * CELL[1]))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _says_sixel() -> bool:
    """Whether the terminal says that it draws sixels, when asked what it is."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):
        return False
    try:
        tty.setcbreak(descriptor)
        sys.stdout.write("\x1b[c")
        sys.stdout.flush()
        said = _answer(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
    return draws_sixels(said)


def _answer(descriptor: int) -> bytes:
    """What a terminal answers to being asked, empty where it does not."""
    said, end = b"", time.monotonic() + PATIENCE
    while (left := end - time.monotonic()) > 0:
        if not select.select([descriptor], [], [], left)[0]:
            break
        said += os.read(descriptor, 64)
        if b"c" in said:
            break
    return said


def draws_sixels(said: bytes) -> bool:
    """Whether 4, sixels, is among a terminal's primary device attributes."""
    found = re.search(rb"\x1b\[\?([\d;]*)c", said)
    return found is not None and b"4" in found[1].split(b";")[1:]
