"""The text of an answer into what rich shows of it, while it is still written."""

from __future__ import annotations

from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment

# What looks like HTML is text: models write places as <box>, which must not vanish.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class Block:
    """What rich shows of Markdown, without blank lines around it.

    Line breaks stay, and links show where they lead.

    Args:
        text: the Markdown.
        cut: show its last lines alone, as many as the screen has room for.
    """

    def __init__(self, text: str, *, cut: bool = False) -> None:
        self._text = text
        self._cut = cut

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
        markdown.parsed = _parse(self._text)
        lines = [*map(_trimmed, console.render_lines(markdown, options, pad=False))]
        full = [i for i, line in enumerate(lines) if line]
        lines = lines[full[0] : full[-1] + 1] if full else []
        for line in lines[-max(1, console.height - 2) :] if self._cut else lines:
            yield from line
            yield Segment.line()


def _trimmed(line: list[Segment]) -> list[Segment]:
    """The line without the spaces at its end, which would be copied with it."""
    line = list(line)
    while line and not line[-1].text.strip():
        line.pop()
    if line:
        text, style, control = line[-1]
        line[-1] = Segment(text.rstrip(), style, control)
    return line


def _parse(text: str) -> list[Token]:
    tokens = _PARSER.parse(text)
    for token in tokens:
        for inner in token.children or ():
            if inner.type == "softbreak":
                inner.type = "hardbreak"
    return tokens


def closed_blocks(text: str) -> tuple[list[str], str]:
    """The blocks of a text that nothing behind it can change any more, and the rest.

    A block is closed when another has begun; what the last line will be is not known
    before it has ended.
    """
    lines = text.splitlines(keepends=True)
    whole = lines if text.endswith("\n") else lines[:-1]
    starts = [
        token.map[0]
        for token in _PARSER.parse("".join(whole))
        if token.level == 0 and token.nesting >= 0 and token.map
    ]
    if len(starts) < 2:
        return [], text
    blocks = ["".join(lines[start:stop]) for start, stop in pairwise(starts)]
    return blocks, "".join(lines[starts[-1] :])
