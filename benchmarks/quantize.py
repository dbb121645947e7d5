"""What packing costs mm1-tiny: ``python -m benchmarks.quantize --json FILE``.

Every recipe, rounded and learned, on drawn calibration pictures that ``mm1 quantize`` has
by itself: bytes, divergence from the unpacked model on held-out prompts, and the accuracy
on held-out questions of ``benchmarks/shapes``, the same ones for all. Beside it the
divergence alone of a larger model whose random weights have the outliers of trained ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402

from benchmarks.shapes.cases import Case, normalise, scene_cases  # noqa: E402
from benchmarks.shapes.questions import KINDS  # noqa: E402
from mm1_mlx.bench import describe  # noqa: E402
from mm1_mlx.checkpoint import load_config, read_manifest  # noqa: E402
from mm1_mlx.config import MM1Config  # noqa: E402
from mm1_mlx.eval.intervals import wilson  # noqa: E402
from mm1_mlx.files import sha256  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.quantize import RECIPES, Recipe, parse_way, quantize  # noqa: E402
from mm1_mlx.recipe import LAYERS  # noqa: E402
from mm1_mlx.runtime import TINY, generate, load  # noqa: E402
from mm1_mlx.writer import CheckpointWriter  # noqa: E402


def uniform(bits: str) -> Recipe:
    """The decoder's layers with so many bits, the head with 6."""
    return RECIPES["4bit"].with_ways(dict.fromkeys(LAYERS, parse_way(bits, "bits")))


CASES: dict[str, tuple[Recipe, bool]] = {
    "8bit": (RECIPES["8bit"], False),
    "4bit": (RECIPES["4bit"], False),
    "4bit, learned": (RECIPES["4bit"], True),
    "mxfp4": (RECIPES["mxfp4"], False),
    "nvfp4": (RECIPES["nvfp4"], False),
    "3 bits": (uniform("3"), False),
    "3 bits, learned": (uniform("3"), True),
    "mixed_2_6": (RECIPES["mixed_2_6"], False),
    "mixed_2_6, learned": (RECIPES["mixed_2_6"], True),
}
ON_LARGER = ("8bit", "4bit", "4bit, learned", "3 bits", "3 bits, learned")


def larger(out: Path, seed: int = 0) -> Path:
    """A model of 15 M parameters with random weights, tiny's tokenizer and pictures.

    Weights are heavy-tailed, and a few channels of every layer much larger: what makes
    trained weights hard to round. Its head is scaled so that it is sure of something.
    """
    values = load_config(TINY).to_dict()
    values["decoder"] |= {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": False,
    }
    values["connector"]["output_size"] = 384
    config = MM1Config.from_dict(values)
    mx.random.seed(seed)
    with CheckpointWriter(out, config, {"random": seed}) as writer:
        for name, tensor in MM1(config).tensors().items():
            writer.add(name, structured(name, tensor))
        for name in read_manifest(TINY)["files"]:
            if name.startswith("tokenizer"):
                writer.add_file(name, TINY / name)
    return out


def structured(name: str, tensor: mx.array) -> mx.array:
    """Student's t with 5 degrees of freedom, and every 64th input channel 4 times it.

    What a layer adds to the states is halved, as it is small in a trained model: else
    every rounding error grows from layer to layer.
    """
    if tensor.ndim != 2 or not name.startswith("decoder."):
        return tensor
    rows, width = tensor.shape
    chi = mx.random.normal((5, rows, width)).square().mean(axis=0)
    noise = mx.random.normal((rows, width)) / mx.sqrt(chi)
    outlier = mx.where(mx.arange(width) % 64 == 7, 4.0, 1.0)
    size = {"lm_head": 1.5, "o_proj": 0.5, "down_proj": 0.5, "embed_tokens": width**0.5}
    scale = size.get(name.split(".")[-2], 1.0) * width**-0.5
    return noise * outlier * scale


def answers(model: Path, cases: list[Case]) -> list[str]:
    """What a model says to every question."""
    with load(model) as runtime:
        return [
            normalise(generate(runtime, c.question, c.pictures, max_tokens=64).text)
            for c in cases
        ]


def accuracy(said: list[str], cases: list[Case], unpacked: list[str]) -> dict[str, Any]:
    """Share of right answers, and how many are others than the unpacked model's."""
    right = sum(a == normalise(c.expected) for a, c in zip(said, cases, strict=True))
    low, high = wilson(right, len(cases))
    return {
        "right": right,
        "n": len(cases),
        "accuracy": round(right / len(cases), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "changed_answers": sum(a != b for a, b in zip(said, unpacked, strict=True)),
    }


def packed(
    model: Path, out: Path, name: str, count: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Bytes and divergence of one case."""
    recipe, learned = CASES[name]
    tell(name)
    report = quantize(model, out, recipe, learned=learned, count=count, overwrite=True)
    rows = report.rows.values()
    return {
        "bytes_before": sum(row.before for row in rows),
        "bytes_after": sum(row.after for row in rows),
        "cost": report.cost and report.cost.to_dict(),
        "cost_of_rounding": report.rounded and report.rounded.to_dict(),
    }


def table(results: dict[str, Any]) -> str:
    """The README's rows."""
    tiny = results["mm1-tiny"]
    published = next(iter(tiny.values()))
    asked = published["n"]
    before = tiny["8bit"]["bytes_before"] / 1e6
    lines = [
        "| mm1-tiny | MB | divergence, mean | 99th percentile | same likeliest token | "
        f"{asked:,} held-out questions |",
        "|---|--:|--:|--:|--:|--:|",
        f"| float16, as published | {before:.2f} | | | | {published['accuracy']:.2%} |",
    ]
    for name in CASES:
        row = tiny[name]
        cost = row["cost"]
        lines.append(
            f"| {name} | {row['bytes_after'] / 1e6:.2f} | {cost['kl_mean']:.4f} | "
            f"{cost['kl_p99']:.3f} | {cost['top1']:.1%} | {row['accuracy']:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=2000, help="held-out questions")
    parser.add_argument("--count", type=int, default=128, help="calibration prompts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    mx.set_default_device(mx.cpu)
    asked = (case for case in scene_cases(arguments.n) if case.kind in KINDS)
    cases = list(itertools.islice(asked, arguments.n))
    folder = Path(tempfile.mkdtemp())
    tell = print
    unpacked = answers(TINY, cases)
    tiny = {"float32": accuracy(unpacked, cases, unpacked)}
    for i, name in enumerate(CASES):
        figures = packed(TINY, folder / f"tiny{i}", name, arguments.count, tell)
        said = answers(folder / f"tiny{i}", cases)
        tiny[name] = figures | accuracy(said, cases, unpacked)
        tell(json.dumps(tiny[name]))
    source = larger(folder / "larger")
    random = {}
    for name in ON_LARGER:
        random[name] = packed(source, folder / "packed", name, arguments.count, tell)
        tell(json.dumps(random[name]))
    shutil.rmtree(folder)
    figures = {
        "what": "mm1_mlx.quantize, python -m benchmarks.quantize",
        "machine": describe(BLAS),
        "model": sha256(TINY / "model.safetensors"),
        "mm1-tiny": tiny,
        "random weights with outliers, 15 M": random,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
