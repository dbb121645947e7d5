"""``mm1 convert``: foreign checkpoints to a model folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import human_bytes, note


def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="a folder or hub repository to convert, unless parts are named, "
            "and the folder to write",
            metavar="[SOURCE] OUT",
        ),
    ],
    vision: Annotated[
        str | None, typer.Option(help="source or preset of the image encoder")
    ] = None,
    connector: Annotated[
        str | None,
        typer.Option(help="source of the connector, or a new one: c-abstractor:144"),
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(help="source or preset of the language model")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="size of all parts that have no source")
    ] = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(help="cast the weights (default: keep)", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
) -> None:
    """Convert a checkpoint, or put a model together from parts of several."""
    from mm1_mlx.blas import preload_blas

    preload_blas()
    import mlx.core as mx

    from mm1_mlx.convert import convert as run

    if len(paths) > 2:
        raise typer.BadParameter(f"expected [SOURCE] OUT, got {len(paths)} paths")
    *source, out = paths
    if not source and not any((vision, connector, decoder, preset)):
        raise typer.BadParameter("OUT is missing, after SOURCE")
    if source and preset:
        raise typer.BadParameter("--preset stands in for SOURCE; give one of them")
    whole = source[0] if source else preset
    for name in {whole, vision, connector, decoder}:
        if name:
            _announce(name)
    with _progress() as advance:
        report = run(
            whole,
            Path(out).expanduser(),
            vision=vision,
            connector=connector,
            decoder=decoder,
            dtype=getattr(mx, dtype) if dtype else None,
            overwrite=overwrite,
            progress=advance,
        )
    _tell(report)


def _announce(name: str) -> None:
    """Size and licence of a source, before it is fetched."""
    from mm1_mlx.convert import describe
    from mm1_mlx.convert.connectors import is_spec
    from mm1_mlx.presets import PRESETS

    if name in PRESETS or is_spec(name):
        return
    info = describe(name)
    size = human_bytes(info.bytes) if info.bytes is not None else "unknown size"
    note(f"{info.name}: {size}, licence {info.licence or 'not stated'}")


def _progress() -> Any:
    """A context that gives a callback (done, total), shown as a bar on a terminal."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    @contextmanager
    def bar() -> Any:
        columns = ("tensors", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as p:
            task = p.add_task("", total=None)
            yield lambda done, total: p.update(task, completed=done, total=total)

    return bar()


def _tell(report: Any) -> None:
    for part, (name, kind) in report.parts.items():
        note(f"{part}: {name} ({kind})")
    for name, tensors in report.dropped.items():
        note(f"{name}: {len(tensors)} tensors not needed, e.g. {list(tensors[:3])}")
    for part in report.needs_training:
        note(f"{part}: initialised, needs training")
    if report.config.decoder and not report.has_tokenizer:
        note("no tokenizer: put its files beside config.json before asking the model")
    print(report.out)
