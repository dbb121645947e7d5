"""``mm1 fuse``: a model and its adapters into one model, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import (
    AdapterNames,
    AsJson,
    Resolution,
    human_bytes,
    named_adapters,
    note,
    print_json,
)
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
)
from .progress import bars


def fuse(
    model: Annotated[str, typer.Argument(help="model folder or hub repository")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    adapter: AdapterNames = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(help="of what is not packed (default: keep)", show_default=False),
    ] = None,
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
    resolution: Resolution = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="rows of the adapters' task, as they are trained on, or a folder of "
            "pictures (default: drawn pictures)",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="prompts to measure by", min=4)] = 24,
    measure: Annotated[
        bool,
        typer.Option(help="run the models to say what it costs; guards a packing"),
    ] = True,
    allow_loss: Annotated[
        bool,
        typer.Option(
            "--allow-loss",
            help="write even if over 10% of their effect is lost, or nobody knows",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Add adapters to a model's weights, so that it needs them no longer.

    What they change of a packed model is kept in 16 bits, unless you ask for a packing;
    fusing stops where too much of what they have learned would be rounded away.
    """
    if not adapter:
        raise typer.BadParameter("name what to fuse: --adapter PATH[:SCALE]")
    from mm1_mlx.blas import preload_blas

    preload_blas()
    import mlx.core as mx

    from mm1_mlx.adapters import Adapters
    from mm1_mlx.folders import user_path
    from mm1_mlx.fuse import fuse as run
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
    options = (recipe, bits, group_size, mode, *components.values())
    packing = None
    if any(option is not None for option in options):
        packing = choose_recipe(recipe, bits, group_size, mode, components)
    with bars() as progress:
        report = run(
            find_model(model),
            user_path(str(out)),
            Adapters.load(named_adapters(adapter)),
            recipe=packing,
            dtype=getattr(mx, dtype) if dtype else None,
            resolution=resolution,
            calibration=user_path(str(calibration)) if calibration else None,
            count=count,
            measured=measure,
            allow_loss=allow_loss,
            overwrite=overwrite,
            progress=progress,
        )
    if report.unmeasured:
        note(report.unmeasured)
    if as_json:
        print_json(_facts(report))
    else:
        _show(report)


def _facts(report: Any) -> dict[str, Any]:
    """The report as JSON values."""
    found = report.measured
    return {
        "out": str(report.out),
        "bytes_before": report.before,
        "bytes_after": report.after,
        "changed": report.changed,
        "unpacked": list(report.unpacked),
        "measured": found
        and {
            "cost": found.cost.to_dict(),
            "effect": found.effect.to_dict(),
            "lost": found.lost,
            "largest_difference": found.largest,
            "mean_difference": found.mean,
            "largest_logit": found.scale,
        },
        "unmeasured": report.unmeasured,
    }


def _show(report: Any) -> None:
    """The report as sentences."""
    print(
        f"{report.changed} weights changed, {human_bytes(report.before)} before and "
        f"{human_bytes(report.after)} after"
    )
    if report.unpacked:
        print(
            f"{len(report.unpacked)} of them were packed and no longer are, so that the "
            "adapters are not rounded away; --bits packs them again"
        )
    if found := report.measured:
        print(
            f"the adapters move predictions by {found.effect.kl_mean:.2g} nats, fusing "
            f"them by {found.cost.kl_mean:.2g}"
            + (f": {found.lost:.2%} is lost" if found.lost is not None else
               "; they change next to nothing on these prompts, give some of their "
               "task by --calibration")
        )  # fmt: skip
        print(
            f"logits differ by {found.mean:.2g} in the mean and {found.largest:.2g} at "
            f"most, the largest being {found.scale:.3g}; the same token is likeliest at "
            f"{found.cost.top1:.1%} of {found.cost.positions:,} places"
        )
    print(report.out)
