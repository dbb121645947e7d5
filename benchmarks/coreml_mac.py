"""What Core ML makes of mm1-tiny's packages: ``python -m benchmarks.coreml_mac``, on a Mac.

Every precision and layout, on the compute units that it was laid out for and on the CPU:
how far the image tokens are from the model's and from those of the interpreter that checks
packages elsewhere, and the seconds a tile takes.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from mm1_mlx.coreml.backend import (  # noqa: E402
    Open,
    open_core_ml,
    open_interpreter,
)
from mm1_mlx.coreml.check import tiles_of  # noqa: E402
from mm1_mlx.coreml.package import export  # noqa: E402
from mm1_mlx.coreml.program import Plan  # noqa: E402
from mm1_mlx.coreml.tiles import as_input  # noqa: E402
from mm1_mlx.coreml.weights import Weights  # noqa: E402
from mm1_mlx.runtime import TINY  # noqa: E402

PLANS = {
    "fp16": Plan(),
    "fp32": Plan("fp32"),
    "int8": Plan("int8"),
    "4bit": Plan("4bit"),
    "fp16, ane": Plan(ane=True),
}
PICTURES = [TINY / "red-star.png", TINY / "four-shapes.png"]
# Times that a tile is seen, after the first.
ROUNDS = 20


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """The length of a difference over that of what was expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def row(name: str, units: str | None, opened: Open, rounds: int) -> dict[str, Any]:
    """What a package is off, and takes, on some compute units; its own if None."""
    weights = Weights(TINY)
    image = weights.config.image
    assert image is not None
    pixels = tiles_of(weights, PICTURES, image.size)
    model = weights.model()
    expected = np.array(model.connector(model.vision(mx.array(pixels))))
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "E.mlpackage"
        facts, _ = export(TINY, package, PLANS[name])
        tiles = as_input(pixels, image, facts.input)
        check = open_interpreter(package, facts, image.size)
        run_on = replace(facts, compute_units=units) if units else facts
        predict = opened(package, run_on, image.size)
        found = np.concatenate([predict(tile[None]) for tile in tiles])
        checked = np.concatenate([check(tile[None]) for tile in tiles])
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            predict(tiles[:1])
            seconds.append(time.perf_counter() - began)
    return {
        "package": name,
        "compute_units": run_on.compute_units,
        "l2_from_model": off(found, expected),
        "l2_from_interpreter": off(found, checked),
        "seconds": statistics.median(seconds),
    }


def rows(opened: Open = open_core_ml, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Every package, on its own compute units and on the CPU."""
    return [
        row(name, units, opened, rounds)
        for name in PLANS
        for units in (None, "CPU_ONLY")
    ]


if __name__ == "__main__":
    print(json.dumps({"rows": rows()}))
