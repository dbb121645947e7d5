"""How weights are packed: what mlx-lm's configs call ``quantization``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm1_mlx.section import Section, require

GROUP_SIZES = (16, 32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Section):
    """The packing of every module whose ``scales`` the checkpoint holds."""

    group_size: int
    bits: int
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"

    def __post_init__(self) -> None:
        for name, known in (("group_size", GROUP_SIZES), ("bits", BITS)):
            value = getattr(self, name)
            require(
                value in known,
                f"QuantizationConfig.{name}: {value} is not one of {list(known)}",
            )
