"""``mm1 quantize``: a model folder into one with fewer bits, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, human_bytes, note, print_json
from .packing import (
    MLP,
    Attention,
    Bits,
    Connector,
    Experts,
    GroupSize,
    Head,
    Mode,
    RecipeName,
    Router,
    Vision,
    choose_recipe,
    note_uneven,
)
from .progress import bars

Calibration = Annotated[
    Path | None,
    typer.Option(
        help="prompts or rows to train on, as JSON lines, or a folder of pictures "
        "(default: drawn pictures)",
        show_default=False,
    ),
]


def quantize(
    model: Annotated[str, typer.Argument(help="model folder or hub repository")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    recipe: RecipeName = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    mode: Mode = None,
    vision: Vision = None,
    connector: Connector = None,
    attention: Attention = None,
    mlp: MLP = None,
    experts: Experts = None,
    router: Router = None,
    head: Head = None,
    learned: Annotated[
        bool, typer.Option("--learned", help="learn scales that predict as before")
    ] = False,
    calibration: Calibration = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="prompts, a quarter to measure by (default: 32, 128 with --learned)",
            min=4,
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="run both models to say what it costs")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Pack a model's weights, by default into 4 bits, and show what that costs."""
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx import quantize as package
    from mm1_mlx.folders import user_path
    from mm1_mlx.runtime import find_model

    components = {
        "vision": vision,
        "connector": connector,
        "attention": attention,
        "mlp": mlp,
        "experts": experts,
        "router": router,
        "head": head,
    }
    chosen = choose_recipe(recipe, bits, group_size, mode, components)
    with bars() as progress:
        report = package.quantize(
            find_model(model),
            user_path(str(out)),
            chosen,
            learned=learned,
            calibration=user_path(str(calibration)) if calibration else None,
            count=count,
            measured=measure,
            overwrite=overwrite,
            progress=progress,
        )
    note_uneven(report.uneven)
    if report.unmeasured:
        note(report.unmeasured)
    if learned and not report.learned:
        note("learned scales cost more than rounded ones, which were kept")
    if as_json:
        print_json(_facts(report))
    else:
        _show(report)


def _facts(report: Any) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "out": str(report.out),
        "components": {
            name: {
                "parameters": row.parameters,
                "packed": dict(row.bits),
                "bytes_before": row.before,
                "bytes_after": row.after,
            }
            for name, row in report.rows.items()
        },
        "uneven": list(report.uneven),
        "learned": report.learned,
        "cost": report.cost and report.cost.to_dict(),
        "cost_of_rounding": report.rounded and report.rounded.to_dict(),
        "accuracy": report.accuracy
        and dict(
            zip(
                ("before", "after"), (x.to_dict() for x in report.accuracy), strict=True
            )
        ),
        "unmeasured": report.unmeasured,
    }


def _show(report: Any) -> None:
    """The report as a table, and sentences."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("component")
    for column in ("parameters", "bits", "before", "after"):
        table.add_column(column, justify="right")
    for name, row in report.rows.items():
        table.add_row(
            name,
            f"{row.parameters:,}",
            _bits(row.bits),
            human_bytes(row.before),
            human_bytes(row.after),
        )
    rows = report.rows.values()
    table.add_section()
    table.add_row(
        "all",
        f"{sum(row.parameters for row in rows):,}",
        "",
        human_bytes(sum(row.before for row in rows)),
        human_bytes(sum(row.after for row in rows)),
    )
    Console().print(table)
    if report.cost:
        print(f"divergence {_cost(report.cost)}")
    if report.rounded:
        print(f"rounded, not learned: {_cost(report.rounded)}")
    if report.accuracy:
        before, after = report.accuracy
        print(
            f"accuracy on {after.questions} questions about drawn shapes: "
            f"{_share(after)}; unpacked {_share(before)}"
        )
    print(report.out)


def _bits(bits: Mapping[str, int]) -> str:
    """``4``, or of several ways each one's share: ``4 (67%), 6 (33%)``."""
    total = sum(bits.values())
    if len(bits) < 2:
        return next(iter(bits), "kept")
    shares = (f"{way} ({n / total:.0%})" for way, n in sorted(bits.items()))
    return ", ".join(shares)


def _share(accuracy: Any) -> str:
    low, high = accuracy.interval
    return f"{accuracy.share:.1%} (95% interval {low:.1%} to {high:.1%})"


def _cost(cost: Any) -> str:
    return (
        f"{cost.kl_mean:.2g} nats in the mean, {cost.kl_p99:.2g} at the 99th percentile; "
        f"the same token is likeliest at {cost.top1:.1%} of {cost.positions:,} places"
    )
