"""The chat itself: lines become questions, pictures and commands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm1_mlx.captions.folder import SUFFIXES
from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.folders import user_path
from mm1_mlx.image import DEFAULT_LIMITS
from mm1_mlx.runtime import Runtime, forecast, stream

from ..common import counted, note
from ..generate import summary
from . import archive
from .clipboard import copy
from .conversation import Conversation
from .paths import split_paths, take_pictures
from .pictures import read_picture
from .reader import Reader
from .view import View


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash.

    Attributes:
        takes: what stands behind its name.
        does: what it does, in a few words.
        run: carries it out, given what stands behind its name.
    """

    takes: str
    does: str
    run: Callable[[Session, str], None]


class Session:
    """A conversation, who reads its lines and who shows its answers.

    Args:
        runtime: answers.
        settings: how, as ``stream`` takes it.
        system: the system message, or None.
        reader: reads.
        view: shows.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: dict[str, Any],
        system: str | None,
        reader: Reader,
        view: View,
    ) -> None:
        self.runtime = runtime
        self.settings = settings
        self.reader = reader
        self.view = view
        self.conversation = Conversation(system)
        self.ended = False

    def run(self) -> None:
        """Read lines until the end of the input or /quit."""
        while not self.ended:
            line = self.reader.read(len(self.conversation.waiting))
            if line is None:
                return
            try:
                self.take(line.strip())
            except KeyboardInterrupt:
                # Outside an answer: what was begun is left, the conversation stays.
                note("stopped")

    def take(self, line: str) -> None:
        """A line: pictures that were dropped, a command, or a question."""
        pictures, rest = take_pictures(line, SUFFIXES)
        if pictures and not line.startswith(tuple(f"{name} " for name in COMMANDS)):
            self.add_pictures(pictures)
            line = rest
        if line.startswith("/"):
            self.command(line)
        elif line:
            self.ask(line)

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash; what goes wrong is said."""
        name, _, rest = line.partition(" ")
        command = COMMANDS.get(ALIASES.get(name, name))
        if command is None:
            note(f"error: unknown command {name!r}; /help lists them")
            return
        try:
            command.run(self, rest.strip())
        except MM1Error as error:
            note(f"error: {error}")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            note(f"error: {where}{error.strerror or error}")

    def load(self, path: Path) -> None:
        """Go on with a chat that was saved.

        Raises:
            MM1Error: it is none, or a picture of it cannot be read.
        """
        self.conversation, changed = archive.load(path)
        for name in changed:
            note(f"{name} has changed since")
        note(f"{path}: {_contents(self.conversation)}")

    def add_pictures(self, paths: Iterable[Path]) -> None:
        """Have pictures wait for the next question; what is wrong with one is said."""
        for path in paths:
            try:
                self.add_picture(path)
            except MM1Error as error:
                note(f"error: {error}")

    def add_picture(self, path: Path) -> None:
        """Have a picture wait for the next question.

        Raises:
            MM1Error: it does not open, or there is no place for it.
        """
        if self.runtime.config.image is None:
            raise PromptError("this model takes text only")
        most = DEFAULT_LIMITS.max_pictures
        if len(self.conversation.pictures) == most:
            raise PromptError(
                f"a conversation holds {most} pictures; /clear starts a new one"
            )
        shown = read_picture(path)
        self.conversation.waiting.append(shown)
        note(f"picture {len(self.conversation.pictures)}: {shown}")
        self.view.picture(shown)

    def ask(self, question: str) -> None:
        """Stream the answer to a question; one that fails is forgotten."""
        try:
            self._stream(question)
        except MM1Error as error:
            note(f"error: {error}")
            if self.conversation.exchanges or self.conversation.waiting:
                note("/clear starts a new conversation")

    def _stream(self, question: str) -> None:
        """Show the answer as it comes, and keep it unless it was stopped before it began."""
        messages = self.conversation.messages(question)
        cancel = threading.Event()
        text, last = "", None
        with interrupts(cancel), self.view.answer() as answering:
            pieces = stream(
                self.runtime,
                messages,
                cancel=cancel,
                progress=answering.reading,
                **self.settings,
            )
            # Of the second Ctrl-C, which waits for nothing.
            with suppress(KeyboardInterrupt):
                for piece in pieces:
                    # Many tokenizers begin an answer with a space.
                    new = piece.text if text else piece.text.lstrip()
                    answering.add(new)
                    text, last = text + new, piece
            # Here, where Ctrl-C does no harm: it is often a moment late.
            if text or not cancel.is_set():
                self.conversation.keep(question, text)
        stats = last.stats if last else None
        if cancel.is_set() and not text:
            note("stopped before the answer began; the question is forgotten")
            return
        reason = last.finish_reason if last else None
        ended = {"stop": "", "length": "cut at --max-tokens; "}
        said = ended.get(reason or "", "stopped; ")
        self.view.took(said + (summary(stats) if stats else "not waited for"))


