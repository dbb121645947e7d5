"""``mm1 export coreml``: encoder and connector as a Core ML package, checked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..common import AsJson, human_bytes, note, picture, print_json
from ..progress import bars


def coreml(
    model: Annotated[str, typer.Argument(help="model folder or hub repository")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="the package to write, NAME.mlpackage",
            show_default=False,
        ),
    ],
    precision: Annotated[
        Literal["fp16", "fp32", "int8", "4bit"],
        typer.Option(help="of the weights; all but fp32 compute in fp16"),
    ] = "fp16",
    resolution: Annotated[
        str | None,
        typer.Option(
            help="sides of tiles in pixels, 378,672: a function for each (default: the "
            "model's)",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        Literal["image", "tensor"],
        typer.Option(
            "--input", help="a picture, or its colours from 0 to 1, [1, 3, S, S]"
        ),
    ] = "image",
    ane: Annotated[
        bool,
        typer.Option(
            "--ane", help="laid out for the Neural Engine, in chunks of 8 blocks"
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option(help="run the package here and compare it with the model")
    ] = True,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "-i",
            help="a picture to compare by, several times (default: a drawn one)",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the package")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model's image encoder and connector as a Core ML package.

    It takes one tile of a picture, normalises it and gives its image tokens. The check
    runs what was written with numpy, on macOS and Linux, and refuses what overflows.
    """
    if image and not check:
        raise typer.BadParameter("--image is what --check compares by")
    sizes = _sizes(resolution)
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.coreml.package import export
    from mm1_mlx.coreml.program import Plan
    from mm1_mlx.folders import user_path
    from mm1_mlx.runtime import TINY, find_model

    place = user_path(str(out))
    pictures: list[Any] = [picture(x) for x in image or []]
    with bars() as progress:
        facts, errors = export(
            find_model(model),
            place,
            Plan(precision, ane=ane, as_image=kind == "image"),
            sizes,
            pictures=(pictures or [TINY / "four-shapes.png"]) if check else (),
            overwrite=overwrite,
            progress=progress,
        )
    size = sum(x.stat().st_size for x in place.rglob("*") if x.is_file())
    if as_json:
        stages = {str(k): [asdict(x) for x in v] for k, v in errors.items()}
        made = {"out": str(place), "bytes": size, **asdict(facts)}
        print_json({**made, "errors": stages})
        return
    for side, found in errors.items():
        last, reach = found[-1], max(found, key=lambda x: x.reach)
        note(
            f"{side} pixels: {last.l2:.2g} off the model (largest {last.largest:.2g}); "
            f"numbers reach {reach.reach:,.0f}, at {reach.name}"
        )
    note(f"{place}: {human_bytes(size)}")


def _sizes(resolution: str | None) -> list[int]:
    """The sides of tiles that ``--resolution`` names."""
    parts = (resolution or "").split(",") if resolution is not None else []
    if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise typer.BadParameter(
            f"--resolution {resolution!r} names no sizes, expected such as 378,672"
        )
    return [int(part) for part in parts]
