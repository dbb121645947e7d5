"""Teach the embedded model a new shape: ``python -m benchmarks.shapes.fine_tune runs/arrow``.

``mm1 train sft`` learns arrows, a shape and a word that mm1-tiny has never met, from
pictures of the training split among others of what it knows. LoRA on mm1-tiny, then QLoRA
on its 4-bit copy; then what they answer about arrows, what became of the old tasks, and
whether the fused model says the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

import numpy as np  # noqa: E402

from benchmarks.shapes.arrows import arrow_cases, arrow_questions, arrow_scene  # noqa: E402
from benchmarks.shapes.cases import Case, part_cases  # noqa: E402
from benchmarks.shapes.draw import draw  # noqa: E402
from benchmarks.shapes.evaluate import Answerer, answerer, evaluate  # noqa: E402
from benchmarks.shapes.exchanges import ask  # noqa: E402
from benchmarks.shapes.scene import random_scene, split_rng  # noqa: E402
from mm1_mlx.bench import describe  # noqa: E402
from mm1_mlx.runtime import TINY  # noqa: E402

# Pictures with arrows, where asked about, and as many of what is known already.
PICTURES = 1600
QUESTIONS = 4
FLAGS = {
    "steps": 500, "batch-size": 16, "micro-batches": 2, "learning-rate": 2e-3,
    "warmup-steps": 20, "decay-steps": 400, "final-fraction": 0.05, "adapter-rank": 16,
    "seed": 0,
}  # fmt: skip
TARGETS = ("decoder", "vision")
OLD = ("scenes", "pairs", "reading")

Row = dict[str, Any]


def write_rows(folder: Path, pictures: int = PICTURES) -> Path:
    """The file of the rows to learn from, their pictures beside it."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(2 * pictures):
        rng = split_rng("train", 8_000_000_000 + i)
        if i % 2:
            scene = random_scene(rng)
            asked = [(x.question, x.answer) for x in ask(scene, rng, QUESTIONS)]
        else:
            scene = arrow_scene(rng)
            found = list(arrow_questions(scene, rng))
            rng.shuffle(found)  # type: ignore[arg-type]
            asked = [(text, answer) for _, text, answer, _ in found[:QUESTIONS]]
        draw(scene).save(folder / f"{i}.png")
        rows += [_row(f"{i}.png", question, answer) for question, answer in asked]
    order = np.random.default_rng(0).permutation(len(rows))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    return path


def _row(picture: str, question: str, answer: str) -> Row:
    said = [("human", f"<image>\n{question}"), ("gpt", answer)]
    turns = [{"from": role, "value": text} for role, text in said]
    return {"image": picture, "conversations": turns}


def mm1(*words: object) -> float:
    """Run the command; the seconds that it took."""
    command = [str(Path(sys.executable).with_name("mm1")), *map(str, words)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def train(model: Path, data: Path, run: Path) -> tuple[Path, float]:
    """The adapter that learned the rows, and the seconds of ``mm1 train sft``."""
    flags = [x for name, value in FLAGS.items() for x in (f"--{name}", value)]
    targets = [x for target in TARGETS for x in ("--adapter-targets", target)]
    seconds = mm1("train", "sft", model, run, "--data", data, *flags, *targets)
    return run / "adapter", seconds


def said(answer: Answerer, cases: Sequence[Case]) -> list[str]:
    """The answers to all the cases."""
    return list(chain.from_iterable(answer(list(some)) for some in _batches(cases)))


def _batches(cases: Sequence[Case], size: int = 16) -> Iterator[Sequence[Case]]:
    for start in range(0, len(cases), size):
        yield cases[start : start + size]


def figures(
    model: Path, adapter: Path | None, number: int
) -> tuple[dict[str, Any], list[str]]:
    """What is answered about arrows and of the old tasks, and the words about arrows."""
    new = list(arrow_cases(number))
    with ExitStack() as stack:
        answer = answerer(str(model), stack, [adapter] if adapter else [])
        rows = evaluate(answer, new)
        for part in OLD:
            rows |= evaluate(answer, part_cases(part, number, "validation"))
        return rows, said(answer, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs are kept; a new one")
    parser.add_argument("-n", type=int, default=500, help="pictures to measure on")
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    folder, number = arguments.folder, arguments.n
    data = write_rows(folder / "data")
    quantized = folder / "4bit"
    mm1("quantize", arguments.model, quantized, "--bits", "4")
    before, _ = figures(arguments.model, None, number)
    result: dict[str, Any] = {
        "what": "mm1 train sft, python -m benchmarks.shapes.fine_tune",
        "machine": describe(BLAS),
        "flags": FLAGS | {"adapter-targets": list(TARGETS)},
        "before": before,
    }
    for name, base in (("lora", arguments.model), ("qlora", quantized)):
        adapter, seconds = train(base, data, folder / name)
        rows, words = figures(base, adapter, number)
        result[name] = {"seconds": round(seconds, 1), "figures": rows}
        if name == "lora":
            mm1("fuse", base, folder / "fused", "--adapter", adapter)
            fused, fused_words = figures(folder / "fused", None, number)
            other = sum(a != b for a, b in zip(words, fused_words, strict=True))
            result["fused"] = {"other_answers": other, "figures": fused}
        print(json.dumps(result[name], indent=2), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
