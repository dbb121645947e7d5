"""``mm1``: the command line's entry. Only typer is imported before a command runs."""

from __future__ import annotations

import io
import signal
import sys
from typing import Annotated, Any

import typer

from .adapter import adapter
from .bench import bench
from .caption import caption
from .chat import chat
from .common import guarded
from .convert import convert
from .doctor import doctor
from .embed import embed
from .eval import evaluate
from .export import export
from .fuse import fuse
from .generate import generate
from .inspect import inspect
from .prefix import prefix
from .quantize import quantize
from .serve import serve
from .train import train
from .verify import verify

app = typer.Typer(
    name="mm1",
    help="Run, assemble and train MM1-type multimodal LLMs on Apple silicon.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(
        generate,
        chat,
        serve,
        caption,
        convert,
        quantize,
        fuse,
        embed,
        inspect,
        verify,
        bench,
        doctor,
    ),
):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(train)
app.add_typer(prefix)
app.add_typer(adapter)
app.add_typer(export)


def _print_version(value: bool) -> None:
    if value:
        from mm1_mlx import __version__

        print(f"mm1-mlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True,
                     help="print the version and exit"),
    ] = False,
) -> None:  # fmt: skip
    """Run, assemble and train MM1-type multimodal LLMs on Apple silicon."""


def _end(*_: Any) -> None:
    """End as an exception does, so that what is half done is cleared away."""
    # Once: a second would end the clearing away.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _end)
    # Threads of a thread pool, from which apps start their children, block them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    # What is not UTF-8 arrives as it does in arguments, and is refused as they are.
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    # However Python was started, help and errors say the name that users type.
    guarded(lambda: app(prog_name="mm1"))
