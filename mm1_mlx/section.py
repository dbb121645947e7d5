"""A frozen dataclass as strict JSON: unknown, missing and mistyped fields are errors."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

from mm1_mlx.errors import ConfigError


class Section:
    """JSON round trip that rejects unknown and missing fields by name."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that ``values`` spells out.

        Raises:
            ConfigError: a field is unknown, missing or of the wrong type.
        """
        name = cls.__name__
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: expected an object, got {values!r:.80}")
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ConfigError(
                f"{name}: unknown field(s) {unknown[:5]}; known: {sorted(fields)}"
            )
        missing = [
            key
            for key, field in fields.items()
            if field.default is dataclasses.MISSING and key not in values
        ]
        if missing:
            raise ConfigError(f"{name}: missing field(s) {missing[:5]}")
        hints = typing.get_type_hints(cls)
        return cls(**{k: _read(hints[k], v, f"{name}.{k}") for k, v in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``from_dict`` reads back as an equal config."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type, or a ConfigError that names the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        sections = [a for a in args if isinstance(a, type) and issubclass(a, Section)]
        if len(sections) > 1:
            return _read_kind(sections, value, where)
        return _read(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r:.80} is not one of {list(args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r:.80}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(
                f"{where}: expected {len(args)} values, got {value!r:.80}"
            )
        return tuple(_read(args[0], item, where) for item in value)
    if issubclass(hint, Section):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if hint is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where}: expected a finite number, got {value!r:.80}")
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r:.80}")
    return value


def _read_kind(sections: list[type[Section]], value: Any, where: str) -> Section:
    """The union member whose ``kind`` the value names."""
    if isinstance(value, Section) and type(value) in sections:
        return value
    kinds = {typing.get_args(typing.get_type_hints(s)["kind"])[0]: s for s in sections}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"{where}: kind {kind!r:.80} is not one of {sorted(kinds)}")
    return kinds[kind].from_dict(value)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_sizes(section: Section, limit: int, *names: str) -> None:
    """Pass if every named field is in 1..limit."""
    for name in names:
        value = getattr(section, name)
        require(
            1 <= value <= limit,
            f"{type(section).__name__}.{name}: {value} is outside 1..{limit}",
        )


def check_positive(section: Section, *names: str) -> None:
    """Pass if every named field is above 0."""
    for name in names:
        value = getattr(section, name)
        require(value > 0, f"{type(section).__name__}.{name}: {value} is not positive")
