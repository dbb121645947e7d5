"""Where answers appear: as Markdown in a terminal, as they are in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.theme import Theme

from ..common import CONTROLS, note, print_answer
from .conversation import Shown
from .markdown import Block, closed_blocks
from .preview import Preview

# Rich's puts code on black, and links in a blue that is dark there.
_THEME = Theme(
    {
        "markdown.code": "cyan",
        "markdown.code_block": "cyan",
        "markdown.link": "default",
        "markdown.link_url": "underline",
    }
)
# How often an answer is drawn at most, a second.
REFRESH = 12


class Answering(Protocol):
    """An answer under way."""

    def add(self, text: str) -> None:
        """Show what came of it."""
        ...

    def reading(self, done: int, total: int) -> None:
        """Say how much of the prompt has been read; from any thread."""
        ...


class View(Protocol):
    """Shows answers and pictures."""

    @contextmanager
    def answer(self) -> Iterator[Answering]:
        """An answer, begun and ended."""
        ...

    def picture(self, shown: Shown) -> None:
        """Show a picture, if it can be."""
        ...

    def took(self, summary: str) -> None:
        """Say what an answer took."""
        ...


class PlainView:
    """Answers on stdout as they are, one after another."""

    @contextmanager
    def answer(self) -> Iterator[Answering]:
        """An answer and the end of its line."""
        yield _Plain()
        print()

    def picture(self, shown: Shown) -> None:
        """Pipes show no pictures."""

    def took(self, summary: str) -> None:
        """Said to people alone."""
        if sys.stderr.isatty():
            note(summary)


class _Plain:
    def add(self, text: str) -> None:
        print_answer(text)

    def reading(self, done: int, total: int) -> None:
        pass


class TerminalView:
    """Answers as Markdown; what is done scrolls up, and the end of it is drawn anew.

    Args:
        preview: whether pictures are shown.
    """

    def __init__(self, *, preview: bool, console: Console | None = None) -> None:
        self._console = console or Console(theme=_THEME, highlight=False)
        self._preview = Preview(self._console) if preview else None

    @contextmanager
    def answer(self) -> Iterator[Answering]:
        """An answer; left early, what came of it stays."""
        # Drawn by hand: a thread of rich's own would at times draw over what is printed.
        with Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            answering = _Streamed(live)
            try:
                yield answering
            finally:
                answering.end()

    def picture(self, shown: Shown) -> None:
        """Show a small copy of it."""
        if self._preview is not None:
            self._preview.show(shown)

    def took(self, summary: str) -> None:
        """What an answer took, behind it."""
        self._console.print(summary, style="dim")


class _Streamed:
    """An answer in a ``Live``: its closed blocks above, the last one within."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._spinner = Spinner("dots", "reading")
        self._left = ""
        self._printed = False
        self._drawn = 0.0
        self._draw(self._spinner)

    def reading(self, done: int, total: int) -> None:
        """Said while nothing is written yet, so that no other thread draws."""
        self._spinner.update(text=f"read {done:,} of {total:,} tokens")
        self._draw(self._spinner)

    def add(self, text: str) -> None:
        # An answer may repeat what steers a terminal out of a picture.
        self._left += text.translate(CONTROLS)
        if "\n" in text:
            blocks, self._left = closed_blocks(self._left)
            for block in blocks:
                self._print(block)
        if self._left:
            self._draw(Block(self._left, cut=True))

    def end(self) -> None:
        """Print what is left, in place of what is drawn."""
        self._live.update("", refresh=True)
        if self._left.strip():
            self._print(self._left)
        elif not self._printed:
            self._live.console.print()

    def _draw(self, renderable: RenderableType) -> None:
        now = time.monotonic()
        refresh = now - self._drawn > 1 / REFRESH
        self._live.update(renderable, refresh=refresh)
        if refresh:
            self._drawn = now

    def _print(self, block: str) -> None:
        if self._printed:
            self._live.console.print()
        self._live.console.print(Block(block), end="")
        self._printed = True
