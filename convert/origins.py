"""Which source each part of a model comes from."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.presets import PRESETS

from .delta import Delta
from .detect import Format, detect_format
from .source import Source

PARTS = MM1Config.PARTS
# What goes where another part goes, and is not named by itself.
FOLLOWERS = {"region": "connector", "text": "vision"}


@dataclass(frozen=True)
class Origin:
    """A source of parts.

    Attributes:
        name: as the caller gave it, with the base where it has one.
        source: the open checkpoint.
        format: the format it is in.
        config: what it holds.
    """

    name: str
    source: Source
    format: Format
    config: MM1Config


# A preset's name has a config, but no weights.
Origins = dict[str, Origin | MM1Config]


def open_origins(
    chosen: dict[str, str | None],
    whole: str | None,
    stack: ExitStack,
    base: str | None = None,
    out: Path | None = None,
) -> Origins:
    """The origin of every part that has one; each source is opened once.

    Args:
        chosen: the source or preset that was named for a part.
        whole: the source of all other parts.
        stack: closes the sources.
        base: what ``whole`` holds differences from.
        out: the place of the model to be made, beside which pickles are unpacked.

    Raises:
        CheckpointError: a source does not have the part it was named for, or holds
            differences from a base that was not named.
    """
    opened: Origins = {}
    origins: Origins = {}
    for part, name in chosen.items():
        wanted = name or whole
        if wanted is None:
            continue
        if wanted not in opened:
            opened[wanted] = PRESETS.get(wanted) or _open(
                wanted, base if wanted == whole else None, stack, out
            )
        if getattr(config_of(opened[wanted]), part) is not None:
            _check_here(opened[wanted], part)
            origins[part] = opened[wanted]
        elif name:
            raise CheckpointError(f"{name} holds no {part}; name another source for it")
    for part, leader in FOLLOWERS.items():
        origin = origins.get(leader)
        if origin and getattr(config_of(origin), part) is not None:
            origins[part] = origin
    if "decoder" in origins:
        # Beside a decoder CLIP's space has no use.
        origins.pop("text", None)
    if base and not isinstance(opened.get(whole or ""), Origin):
        raise CheckpointError(
            f"base {base} has no differences to be added to; give their folder as SOURCE, "
            "or leave --base out"
        )
    for origin in origins.values():
        if isinstance(origin, Origin):
            _check_base(origin, origins.get("decoder") is origin)
    return origins


def _check_base(origin: Origin, gives_decoder: bool) -> None:
    """Pass only if differences, and nothing else, are added to a base.

    A base has no other part than the decoder, so all others are whole without it.
    """
    given = isinstance(origin.source, Delta)
    needed = None
    if hasattr(origin.format, "base") and (given or gives_decoder):
        needed = origin.format.base(origin.source)
    if needed and not given:
        raise CheckpointError(
            f"{origin.name} holds differences from another model's weights; add --base "
            f"{needed}"
        )
    if given and not needed:
        raise CheckpointError(
            f"{origin.name} is not made of differences from a base; leave --base out"
        )


def _check_here(origin: Origin | MM1Config, part: str) -> None:
    """Pass only if the origin does not leave the part to another source."""
    place = elsewhere(origin).get(part)
    if place and isinstance(origin, Origin):
        raise CheckpointError(
            f"{origin.name} does not hold its {part} part; add --{part} {place}"
        )


def elsewhere(origin: Origin | MM1Config | None) -> dict[str, str]:
    """By part, the source that a model's authors left it in."""
    if not isinstance(origin, Origin) or not hasattr(origin.format, "elsewhere"):
        return {}
    return origin.format.elsewhere(origin.source)


def _open(name: str, base: str | None, stack: ExitStack, out: Path | None) -> Origin:
    opened = Delta(name, base, out) if base else Source(name, out)
    source = stack.enter_context(opened)
    format = detect_format(source)
    shown = f"{name} + {base}" if base else name
    return Origin(shown, source, format, format.config(source))


def config_of(origin: Origin | MM1Config) -> MM1Config:
    """The config of a source or of a preset."""
    return origin.config if isinstance(origin, Origin) else origin
