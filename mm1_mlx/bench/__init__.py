"""What a model takes on this machine, and how near that is to what the machine can do."""

from mm1_mlx.bench.machine import describe
from mm1_mlx.bench.rows import Plan, Row, check, measure
from mm1_mlx.bench.synthetic import open_synthetic
from mm1_mlx.device import measure_speed, nominal

__all__ = [
    "Plan",
    "Row",
    "check",
    "describe",
    "measure",
    "measure_speed",
    "nominal",
    "open_synthetic",
]
