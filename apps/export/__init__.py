"""``mm1 export``: parts of a model in the formats of other runtimes."""

from __future__ import annotations

import typer

from .coreml import coreml

export = typer.Typer(
    name="export",
    help="Write parts of a model in the formats of other runtimes.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
export.command()(coreml)
