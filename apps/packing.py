"""The flags that say how weights are packed, for ``quantize`` and ``convert``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any

import typer

from .common import note

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="4bit, 8bit, mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, mxfp4, mxfp8 or "
        "nvfp4",
        show_default=False,
    ),
]
Bits = Annotated[
    int | None,
    typer.Option(
        help="of the decoder's layers: 2, 3, 4, 5, 6 or 8", show_default=False
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(help="weights that share a scale: 32, 64 or 128", show_default=False),
]
Mode = Annotated[
    str | None,
    typer.Option(
        help="of the decoder's layers: affine, mxfp4, mxfp8 or nvfp4",
        show_default=False,
    ),
]


_WAY = "keep, bits (4 or 4/32) or a mode (mxfp4)"
Vision = Annotated[
    str | None, typer.Option(help=f"image encoder: {_WAY}", show_default=False)
]
Connector = Annotated[
    str | None, typer.Option(help=f"connector: {_WAY}", show_default=False)
]
Attention = Annotated[
    str | None, typer.Option(help=f"decoder's attention: {_WAY}", show_default=False)
]
MLP = Annotated[
    str | None,
    typer.Option(help=f"decoder's feed-forward layers: {_WAY}", show_default=False),
]
Experts = Annotated[
    str | None, typer.Option(help=f"decoder's experts: {_WAY}", show_default=False)
]
Router = Annotated[
    str | None, typer.Option(help=f"what chooses experts: {_WAY}", show_default=False)
]
Head = Annotated[
    str | None, typer.Option(help=f"embeddings and head: {_WAY}", show_default=False)
]


def note_uneven(uneven: Sequence[str]) -> None:
    """Say which modules stay as they are."""
    if uneven:
        note(
            f"{len(uneven)} modules stay as they are, no group size divides their width, "
            f"e.g. {list(uneven[:3])}"
        )


def choose_recipe(
    recipe: str | None,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    components: Mapping[str, str | None] = MappingProxyType({}),
) -> Any:
    """The recipe that the flags describe.

    Raises:
        ConfigError: there is no such recipe or way, or two flags contradict each other.
    """
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.quantize import find_recipe, parse_way, way_of
    from mm1_mlx.recipe import DEFAULT, LAYERS

    options = {"--bits": bits, "--group-size": group_size, "--mode": mode}
    given = {flag: value for flag, value in options.items() if value is not None}
    if recipe and given:
        raise ConfigError(
            f"--recipe {recipe} says what {next(iter(given))} says; give one of them"
        )
    name = recipe or DEFAULT
    chosen = find_recipe(name)
    if given:
        way = way_of(" ".join(f"{flag} {x}" for flag, x in given.items()),
                     bits, group_size, mode or "affine")  # fmt: skip
        chosen = chosen.with_ways(dict.fromkeys(LAYERS, way))
        name = f"{way.mode} {way.bits}/{way.group_size}"
    changes: Any = {
        component: parse_way(text, f"--{component}")
        for component, text in components.items()
        if text is not None
    }
    named = [f"{c} {text}" for c, text in components.items() if text is not None]
    return replace(chosen.with_ways(changes), name=", ".join([name, *named]))
