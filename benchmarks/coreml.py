"""What a Core ML package costs: ``python -m benchmarks.coreml FILE.json [--full]``.

mm1-tiny's real weights in every precision and layout, and with ``--full`` those of MM1-3B's
encoder and connector (ViT-H/14 at 378 pixels, C-Abstractor; 650 M random weights). Each
package is written by ``mm1 export coreml`` in a process of its own, whose processor time
and largest memory are taken, and compared with the model on photographs in another one.
A row that is measured replaces the file's row of its name; the others stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from mm1_mlx.checkpoint import model_shapes  # noqa: E402
from mm1_mlx.config import MM1Config  # noqa: E402
from mm1_mlx.files import replace_json  # noqa: E402
from mm1_mlx.presets import PRESETS  # noqa: E402
from mm1_mlx.runtime import TINY  # noqa: E402
from mm1_mlx.shard import Deferred  # noqa: E402
from mm1_mlx.writer import CheckpointWriter  # noqa: E402

FULL = "mm1-3b"
WAYS: dict[str, list[str]] = {
    "fp16": [],
    "fp32": ["--precision", "fp32"],
    "int8": ["--precision", "int8"],
    "4bit": ["--precision", "4bit"],
    "fp16, ane": ["--ane"],
}
# Of the full size, where a row takes minutes.
FULL_WAYS = ("fp16", "fp16, ane", "int8", "4bit")


def random_encoder(out: Path, config: MM1Config, seed: int = 0) -> Path:
    """A folder of the config's encoder and connector with random weights, in float16."""
    from mm1_mlx.coreml.weights import encoder_of

    config = encoder_of(config)

    def values(name: str, shape: tuple[int, ...]) -> Iterator[mx.array]:
        number = np.random.default_rng([seed, *name.encode()])
        x = number.standard_normal(shape, np.float32)
        if len(shape) > 1:
            # Depthwise kernels see nine numbers, and positions add to what is there.
            fan_in = math.prod(shape[1:])
            x *= 0.1 if "embedding" in name and len(shape) == 2 else fan_in**-0.5
        else:
            x = x * 0.05 + _is_gain(name)
        yield mx.array(x.astype(np.float16))

    with CheckpointWriter(out, config, {"name": "random weights"}) as writer:
        for name, shape in model_shapes(config).items():
            made = lambda name=name, shape=shape: values(name, shape)  # noqa: E731
            writer.add(name, Deferred(shape, mx.float16, made))
    return out


def _is_gain(name: str) -> bool:
    """Whether a vector scales: the weight of a norm."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and "norm" in module


def measure(folder: Path, package: Path, options: list[str]) -> dict[str, Any]:
    """A package's bytes, and the seconds and bytes of memory that it took."""
    command = [
        Path(sys.executable).with_name("mm1"),
        *("export", "coreml", folder, "-o", package, "--no-check", "--overwrite"),
        *(*options, "--json"),
    ]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    made = json.loads(child.stdout.read())
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0
    return {
        "bytes": made["bytes"],
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.monotonic() - began, 1),
        # Linux counts in units of 1,024 bytes, macOS in bytes.
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def compare(folder: Path, package: Path, count: int) -> list[dict[str, Any]]:
    """The error of every stage on some photographs, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.coreml"]
    command += ["--photographs", str(count), "--compare", str(folder), str(package)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return list(json.loads(ran.stdout))


def _compare(folder: Path, package: Path, count: int) -> None:
    from PIL import Image
    from skimage import data

    from mm1_mlx.coreml.check import check
    from mm1_mlx.coreml.describe import Facts
    from mm1_mlx.coreml.interpreter import read_spec

    taken = (data.astronaut(), data.chelsea())[:count]
    photographs = [Image.fromarray(x) for x in taken]
    facts = Facts.read(dict(read_spec(package).description.metadata.userDefined))
    found = check(folder, package, facts, photographs)
    print(json.dumps([asdict(x) for stages in found.values() for x in stages]))


def row(folder: Path, place: Path, way: str, photographs: int = 2) -> dict[str, Any]:
    """All that is said of a way to export a model, compared on some photographs."""
    package = place / "Encoder.mlpackage"
    cost = measure(folder, package, WAYS[way])
    stages = compare(folder, package, photographs)
    return {
        **cost,
        "photographs": photographs,
        "l2": stages[-1]["l2"],
        "largest": stages[-1]["largest"],
        "stages": stages,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| model, package | size | l2 | largest | time | processor | peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in figures["rows"].items():
        lines.append(
            f"| {name} | {found['bytes'] / 1e6:,.1f} MB | {found['l2']:.1e} | "
            f"{found['largest']:.1e} | {found['seconds']:.0f} s | "
            f"{found['processor_seconds']:.0f} s | "
            f"{found['peak_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="?")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", choices=WAYS, help="one way alone")
    parser.add_argument("--photographs", type=int, choices=(1, 2), default=2)
    parser.add_argument("--model", type=Path, help="a full one that is kept, or made")
    parser.add_argument("--compare", type=Path, nargs=2)
    given = parser.parse_args()
    if given.compare:
        _compare(*given.compare, given.photographs)
        return
    from mm1_mlx.bench import describe

    figures: dict[str, Any] = {"rows": {}}
    if given.json.is_file():
        figures = json.loads(given.json.read_text())
    with tempfile.TemporaryDirectory(dir=given.json.parent) as name:
        place, folder, model = Path(name), TINY, "mm1-tiny"
        if given.full:
            config = PRESETS[FULL]
            folder = given.model or place / "model"
            if not folder.exists():
                random_encoder(folder, replace(config, decoder=None))
            model = FULL
        for way in [given.only] if given.only else FULL_WAYS if given.full else WAYS:
            figures["rows"][f"{model}, {way}"] = row(
                folder, place, way, given.photographs
            )
            figures["machine"] = describe()
            replace_json(given.json, figures)


if __name__ == "__main__":
    main()
