"""Where questions come from: lines typed at a terminal, or those of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mm1_mlx.folders import user_path

from ..common import counted

# Escaped in a completed path, as a shell does it.
_SPECIAL = " \t'\"\\()[]{}&;|<>*?$!#~`"
# What is completed behind these: a folder's files of all kinds, or pictures and chats.
TAKES_PATHS = ("/image", "/save", "/load")


class Reader(Protocol):
    """Reads what is asked."""

    def read(self, waiting: int) -> str | None:
        """What was typed next, None at the end.

        Args:
            waiting: how many pictures wait for a question.
        """
        ...

    def confirm(self, question: str) -> bool:
        """Whether somebody says yes to it."""
        ...


class PlainReader:
    """The lines of stdin; nobody is there to be asked."""

    def read(self, waiting: int) -> str | None:  # noqa: ARG002
        """The next line."""
        return sys.stdin.readline() or None

    def confirm(self, question: str) -> bool:  # noqa: ARG002
        """No."""
        return False


class TerminalReader:
    """Lines with history, completion and several lines at once.

    Args:
        remember: whether what is typed is kept for the next chat.
        commands: names and what they do, for completion.
    """

    def __init__(
        self, remember: bool, commands: Iterable[tuple[str, str]] = ()
    ) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=open_history() if remember else InMemoryHistory(),
            completer=ChatCompleter(commands),
            complete_while_typing=False,
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation="  ",
        )

    def read(self, waiting: int) -> str | None:
        """What was typed; Ctrl-C drops it, Ctrl-D ends."""
        count = f"{counted(waiting, 'picture')} " if waiting else ""
        try:
            return self._session.prompt([("ansicyan", count), ("bold", "> ")])
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None

    def confirm(self, question: str) -> bool:
        """Whether y or yes was typed."""
        try:
            said = PromptSession[str]().prompt(f"{question} [y/N] ")
        except (KeyboardInterrupt, EOFError):
            return False
        return said.strip().lower() in ("y", "yes")


def open_history() -> History:
    """What was typed in earlier chats, read by its owner alone."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    path = Path(base) / "mm1/chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


class ChatCompleter(Completer):
    """Names of commands, and paths.

    Args:
        commands: names and what they do.
    """

    def __init__(self, commands: Iterable[tuple[str, str]]) -> None:
        self._commands = list(commands)

    def get_completions(
        self,
        document: Document,
        complete_event: CompleteEvent,  # noqa: ARG002
    ) -> Iterator[Completion]:
        """What the text before the cursor may become."""
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not space and text.startswith("/") and "/" not in text[1:]:
            for command, does in self._commands:
                if command.startswith(text):
                    yield Completion(command, -len(text), display_meta=does)
            return
        word = last_word(rest if space else text)
        if (space and name in TAKES_PATHS) or word.startswith(("/", "~")):
            yield from _paths(word)


def last_word(text: str) -> str:
    """The last word, whose spaces are escaped."""
    start = 0
    for i, letter in enumerate(text):
        if letter == " " and (i == 0 or text[i - 1] != "\\"):
            start = i + 1
    return text[start:]


def _paths(word: str) -> Iterator[Completion]:
    """What is in the folder of a path that is half typed."""
    plain = _unescaped(word)
    folder, _, begun = plain.rpartition("/")
    where = user_path(f"{folder}/" if "/" in plain else ".")
    try:
        found = sorted(os.scandir(where), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in found:
        hidden = entry.name.startswith(".") and not begun.startswith(".")
        if not entry.name.startswith(begun) or hidden:
            continue
        end = "/" if entry.is_dir() else ""
        # The part that is typed stays as it is: "~" is not escaped.
        new = escaped(entry.name) + end
        yield Completion(new, -len(_last_part(word)), display=entry.name + end)


def _last_part(word: str) -> str:
    return word.rpartition("/")[2]


def _unescaped(word: str) -> str:
    letters = iter(word)
    return "".join(next(letters, "") if x == "\\" else x for x in letters)


def escaped(name: str) -> str:
    """A name as a shell would take it."""
    return "".join(f"\\{x}" if x in _SPECIAL else x for x in name)


def _bindings() -> KeyBindings:
    """Enter sends; Alt-Enter and Ctrl-J go to the next line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def next_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    _: Any = (send, next_line)
    return bindings
