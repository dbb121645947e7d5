"""``mm1 export``: models, whole or in parts, in the formats of other runtimes."""

from __future__ import annotations

import typer

from .coreml import coreml
from .mlxfn import mlxfn

export = typer.Typer(
    name="export",
    help="Write models, or parts of them, in the formats of other runtimes.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
export.command()(coreml)
export.command()(mlxfn)
