"""``mm1 export mlxfn``: a model as functions that programs without Python run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..common import AsJson, Resolution, human_bytes, print_json
from ..progress import bars


def mlxfn(
    model: Annotated[str, typer.Argument(help="model folder or hub repository")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="the folder to write", show_default=False),
    ],
    capacity: Annotated[
        int | None,
        typer.Option(
            help="tokens of a prompt and its answer together (default: 2048, or as many "
            "as the model has)",
            min=1,
            show_default=False,
        ),
    ] = None,
    prefill: Annotated[
        str, typer.Option(help="tokens of a prompt that are run at once, each a trace")
    ] = "32,128,512",
    resolution: Resolution = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Write encoder, prefill and decode step as functions, and check them.

    They run on this device, with this version of mlx, and no other:
    apps/macos/mlxfn-demo is a C++ program that does.
    """
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx import mlxfn as package
    from mm1_mlx.folders import user_path
    from mm1_mlx.runtime import find_model

    with bars() as progress:
        report = package.export(
            find_model(model),
            user_path(str(out)),
            resolution=resolution,
            capacity=capacity,
            prefill=_buckets(prefill),
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json(_facts(report))
        return
    sidecar = report.sidecar
    for file in sidecar.files:
        print(f"{file.name}: {human_bytes(file.bytes)}")
    print(
        f"mlx {sidecar.mlx}, {sidecar.device}; {sidecar.capacity:,} tokens; logits differ "
        f"from the model's by {report.difference:.1g}"
    )
    print(report.out)


def _buckets(text: str) -> list[int]:
    """The numbers of ``--prefill``.

    Raises:
        ConfigError: they are none.
    """
    from mm1_mlx.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(
            f"--prefill {text!r:.80} is no list of numbers; pass one as 32,128,512"
        )
    buckets = [int(part[:9]) for part in parts]
    if min(buckets) < 1:
        raise ConfigError(f"--prefill {text!r:.80} holds a number below 1")
    return buckets


def _facts(report: Any) -> dict[str, Any]:
    """The report as JSON values."""
    sidecar = report.sidecar
    return {
        "out": str(report.out),
        "mlx": sidecar.mlx,
        "device": sidecar.device,
        "capacity": sidecar.capacity,
        "buckets": list(sidecar.buckets),
        "difference": report.difference,
        "files": {file.name: file.bytes for file in sidecar.files},
    }
