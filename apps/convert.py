"""``mm1 convert``: foreign checkpoints to a model folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import typer

from .common import Resolution, human_bytes, note, source_line
from .packing import Bits, GroupSize, Mode, RecipeName, choose_recipe, note_uneven
from .progress import bars


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
    base: Annotated[
        str | None,
        typer.Option(help="source of the weights that SOURCE holds differences from"),
    ] = None,
    resolution: Resolution = None,
    upcycle: Annotated[
        str | None,
        typer.Option(
            help="turn layers of the language model into experts: experts=64,every=2",
        ),
    ] = None,
    recipe: RecipeName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    mode: Mode = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(help="cast the weights (default: keep)", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
) -> None:
    """Convert a checkpoint, or put a model together from parts of several."""
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.folders import user_path
    from mm1_mlx.presets import PRESETS

    if len(paths) > 2:
        raise typer.BadParameter(f"expected [SOURCE] OUT, got {len(paths)} paths")
    *source, out = paths
    if not source and not any((vision, connector, decoder, preset)):
        raise typer.BadParameter("OUT is missing, after SOURCE")
    if source and preset:
        raise typer.BadParameter("--preset stands in for SOURCE; give one of them")
    if base and not source:
        raise typer.BadParameter("--base needs SOURCE, the differences from it")
    if preset and preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is not one of {sorted(PRESETS)}")
    whole = source[0] if source else preset
    sources = (whole, base, vision, _named_source(connector), decoder)
    for name in dict.fromkeys(sources):
        if name and name not in PRESETS:
            _announce(name)
    packs = any(x is not None for x in (recipe, bits, group_size, mode))
    packing = choose_recipe(recipe, bits, group_size, mode) if packs else None
    parts = {"vision": vision, "connector": connector, "decoder": decoder}
    report = run_conversion(
        whole,
        user_path(out),
        parts,
        base=base,
        resolution=resolution,
        upcycle=upcycle,
        recipe=packing,
        dtype=dtype,
        overwrite=overwrite,
    )
    print(report.out)


def run_conversion(
    source: str | None,
    out: Path,
    parts: Mapping[str, str | None] = MappingProxyType({}),
    *,
    base: str | None = None,
    resolution: str | None = None,
    upcycle: str | None = None,
    recipe: Any = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Any:
    """Convert with a progress bar and say what was done, on stderr."""
    import mlx.core as mx

    from mm1_mlx.convert import convert as run

    with bars() as advance:
        report = run(
            source,
            out,
            **parts,
            base=base,
            resolution=resolution,
            upcycle=upcycle,
            recipe=recipe,
            dtype=getattr(mx, dtype) if dtype else None,
            overwrite=overwrite,
            starting=_begin,
            progress=partial(advance, "tensors"),
        )
    _tell(report)
    return report


def _begin(initialised: int) -> None:
    """Size of what no source gives, before it is written."""
    if initialised:
        note(f"writing {human_bytes(initialised)} of initialised weights")


def _announce(name: str) -> None:
    """Size and licence of a source, before it is fetched."""
    from mm1_mlx.convert import describe

    note(source_line(describe(name)))


def _named_source(connector: str | None) -> str | None:
    """The connector's source, None where it is a new one."""
    from mm1_mlx.convert.connectors import is_spec

    return None if connector is None or is_spec(connector) else connector


def _tell(report: Any) -> None:
    for part, (name, kind) in report.parts.items():
        note(f"{part}: {name} ({kind})")
    for name, tensors in report.dropped.items():
        note(f"{name}: {len(tensors)} tensors not needed, e.g. {list(tensors[:3])}")
    note_uneven(report.uneven)
    for part in report.needs_training:
        note(f"{part}: initialised, needs training")
    if report.config.decoder and not report.has_tokenizer:
        note("no tokenizer: put its files beside config.json before asking the model")
