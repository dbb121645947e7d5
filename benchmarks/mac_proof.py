"""Everything that only a Mac can say, in one file: ``make mac-proof``.

The kernels' tests on Metal, ``mm1 bench`` on the embedded model and on the largest preset
that fits, which attention runs and what it gains behind up to 32,768 positions
(``depths.py``), what ``mm1 doctor`` finds, how near Core ML's image tokens are to the
model's (``coreml_mac.py``), and whether ``mm1 train`` learns on the GPU:
``benchmarks/results/<chip>.json``. A step that fails is written down, and the exit status
is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# The largest first; 4 bits.
PRESETS = ("mm1-7b", "mm1-3b", "mm1-1.2b")
# Of the presets the one whose tokens wait longest for keys, as against weights.
SWEPT = "mm1-1.2b"
# How the embedded model is trained: its adapters, those of its 4-bit copy, and all of it.
TRAINED: dict[str, tuple[str, ...]] = {
    "lora": (),
    "qlora": (),
    "float16": ("--full", "--precision", "float16"),
}
# Steps of each, and how many of them at either end are compared.
STEPS, ENDS = 24, 4
# Drawn pictures to learn from, each answered as the model does not answer.
ROWS = 16
# A prompt, an answer and pictures as mm1 bench has them, and what else is open.
ROOM = 2 << 30

# Runs a command: its exit status, stdout, and the end of stderr.
Run = Callable[[Sequence[str]], tuple[int, str, str]]


def run(command: Sequence[str]) -> tuple[int, str, str]:
    """Run a command in the checkout, showing what it tells on stderr."""
    last = ""
    with tempfile.TemporaryFile("w+") as out:
        with subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        out.seek(0)
        return process.returncode, out.read(), last


def metal_tests(run: Run, python: str) -> dict[str, Any]:
    """What became of the tests that need Metal."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [python, "-m", "pytest", "-m", "metal", f"--junitxml={report}"]
        status, out, err = run(command)
        if not report.is_file():
            return {"error": err or out.strip().rpartition("\n")[2], "status": status}
        cases = list(ET.parse(report).iter("testcase"))
    ended: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for end, names in ended.items():
            if case.find(end) is not None:
                names.append(f"{case.get('classname')}::{case.get('name')}")
    failed = ended["failure"] + ended["error"]
    found: dict[str, Any] = {
        "run": len(cases) - len(ended["skipped"]),
        "skipped": len(ended["skipped"]),
        "failed": failed,
    }
    if failed or status or not found["run"]:
        found["error"] = f"{len(failed)} of {found['run']} tests failed"
    return found


def asked(run: Run, *command: str) -> Any:
    """The JSON that ``mm1`` answers with, or the error it gives instead."""
    status, out, err = run(command)
    return json.loads(out) if status == 0 else {"error": err}


