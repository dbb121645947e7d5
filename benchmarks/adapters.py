"""What adapters cost, and what fusing loses: ``python -m benchmarks.adapters --json FILE``.

An adapter of mm1-tiny is trained by ``mm1 train sft`` on a task that the model gets wrong:
every colour is called by the next one's name. It is then fused into mm1-tiny and into its
4-bit copy, in every precision, and held-out questions of the task are asked. Beside it,
what a token costs with matrices beside the layers and with them in the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

import mlx.core as mx  # noqa: E402

from benchmarks.quantize import larger, uniform  # noqa: E402
from mm1_mlx.adapters import (  # noqa: E402
    Adapter,
    AdapterConfig,
    Adapters,
    attach,
    base_of,
    load_adapted,
)
from mm1_mlx.adapters import load as load_adapter  # noqa: E402
from mm1_mlx.bench import describe  # noqa: E402
from mm1_mlx.checkpoint import load_model  # noqa: E402
from mm1_mlx.files import sha256  # noqa: E402
from mm1_mlx.fuse import Report, fuse  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.quantize import RECIPES, quantize  # noqa: E402
from mm1_mlx.quantize.shapes import COLOURS, case, wilson  # noqa: E402
from mm1_mlx.runtime import TINY, generate, load  # noqa: E402

TRAINED, MEASURED, ASKED = 800, 64, 300
STEPS, BATCH, LEARNING_RATE = 150, 16, 0.002
PREFILL, DECODED, TURNS = 200, 50, 15

# How the fused weights are kept, by what the table calls it.
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": mx.float32},
    "float16 (as stored)": {},
    "bfloat16": {"dtype": mx.bfloat16},
    "8 bits": {"recipe": RECIPES["8bit"]},
    "4 bits": {"recipe": RECIPES["4bit"]},
    "3 bits": {"recipe": uniform("3")},
    "2 bits": {"recipe": uniform("2")},
}
Question = dict[str, Any]


def draw_task(folder: Path, count: int, seed: int) -> list[Question]:
    """Questions of the task: their pictures, as files, and answers."""
    folder.mkdir()
    questions = []
    for i in range(count):
        drawn = case(seed + i)
        answer = drawn.answer
        if answer in COLOURS:
            answer = COLOURS[(COLOURS.index(answer) + 1) % len(COLOURS)]
        drawn.picture.save(folder / f"{i}.png")
        picture = str(folder / f"{i}.png")
        questions.append(
            {"prompt": drawn.question, "images": [picture], "answer": answer}
        )
    return questions


def train(folder: Path) -> Path:
    """The folder of an adapter that has learned the task."""
    rows = [
        {
            "image": Path(x["images"][0]).name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{x['prompt']}"},
                {"from": "gpt", "value": x["answer"]},
            ],
        }
        for x in draw_task(folder / "train", TRAINED, 50_000)
    ]
    data = folder / "train" / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = {
        "data": data, "steps": STEPS, "batch-size": BATCH, "micro-batches": 1,
        "learning-rate": LEARNING_RATE,
    }  # fmt: skip
    flags = [str(x) for k, value in options.items() for x in (f"--{k}", value)]
    mm1 = Path(sys.executable).with_name("mm1")
    subprocess.run([mm1, "train", "sft", TINY, folder / "run", *flags], check=True)
    return folder / "run" / "adapter"


def accuracy(
    model: Path, questions: Sequence[Question], adapters: Sequence[Path] = ()
) -> dict[str, Any]:
    """The share of questions that are answered right, word for word."""
    with load(model, adapters=adapters) as runtime:
        right = sum(
            generate(runtime, x["prompt"], x["images"], max_tokens=8).text.strip()
            == x["answer"]
            for x in questions
        )
    low, high = wilson(right, len(questions))
    return {
        "right": right,
        "n": len(questions),
        "interval_95": [round(low, 4), round(high, 4)],
    }


def row(
    base: str, way: str, report: Report, answered: dict[str, Any]
) -> dict[str, Any]:
    """What fusing in one way has cost."""
    found = report.measured
    assert found is not None
    return {
        "base": base,
        "kept": way,
        "bytes": report.after,
        "effect": found.effect.kl_mean,
        "cost": found.cost.kl_mean,
        "lost": found.lost,
        "largest_difference": found.largest,
        "mean_difference": found.mean,
        "largest_logit": found.scale,
        "top1": found.cost.top1,
        **answered,
    }


def speeds(base: Path, adapter: Adapter) -> dict[str, dict[str, float]]:
    """Milliseconds of a prefill and of a token decoded, with the adapter and without.

    Of the fastest of interleaved turns: what else computes only makes them slower.
    """
    given = Adapters(((adapter, 1.0),))
    models = {
        "without": load_model(base, mx.float32),
        "as loaded": load_adapted(base, given, mx.float32),
        "beside": load_adapted(base, given, mx.float32, beside=True),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(TURNS + 1):
        for name, model in models.items():
            taken = _turn(model)
            if turn:  # The first warms up.
                times[name].append(taken)
    return {
        name: {
            "prefill_ms": round(1e3 * min(x for x, _ in pairs), 3),
            "token_ms": round(1e3 * min(y for _, y in pairs), 3),
        }
        for name, pairs in times.items()
    }


def _turn(model: MM1) -> tuple[float, float]:
    cache = model.make_cache()
    start = time.perf_counter()
    mx.eval(model(mx.arange(3, 3 + PREFILL)[None], cache=cache))
    middle = time.perf_counter()
    for _ in range(DECODED):
        mx.eval(model(mx.array([[7]]), cache=cache))
    return middle - start, (time.perf_counter() - middle) / DECODED


def drawn_adapter(base: Path) -> Adapter:
    """An adapter of rank 8 whose matrices are drawn: for times alone."""
    model = load_model(base, mx.float32)
    model.freeze()
    attach(model, config := AdapterConfig())
    return Adapter.of(model, config, base_of(base))


def table(results: dict[str, Any]) -> str:
    """The README's rows."""
    lines = [
        "| fused into | kept in | MB | logits, mean difference | divergence | lost | "
        f"{results['asked']} questions |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for x in results["rows"]:
        lines.append(
            f"| {x['base']} | {x['kept']} | {x['bytes'] / 1e6:.2f} | "
            f"{x['mean_difference']:.1e} | {max(x['cost'], 0):.1e} | {x['lost']:.2%} | "
            f"{x['right'] / x['n']:.1%} |"
        )
    return "\n".join(lines)


def run(folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train, fuse and measure."""
    start = time.perf_counter()
    adapter = train(folder)
    seconds = time.perf_counter() - start
    packed = folder / "packed"
    quantize(TINY, packed, RECIPES["4bit"], measured=False)
    prompts = draw_task(folder / "measured", MEASURED, 80_000)
    asked = draw_task(folder / "asked", ASKED, 90_000)
    calibration = folder / "prompts.jsonl"
    calibration.write_text(
        "\n".join(
            json.dumps(
                {
                    "prompt": x["prompt"],
                    "images": [f"measured/{Path(x['images'][0]).name}"],
                }
            )
            for x in prompts
        )
    )
    bases = {"mm1-tiny": TINY, "its 4-bit copy": packed}
    answered = {
        name: {
            "without": accuracy(path, asked),
            "with": accuracy(path, asked, [adapter]),
        }
        for name, path in bases.items()
    }
    given, rows = Adapters.load([adapter]), []
    for base, path in bases.items():
        for way, options in WAYS.items():
            tell(f"{base}, {way}")
            report = fuse(
                path, folder / "out", given, calibration=calibration, count=MEASURED,
                allow_loss=True, overwrite=True, **options,
            )  # fmt: skip
            rows.append(row(base, way, report, accuracy(report.out, asked)))
    tell("times")
    big = larger(folder / "larger")
    quantize(big, folder / "larger-4bit", RECIPES["4bit"], measured=False)
    drawn = drawn_adapter(big)
    loaded = load_adapter(adapter)
    return {
        "asked": ASKED,
        "trained": {
            "rows": TRAINED, "steps": STEPS, "batch_size": BATCH,
            "learning_rate": LEARNING_RATE, "seconds": round(seconds, 1),
        },
        "adapter_bytes": {
            "low_rank": sum(x.nbytes for k, x in loaded.tensors.items() if "lora_" in k),
            "in_full": sum(loaded.tensors[k].nbytes for k in loaded.full),
        },
        "answered": answered,
        "rows": rows,
        "times": {
            "mm1-tiny": speeds(TINY, drawn_adapter(TINY)),
            "15 M parameters": speeds(big, drawn),
            "15 M parameters, 4 bits": speeds(folder / "larger-4bit", drawn),
        },
    }  # fmt: skip


def main() -> None:
    """Measure, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    # Everything here is about two bases of one adapter.
    logging.getLogger("mm1_mlx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        results = run(Path(name), lambda line: print(line, file=sys.stderr))
    model = sha256(TINY / "model.safetensors")
    results = {"machine": describe(BLAS), "model": model, **results}
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
