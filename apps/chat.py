"""``mm1 chat``: a conversation about pictures."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from typing import Any

from .common import (
    AdapterNames,
    MaxTokens,
    Model,
    Resolution,
    Seed,
    System,
    Temperature,
    TopP,
    Yes,
    note,
    open_runtime,
    print_answer,
)
from .generate import summary
from .speed import (
    DraftModel,
    KVBits,
    KVStart,
    NumDraftTokens,
    PrefixName,
    PromptLookup,
    speed_settings,
)

HELP = """\
/image PATH [PATH ...]  put pictures before the next question
/clear                  forget the conversation
/help                   show this
/exit                   leave (Ctrl-D too)
Ctrl-C stops an answer."""


def chat(
    model: Model = None,
    adapter: AdapterNames = None,
    resolution: Resolution = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    prefix: PrefixName = None,
    kv_bits: KVBits = None,
    kv_start: KVStart = None,
    prompt_lookup: PromptLookup = False,
    draft_model: DraftModel = None,
    num_draft_tokens: NumDraftTokens = None,
    yes: Yes = False,
) -> None:
    """Talk with a model about pictures."""
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    with ExitStack() as stack:
        settings |= speed_settings(
            stack,
            prefix=prefix,
            kv_bits=kv_bits,
            kv_start=kv_start,
            prompt_lookup=prompt_lookup,
            draft_model=draft_model,
            num_draft_tokens=num_draft_tokens,
            yes=yes,
        )
        runtime = stack.enter_context(open_runtime(model, yes, resolution, adapter))
        note(f"{runtime.path.name}: /image PATH shows a picture, /help lists commands")
        Conversation(runtime, system, settings).run()


class Conversation:
    """The turns so far, and the pictures that wait for the next question."""

    def __init__(
        self, runtime: Any, system: str | None, settings: dict[str, Any]
    ) -> None:
        self.runtime = runtime
        self.system = system
        self.settings = settings
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, Any]] = []
        # Encoded, so that a file may go away while it is talked about.
        self.pictures: list[bytes] = []
        self.num_pictures = 0
        if self.system:
            self.messages.append({"role": "system", "content": self.system})

    def run(self) -> None:
        """Read lines until the end of the input or /exit."""
        while (line := _read_line()) is not None:
            line = line.strip()
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.ask(line)

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash."""
        name, _, rest = line.partition(" ")
        if name == "/image":
            self.add_pictures(rest)
        elif name == "/clear":
            self.clear()
            note("forgotten")
        elif name == "/help":
            note(HELP)
        else:
            note(f"unknown command {name!r}; /help lists them")

    def add_pictures(self, rest: str) -> None:
        """Queue the named pictures, each of which must open."""
        import shlex

        from mm1_mlx.errors import PromptError
        from mm1_mlx.folders import user_path
        from mm1_mlx.image import DEFAULT_LIMITS, load_picture

        try:
            paths = [user_path(path) for path in shlex.split(rest)]
        except ValueError:
            note("error: a quote is not closed")
            return
        if not paths:
            note("error: /image needs the path of a picture")
            return
        if self.runtime.config.image is None:
            note("error: this model takes text only")
            return
        most = DEFAULT_LIMITS.max_pictures
        for path in paths:
            if self.num_pictures == most:
                note(
                    f"error: a conversation holds {most} pictures; /clear starts a new one"
                )
                return
            try:
                width, height = load_picture(path, self.runtime.config.image).size
            except PromptError as error:
                note(f"error: {error}")
            else:
                self.pictures.append(path.read_bytes())
                self.num_pictures += 1
                note(f"picture {self.num_pictures}: {path} ({width} x {height})")

    def ask(self, question: str) -> None:
        """Stream the answer to a question; a failed one is forgotten."""
        from mm1_mlx.errors import MM1Error

        parts: list[dict[str, Any]] = [
            {"type": "image", "image": data} for data in self.pictures
        ]
        user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        try:
            answer = self._stream([*self.messages, user])
        except MM1Error as error:
            note(f"error: {error}")
            if self.messages or self.pictures:
                note("/clear starts a new conversation")
            return
        self.messages += [user, {"role": "assistant", "content": answer}]
        self.pictures = []

    def _stream(self, messages: list[dict[str, Any]]) -> str:
        from mm1_mlx.runtime import stream

        cancel = threading.Event()
        text, stats = "", None
        pieces = stream(self.runtime, messages, cancel=cancel, **self.settings)
        while True:
            try:
                piece = next(pieces, None)
            except KeyboardInterrupt:
                # The generator ended with the interrupt; what came so far stands.
                cancel.set()
                break
            if piece is None:
                break
            new = piece.text if text else piece.text.lstrip()
            print_answer(new)
            text, stats = text + new, piece.stats
        print()
        if stats and sys.stderr.isatty():
            note(summary(stats))
        return text


def _read_line() -> str | None:
    """The next line typed, None at the end of the input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    import readline  # noqa: F401  (gives input() its line editing)

    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""