@contextmanager
def interrupts(cancel: threading.Event) -> Iterator[None]:
    """Ctrl-C sets the event, so that an answer ends as such; a second one raises."""

    def stop(*_: Any) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _image(session: Session, rest: str) -> None:
    if rest:
        session.add_pictures(split_paths(rest))
    else:
        note("error: /image needs the path of a picture")


def _images(session: Session, _: str) -> None:
    pictures = session.conversation.pictures
    before = len(pictures) - len(session.conversation.waiting)
    for number, shown in enumerate(pictures, start=1):
        note(f"{number}: {shown}{', waiting' if number > before else ''}")
    if not pictures:
        note("no pictures yet")


def _system(session: Session, rest: str) -> None:
    if rest:
        session.conversation.system = None if rest == "-" else rest
    note(f"system message: {session.conversation.system or 'none'}")


def _tokens(session: Session, _: str) -> None:
    # A question will stand there, so something does.
    messages = session.conversation.messages("?")
    expected = forecast(session.runtime, messages, **session.settings)
    assert session.runtime.config.decoder is not None
    most = session.runtime.config.decoder.max_position_embeddings
    pictures = counted(len(session.conversation.pictures), "picture")
    note(
        f"{expected.prompt_tokens:,} of {most:,} tokens, {expected.image_tokens:,} of "
        f"them for {pictures}; {expected.cached_tokens:,} are known and not read again"
    )


def _save(session: Session, rest: str) -> None:
    path = _file(rest, "/save")
    if path is None:
        return
    if _stays(session, path):
        note(f"error: {path} is there, and was left alone; give another name")
        return
    archive.save(path, session.conversation, session.runtime.path.name)
    note(f"{path}: {_contents(session.conversation)}")


def _stays(session: Session, path: Path) -> bool:
    """Whether a file of another kind is not to be written over."""
    if not path.exists() or archive.is_chat(path):
        return False
    return not session.reader.confirm(f"{path} is no chat; write over it?")


def _load(session: Session, rest: str) -> None:
    path = _file(rest, "/load")
    if path is None:
        return
    session.load(path)


def _contents(conversation: Conversation) -> str:
    pictures = sum(len(one.pictures) for one in conversation.exchanges)
    questions = counted(len(conversation.exchanges), "question")
    return f"{questions}, {counted(pictures, 'picture')}"


def _file(rest: str, name: str) -> Path | None:
    if not rest:
        note(f"error: {name} needs the path of a file")
        return None
    paths = split_paths(rest)
    # Not there yet, its spaces may be written in either way.
    return paths[0] if len(paths) == 1 else user_path(rest)


def _retry(session: Session, _: str) -> None:
    if not session.conversation.exchanges:
        note("error: nothing was asked yet")
        return
    conversation = session.conversation
    waiting, conversation.waiting = conversation.waiting, []
    last = conversation.take_back()
    before = len(conversation.exchanges)
    session.ask(last.question)
    conversation.waiting = waiting
    if len(conversation.exchanges) == before:
        # It failed or was stopped; the answer before stands.
        conversation.exchanges.append(last)


def _undo(session: Session, _: str) -> None:
    conversation = session.conversation
    if conversation.exchanges:
        last = conversation.take_back()
        count = len(conversation.waiting)
        wait = f"; {counted(count, 'picture')} waiting" if count else ""
        note(f"forgotten: {last.question[:60]!r}{wait}")
    else:
        note("error: nothing was asked yet")


def _copy(session: Session, _: str) -> None:
    if not session.conversation.exchanges:
        note("error: nothing was answered yet")
    elif copy(session.conversation.exchanges[-1].answer):
        note("copied")
    else:
        note("error: no clipboard was found (pbcopy, wl-copy, xclip)")


def _clear(session: Session, _: str) -> None:
    session.conversation.clear()
    note("forgotten")


def _help(_session: Session, _: str) -> None:
    rows = [(f"{name} {c.takes}".strip(), c.does) for name, c in COMMANDS.items()]
    width = max(len(name) for name, _ in rows)
    note("\n".join(f"{name:{width}}  {does}" for name, does in rows))
    note(
        "Pictures can be dropped into a line. Alt-Enter begins a new line, Tab completes, "
        "Ctrl-C stops an answer, Ctrl-D leaves."
    )


def _quit(session: Session, _: str) -> None:
    session.ended = True


COMMANDS = {
    "/image": Command("PATH ...", "put pictures before the next question", _image),
    "/images": Command("", "list the pictures", _images),
    "/system": Command("[TEXT]", "show or set the system message; - for none", _system),
    "/tokens": Command("", "how full the context is", _tokens),
    "/retry": Command("", "ask the last question again", _retry),
    "/undo": Command("", "take the last question and its answer back", _undo),
    "/copy": Command("", "put the last answer into the clipboard", _copy),
    "/save": Command("FILE", "write the conversation as JSON", _save),
    "/load": Command("FILE", "go on with a saved conversation", _load),
    "/clear": Command("", "forget the conversation", _clear),
    "/help": Command("", "show this", _help),
    "/quit": Command("", "leave", _quit),
}
ALIASES = {"/exit": "/quit", "/q": "/quit", "/?": "/help"}
