"""``mm1 prefix``: what stands before every question, read once and kept by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import (
    AdapterNames,
    AsJson,
    Images,
    Model,
    Resolution,
    System,
    Yes,
    human_bytes,
    note,
    open_runtime,
    picture,
    print_json,
)
from .progress import bars

prefix = typer.Typer(
    name="prefix",
    help="Keep what stands before every question, so that it is read once.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Name = Annotated[str, typer.Argument(help="what to call it", show_default=False)]


@prefix.command()
def save(
    name: Name,
    image: Images = None,
    shots: Annotated[
        Path | None,
        typer.Option(
            help="solved examples, JSONL, as for generate", show_default=False
        ),
    ] = None,
    shot_style: Annotated[
        Literal["auto", "chat", "caption", "vqa"],
        typer.Option(help="examples as turns, or as a base model's text"),
    ] = "auto",
    system: System = None,
    resolution: Resolution = None,
    model: Model = None,
    adapter: AdapterNames = None,
    yes: Yes = False,
) -> None:
    """Read pictures, examples and a system message, and keep them under a name.

    'mm1 generate --prefix NAME' answers behind them without reading them again.
    """
    if not (image or shots or system):
        raise typer.BadParameter("give -i, --shots or --system: what to keep")
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.memory.named import Prefix
    from mm1_mlx.shots import read_shots

    made = Prefix(
        name,
        system,
        tuple(picture(source) for source in image or []),
        tuple(read_shots(shots)) if shots else (),
        shot_style,
    )
    with open_runtime(model, yes, resolution, adapter) as runtime, bars() as tell:
        count = runtime.save_prefix(
            made, lambda done, total: tell("tokens", done, total)
        )
    note(f"{name}: {count:,} tokens kept; ask behind it with --prefix {name}")


@prefix.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """List what is kept."""
    from mm1_mlx.memory.named import prefix_folder, saved

    found = saved(prefix_folder())
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        note("no prefixes; save one with 'mm1 prefix save NAME'")
    for one in found:
        if not one.model:
            print(f"{one.name}  damaged, {human_bytes(one.bytes)}")
            continue
        print(
            f"{one.name}  {one.tokens:,} tokens, pictures: {one.pictures}, "
            f"{human_bytes(one.bytes)}, of {one.model}"
        )


@prefix.command()
def drop(name: Name) -> None:
    """Delete what is kept under a name."""
    from mm1_mlx.memory.named import drop as delete
    from mm1_mlx.memory.named import prefix_folder

    delete(prefix_folder(), name)
    note(f"{name} is deleted")
