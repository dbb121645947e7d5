"""``mm1 adapter``: what an adapter is, and PEFT's brought over and given back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, human_bytes, note, print_json

adapter = typer.Typer(
    name="adapter",
    help="Show adapters, and exchange them with PEFT.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Of = Annotated[
    str,
    typer.Option("--model", "-m", help="the model that it is for", show_default=False),
]
Origin = Annotated[
    str | None,
    typer.Option(
        help="the checkpoint that the model was converted from (default: as the model "
        "says)",
        show_default=False,
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUT")]


@adapter.command()
def show(
    path: Annotated[str, typer.Argument(help="folder or hub repository of an adapter")],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter changes, of which model, and how it was trained."""
    from mm1_mlx.adapters import load

    found = load(path)
    config = found.config
    if as_json:
        print_json(
            config.to_dict()
            | {
                "base": found.base.to_dict(),
                "layers": list(found.layers),
                "full": list(found.full),
                "scales": dict(found.scales),
                "bytes": found.nbytes,
                "digest": found.digest,
                "training": {k: x for k, x in found.training.items() if k != "names"},
            }
        )
        return
    kind = {"lora": "LoRA", "dora": "DoRA"}[config.kind]
    print(
        f"{kind}, rank {config.rank}, scale {config.scale:g}: {len(found.layers)} layers"
        + (f" and {len(found.full)} whole weights" if found.full else "")
        + f", {human_bytes(found.nbytes)}, for {found.base.name!r:.120} "
        f"({found.base.digest[:12]})"
    )
    for name, value in _told(found.training).items():
        print(f"{name}: {value:.200}")


def _told(training: Mapping[str, Any]) -> dict[str, str]:
    """What an adapter says of its training, in words that a terminal may show."""
    from mm1_mlx.adapters.folder import RESOLUTION

    # Written by somebody else, so as JSON, whose control codes are spelled out.
    told = {
        ascii(name)[1:-1].replace("_", " "): json.dumps(value).strip('"')
        for name, value in training.items()
        if name != "names"
    }
    if not told:
        return {"training": "it says nothing of it"}
    return {RESOLUTION: "the model's own"} | told


@adapter.command(name="import")
def import_(
    path: Annotated[
        str, typer.Argument(help="folder or hub repository of a PEFT adapter")
    ],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    model: Of,
    source: Origin = None,
    overwrite: Overwrite = False,
) -> None:
    """Bring over a PEFT adapter made for the checkpoint that a model was converted from."""
    from mm1_mlx.adapters import save
    from mm1_mlx.convert.peft import import_peft
    from mm1_mlx.runtime import find_model

    folder = find_model(model)
    place = _apart(out, str(folder), path, source)
    report = import_peft(path, folder, source)
    if report.dropped:
        note(
            f"{len(report.dropped)} tensors are of layers that the model does not have, "
            f"e.g. {list(report.dropped[:3])}"
        )
    if report.doubt:
        note(report.doubt)
    save(place, report.adapter, overwrite=overwrite)
    print(out)


@adapter.command()
def export(
    path: Annotated[str, typer.Argument(help="folder or hub repository of an adapter")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    model: Of,
    source: Origin = None,
) -> None:
    """Write an adapter as PEFT's, for the checkpoint that a model was converted from."""
    from mm1_mlx.adapters import load
    from mm1_mlx.convert.peft_out import export_peft
    from mm1_mlx.runtime import find_model

    folder = find_model(model)
    place = _apart(out, str(folder), path, source)
    if left := export_peft(load(path), place, folder, source):
        note(
            f"{len(left)} trained tensors are left out, for the checkpoint has no such "
            f"part, e.g. {list(left[:3])}; 'mm1 fuse' takes them over"
        )
    print(out)


def _apart(out: Path, *sources: str | None) -> Path:
    """The folder to write, which is none of those that are read.

    Raises:
        CheckpointError: it is, holds or lies in one of them.
    """
    from mm1_mlx.folders import user_path
    from mm1_mlx.writer import check_apart

    place = user_path(str(out))
    check_apart(place, [user_path(name) for name in sources if name])
    return place
