"""``mm1 verify``: whether a model is whole, and computes what its source computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, note, print_json, stop


def verify(
    model: Annotated[
        str | None,
        typer.Argument(
            help="model folder or hub repository (default: $MM1_MODEL, else mm1-tiny)"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="the folder or hub repository that it was converted from: compare "
            "every stage with transformers (needs torch)",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image",
            "-i",
            help="the picture to compare on (default: one of mm1-tiny's)",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a model's digests and, with a source, compare it stage by stage."""
    if image and not against:
        raise typer.BadParameter("--image is what to compare on; give --against too")
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.checkpoint import load_config, verify_digests

    from .cached import find

    path = find(model)
    load_config(path)
    files = verify_digests(path)
    note(f"{files} files have the sha256 of the manifest")
    if against is None:
        if as_json:
            print_json({"files": files})
        return
    from mm1_mlx.convert.record import PARITY, record
    from mm1_mlx.convert.verify import PICTURE
    from mm1_mlx.convert.verify import verify as compare

    parity = compare(path, against, image or PICTURE)
    record(path, parity)
    report = parity.to_dict()
    if as_json:
        print_json(report)
    else:
        _print_table(report)
    note(f"written to {path / PARITY}")
    if not parity.passed:
        stop("the model does not compute what its source computes")


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "largest difference", "allowed", "")
    for stage in report["stages"]:
        mark = "equal" if stage["passed"] else "DIFFERENT"
        difference = f"{stage['difference']:.1e}"
        table.add_row(stage["name"], difference, f"{stage['tolerance']:.0e}", mark)
    if report["equal_tokens"] is not None:
        equal, count = report["equal_tokens"], report["num_tokens"]
        mark = "equal" if equal == count else "DIFFERENT"
        table.add_row("greedy tokens", f"{equal} of {count}", "all", mark)
    Console().print(table)
