"""The command: flags, a model, and who reads and shows."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common import (
    AdapterNames,
    MaxTokens,
    Model,
    Resolution,
    Seed,
    System,
    Temperature,
    TopP,
    VisionBackend,
    Yes,
    note,
    open_runtime,
)
from ..speed import (
    DraftModel,
    KVBits,
    KVStart,
    NumDraftTokens,
    PrefixName,
    PromptLookup,
    speed_settings,
)


def chat(
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            "-i",
            help="a picture for the first question, several times",
            show_default=False,
        ),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(help="go on with a chat that /save wrote", show_default=False),
    ] = None,
    model: Model = None,
    adapter: AdapterNames = None,
    vision_backend: VisionBackend = "mlx",
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
    no_preview: Annotated[
        bool, typer.Option("--no-preview", help="show no small copies of pictures")
    ] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="do not keep what is typed")
    ] = False,
    yes: Yes = False,
) -> None:
    """Talk with a model about pictures."""
    if load is not None and system is not None:
        raise typer.BadParameter("--load brings its own system message, or none")
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
        runtime = stack.enter_context(
            open_runtime(model, yes, resolution, adapter, vision_backend)
        )
        from mm1_mlx.folders import user_path

        from .reader import PlainReader, TerminalReader
        from .session import COMMANDS, Session
        from .view import PlainView, TerminalView

        described = [(name, command.does) for name, command in COMMANDS.items()]
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        session = Session(
            runtime,
            settings,
            system,
            TerminalReader(not no_history, described) if terminal else PlainReader(),
            TerminalView(preview=not no_preview) if terminal else PlainView(),
        )
        note(f"{runtime.path.name}: drop pictures here or name them, /help for more")
        if load is not None:
            session.load(user_path(str(load)))
        for path in image or ():
            session.add_picture(user_path(str(path)))
        session.run()