def draw_rows(folder: Path) -> Path:
    """A file of questions about drawn pictures, which lie beside it."""
    from mm1_mlx.quantize.shapes import case

    rows = []
    for seed in range(ROWS):
        drawn, name = case(seed), f"{seed}.png"
        drawn.picture.save(folder / name)
        answer = f"the answer is {drawn.answer}"
        rows.append({"image": name, "question": drawn.question, "answer": answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(run: Run, mm1: str) -> dict[str, Any]:
    """What the embedded model learns, in a few steps of each way."""
    from mm1_mlx.runtime import TINY

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, packed = draw_rows(folder), folder / "packed"
        status, _, err = run(
            [mm1, "quantize", str(TINY), str(packed), "--bits", "4", "--no-measure"]
        )
        found: dict[str, Any] = {"qlora": {"error": err}} if status else {}
        for way, flags in TRAINED.items():
            if way in found:
                continue
            model, out = packed if way == "qlora" else TINY, folder / way
            status, _, err = run([
                *(mm1, "train", "sft", str(model), str(out), "--data", str(rows)),
                *("--steps", str(STEPS), "--log-every", "1", "--warmup-steps", "0"),
                *("--learning-rate", "1e-3", *flags),
            ])  # fmt: skip
            found[way] = {"error": err} if status else learned(out)
    return found


def learned(out: Path) -> dict[str, Any]:
    """What the log of a run says: its losses must be numbers, and fall."""
    from mm1_mlx.train.record import read_log

    lines = read_log(out)
    losses = [line["loss"] for line in lines]
    begin, end = statistics.fmean(losses[:ENDS]), statistics.fmean(losses[-ENDS:])
    config = json.loads((out / "run.json").read_text())["config"]
    found: dict[str, Any] = {
        "precision": config["precision"],
        "steps": len(lines),
        "loss": [begin, end],
        "tokens_per_second": statistics.median(x["tokens_per_second"] for x in lines),
        "peak_bytes": max(line["peak_bytes"] for line in lines),
    }
    if not (all(map(math.isfinite, losses)) and end < begin):
        found["error"] = f"the loss went from {begin:.4g} to {end:.4g}"
    return found


def largest_preset(room: float) -> str | None:
    """The largest preset whose 4-bit weights have room in so many bytes."""
    from mm1_mlx import presets
    from mm1_mlx.budget import weight_bytes
    from mm1_mlx.recipe import find_recipe, plan

    for name in PRESETS:
        ways = plan(find_recipe("4bit"), presets.PRESETS[name]).packed
        if sum(weight_bytes(presets.PRESETS[name], ways).values()) + ROOM <= room:
            return name
    return None


def assemble(
    run: Run, machine: dict[str, Any], room: float, python: str = sys.executable
) -> dict[str, Any]:
    """Everything that is to be proven.

    Args:
        run: runs a command.
        machine: from ``mm1_mlx.bench.describe``.
        room: bytes that a model may take.
        python: of the environment that holds the project; ``mm1`` lies beside it.
    """
    mm1 = str(Path(python).with_name("mm1"))
    preset = largest_preset(room)
    proof: dict[str, Any] = {
        "machine": machine,
        "tests": metal_tests(run, python),
        "bench": {"mm1-tiny": asked(run, mm1, "bench", "--json")},
        "kernels": asked(run, mm1, "bench", "--kernels", "--json"),
        "doctor": asked(run, mm1, "doctor", "--json"),
        "train": trained(run, mm1),
        "core_ml": asked(run, python, "-m", "benchmarks.coreml_mac"),
    }
    if preset:
        command = (mm1, "bench", "--preset", preset, "-d", "2048", "--json")
        proof["bench"][preset] = asked(run, *command)
        swept = (python, "-m", "benchmarks.depths", "--preset", SWEPT)
        proof["depths"] = asked(run, *swept)
    return proof


def failures(proof: Any) -> list[str]:
    """Every error in it."""
    if isinstance(proof, list):
        return [error for value in proof for error in failures(value)]
    if not isinstance(proof, dict):
        return []
    own = [proof["error"]] if "error" in proof else []
    return own + [error for value in proof.values() for error in failures(value)]


def file_name(machine: dict[str, Any]) -> str:
    """The name of a chip's file: its own, and how many GPU cores it has."""
    words = [machine["chip"].removeprefix("Apple "), machine["gpu_cores"]]
    name = " ".join(str(word) for word in words if word)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def main() -> int:
    """Measure, and write the file; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the file")
    arguments = parser.parse_args()
    import mlx.core as mx

    if not mx.metal.is_available():
        print("error: this machine has no Metal; run it on a Mac", file=sys.stderr)
        return 1
    from mm1_mlx.bench import describe
    from mm1_mlx.room import allowed

    machine = describe()
    proof = assemble(run, machine, allowed() or 0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / file_name(machine)
    path.write_text(json.dumps(proof, indent=2, ensure_ascii=False) + "\n")
    print(path)
    for error in failures(proof):
        print(f"error: {error}", file=sys.stderr)
    return 1 if failures(proof) else 0


if __name__ == "__main__":
    raise SystemExit(main())
