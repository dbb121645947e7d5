"""How weights are packed: what mlx-lm's configs call ``quantization``.

One way for all, and beside it the modules that have one of their own, by their paths:

    {"group_size": 64, "bits": 4, "mode": "affine",
     "decoder.embed_tokens": {"group_size": 64, "bits": 6, "mode": "affine"}}

Source: https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/utils.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from mm1_mlx.section import Section, require

# Group sizes and bits of every mode that mlx has.
MODES = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


@dataclass(frozen=True, kw_only=True)
class Packing(Section):
    """One way to pack: so many bits a weight, and scales for every group of them."""

    group_size: int
    bits: int
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"

    def __post_init__(self) -> None:
        for name, known in zip(("group_size", "bits"), MODES[self.mode], strict=True):
            value = getattr(self, name)
            require(
                value in known,
                f"{type(self).__name__}.{name}: {value} is not one of {list(known)}, "
                f"which mode {self.mode!r} has",
            )

    def bits_per_weight(self, itemsize: int = 2) -> float:
        """What a weight takes, its share of scales of ``itemsize`` bytes included."""
        # Integer scales have 8 bits, and no biases beside them.
        scales = 2 * 8 * itemsize if self.mode == "affine" else 8
        return self.bits + scales / self.group_size


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Packing):
    """The packing of every module whose ``scales`` the checkpoint holds."""

    # Paths of the modules that are packed in another way, and that way; sorted.
    modules: tuple[tuple[str, Packing], ...] = ()

    @classmethod
    def of_modules(cls, packed: Mapping[str, Packing]) -> Self:
        """The config of these modules; the way that most have is the one for all.

        Of none there is no config to be asked for.
        """
        ways = list(packed.values())
        most = max(dict.fromkeys(ways), key=ways.count)
        others = ((path, way) for path, way in packed.items() if way != most)
        return cls(**most.to_dict(), modules=tuple(sorted(others, key=_path)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that ``values`` spells out, modules by path among its fields."""
        if not isinstance(values, Mapping):
            return super().from_dict(values)
        own = {k: v for k, v in values.items() if isinstance(v, Mapping)}
        made = super().from_dict({k: v for k, v in values.items() if k not in own})
        ways = ((path, Packing.from_dict(way)) for path, way in own.items())
        return replace(made, modules=tuple(sorted(ways, key=_path)))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``from_dict`` reads back as an equal config."""
        own = {path: way.to_dict() for path, way in self.modules}
        return self.default.to_dict() | own

    @property
    def default(self) -> Packing:
        """The way of all modules that have none of their own."""
        return Packing(group_size=self.group_size, bits=self.bits, mode=self.mode)

    def way(self, path: str) -> Packing:
        """How the module of this path is packed."""
        return self._ways.get(path, self.default)

    @cached_property
    def _ways(self) -> dict[str, Packing]:
        return dict(self.modules)


def _path(entry: tuple[str, Packing]) -> str:
    return entry[0]
