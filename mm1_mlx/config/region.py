"""The sampler that turns a region of a picture into one continuous token."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mm1_mlx.config.limits import MAX_HIDDEN_SIZE, MAX_REGION_POINTS
from mm1_mlx.section import Section, check_sizes, require


@dataclass(frozen=True, kw_only=True)
class RegionConfig(Section):
    """Ferret's geometry-aware region sampler (arXiv 2310.07704, section 3.2)."""

    # Widths of the encoder's features and of the decoder.
    input_size: int
    output_size: int
    # Points drawn from the region, and how many of them every stage keeps.
    num_points: int = 512
    num_sub_points: tuple[int, ...] = (128, 32)
    num_neighbours: int = 24
    # Whether features are read at the transposed place, row = x and column = y. Ferret's
    # code does so by accident and its weights were trained with it.
    transposed: bool = True

    def __post_init__(self) -> None:
        check_sizes(self, MAX_HIDDEN_SIZE, "input_size", "output_size")
        check_sizes(self, MAX_REGION_POINTS, "num_points")
        sizes = (self.num_points, *self.num_sub_points)
        require(
            len(sizes) > 1 and all(a >= b >= 1 for a, b in pairwise(sizes)),
            f"RegionConfig.num_sub_points: {self.num_sub_points} does not fall from "
            f"num_points {self.num_points}",
        )
        # A stage chooses neighbours among the points of the one before.
        check_sizes(self, sizes[-2], "num_neighbours")
