"""Which source each part of a model comes from, and the config of them together."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from mm1_mlx.config import MM1Config, QuantizationConfig
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.presets import PRESETS

from .connectors import SPELLINGS, connector_config
from .delta import Delta
from .detect import Format, detect_format
from .quantization import quantization
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
) -> Origins:
    """The origin of every part that has one; each source is opened once.

    Args:
        chosen: the source or preset that was named for a part.
        whole: the source of all other parts.
        stack: closes the sources.
        base: what ``whole`` holds differences from.

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
                wanted, base if wanted == whole else None, stack
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
            f"base {base} has no differences to be added to; give their folder as SOURCE"
        )
    for origin in origins.values():
        if isinstance(origin, Origin):
            _check_base(origin)
    return origins


def _check_base(origin: Origin) -> None:
    """Pass only if differences, and nothing else, are added to a base."""
    needed = None
    if hasattr(origin.format, "base"):
        needed = origin.format.base(origin.source)
    given = isinstance(origin.source, Delta)
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
    place = _elsewhere(origin).get(part)
    if place and isinstance(origin, Origin):
        raise CheckpointError(
            f"{origin.name} does not hold its {part} part; add --{part} {place}"
        )


def _elsewhere(origin: Origin | MM1Config | None) -> dict[str, str]:
    """By part, the source that a model's authors left it in."""
    if not isinstance(origin, Origin) or not hasattr(origin.format, "elsewhere"):
        return {}
    return origin.format.elsewhere(origin.source)


def _open(name: str, base: str | None, stack: ExitStack) -> Origin:
    source = stack.enter_context(Delta(name, base) if base else Source(name))
    format = detect_format(source)
    shown = f"{name} + {base}" if base else name
    return Origin(shown, source, format, format.config(source))


def config_of(origin: Origin | MM1Config) -> MM1Config:
    """The config of a source or of a preset."""
    return origin.config if isinstance(origin, Origin) else origin


def compose(origins: Origins, spec: str | None) -> MM1Config:
    """The config of the parts together, a new connector between them if asked for.

    Pictures are made as the encoder's source makes them, prompts as the decoder's; a
    model whose authors left its encoder elsewhere goes on making both.

    Raises:
        ConfigError: a part is missing, or they do not fit.
    """
    values: dict[str, Any] = {
        part: getattr(config_of(origin), part) for part, origin in origins.items()
    }
    for part, section in (("vision", "image"), ("decoder", "prompt")):
        if part in origins:
            values[section] = getattr(config_of(origins[part]), section)
    both = "vision" in values and "decoder" in values
    if both:
        # Beside a decoder CLIP's space has no use.
        values["vision"] = replace(values["vision"], projection_size=None)
    connector = origins.get("connector")
    trained = connector.config.vision if isinstance(connector, Origin) else None
    if trained and "vision" in values:
        # A connector goes on reading the features it was trained on.
        values["vision"] = replace(
            values["vision"],
            feature_layer=trained.feature_layer,
            apply_post_norm=trained.apply_post_norm,
            drop_cls=trained.drop_cls,
        )
        if _elsewhere(connector):
            # The model is the connector's; only its encoder's weights lie elsewhere.
            values["image"] = config_of(origins["connector"]).image
    if spec:
        if not both:
            raise ConfigError(
                f"connector {spec!r} needs a vision part and a decoder to stand between"
            )
        # A class token has no place in the grid that connectors pool.
        values["vision"] = replace(values["vision"], drop_cls=True)
        made = connector_config(spec, values["vision"], values["decoder"])
        tiling = values["image"].tiling if values["image"] else None
        newline = getattr(tiling, "merge", "flat") == "unpad"
        values["connector"] = replace(made, newline=newline)
    elif both and "connector" not in values:
        raise ConfigError(
            "vision and decoder need a connector between them, one of "
            f"{', '.join(SPELLINGS)}, or a source of one"
        )
    return MM1Config(**values, quantization=_packing(origins))


def _packing(origins: Origins) -> QuantizationConfig | None:
    """How the weights of the sources are packed, all in one way or not at all."""
    sources = {o.name: o.source for o in origins.values() if isinstance(o, Origin)}
    found = {name: quantization(source) for name, source in sources.items()}
    packed = {name: packing for name, packing in found.items() if packing}
    if len(set(packed.values())) > 1:
        raise ConfigError(
            f"{' and '.join(packed)} are quantized in different ways; convert one of "
            "them from the checkpoint that it was made from"
        )
    return next(iter(packed.values()), None)
