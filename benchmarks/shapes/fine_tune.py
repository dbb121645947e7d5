"""Teach the embedded model a new shape: ``python -m benchmarks.shapes.fine_tune runs/arrow``.

``mm1 train sft`` learns arrows, a shape that mm1-tiny has never seen or named, from pictures
of the training split among others of what it knows. LoRA on mm1-tiny, then QLoRA on its
4-bit copy; then what they answer about arrows, what became of the old tasks, and whether the
fused model says the same. Held to what was set out before: ``verdict``. A start in the same
folder goes on with what is lacking.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.shapes.arrows import arrow_cases, arrow_questions, arrow_scene  # noqa: E402
from benchmarks.shapes.cases import PARTS, Case, part_cases  # noqa: E402
from benchmarks.shapes.draw import draw  # noqa: E402
from benchmarks.shapes.evaluate import answerer, counted, evaluate  # noqa: E402
from benchmarks.shapes.ring import run_ring  # noqa: E402
from benchmarks.shapes.scene import Scene, split_rng  # noqa: E402
from mm1_mlx.bench import describe  # noqa: E402
from mm1_mlx.files import sha256  # noqa: E402
from mm1_mlx.runtime import TINY  # noqa: E402

RESULTS = Path(__file__).with_name("fine_tune.json")
# Pictures that are asked about arrows: about as many as are looked at. With 2,400, each seen
# twice, 90% of counts were right of those and 80% of others.
PICTURES = 8000
# How many arrows they hold, each as likely. More than are asked about later: of two, which
# are a sixth of the pictures there, 4 in 10 were counted wrong.
TAUGHT_ARROWS = (0, 1, 1, 2, 2, 3)
# The share that is asked for a caption at once. Captions teach each shape of a picture:
# with fewer, and more counts, everything was answered worse.
CAPTIONED = 0.4
# The share of the others whose first question is how many arrows there are.
COUNTED = 0.75
# The share of these that is asked for a caption in the end.
CAPTIONED_LAST = 0.5
# Of what is known, how many rows of each part stand beside every hundred. With 25 of
# reading, small writing lost 8 points.
REHEARSED = {"scenes": 65, "style": 10, "pairs": 10, "reading": 50, "words": 2}
# What is asked of it before anything but captions: with as much of each kind, "exists" lost
# 3 points, captions 10.
SOON_LOST = ("count", "exists")
FLAGS = {
    "steps": 1185, "batch-size": 8, "micro-batches": 2, "learning-rate": 2e-3,
    "connector-learning-rate": 1e-3, "warmup-steps": 20, "decay-steps": 1050,
    "final-fraction": 0.05, "adapter-rank": 32, "seed": 0,
}  # fmt: skip
# One for each micro-batch, and for each core: threads of one process wait for one another.
PROCESSES = 2
TARGETS = ("decoder", "vision")
# How much of what was learned is added. All of it calls one in twenty held-out shapes an
# arrow, another pair that the model has never seen; between the weights before and after
# new and old are both known, as WiSE-FT found (arXiv 2109.01903).
SCALE = 0.93
# How many cases of each kind are passed over: the share was chosen on them, and what is
# learned was changed after they had been asked.
CHOSEN_ON = 1600
# Fewer there are, and nothing was chosen on them: none is passed over.
FEW = "plain"
# A row with nine pictures is many times as long as one with one.
SWITCHES = ("packing",)
# Kinds whose questions are another kind's, too.
TWICE = (
    *("all questions", "count to 4", "caption, whole and in order"),
    "arrows, caption, whole and in order",
)
# What the fused model's weights are kept in: as they are computed with, and as stored.
FUSED = ("float32", "float16")
# What was set out: right about arrows, seconds, points that the old tasks may lose
# together, and those between LoRA and QLoRA of either.
RIGHT, SECONDS, LOST, APART = 0.95, 600, 0.02, 0.02

# What is asked besides the old parts.
NEW = "arrows"
Row = dict[str, Any]
# A question and its answer.
Asked = tuple[str, str]
Figures = dict[str, dict[str, Any]]


def write_rows(folder: Path, pictures: int) -> Path:
    """The file of the rows to learn from, their pictures beside it."""
    folder.mkdir(parents=True)
    rows = [*_arrow_rows(folder, pictures), *_known_rows(folder, pictures)]
    order = np.random.default_rng(0).permutation(len(rows))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    return path


def _arrow_rows(folder: Path, pictures: int) -> Iterator[Row]:
    """A conversation about every picture."""
    for i in range(pictures):
        rng = split_rng("train", 8_000_000_000 + i)
        scene = arrow_scene(rng, arrows=TAUGHT_ARROWS)
        yield _row(folder, f"arrow{i}", [draw(scene)], _untold(scene, rng))


def _untold(scene: Scene, rng: np.random.Generator) -> list[Asked]:
    """What is asked about a picture, first what is hard to see: nothing has told it yet."""
    found = {
        kind: (text, answer) for kind, text, answer, _ in arrow_questions(scene, rng)
    }
    caption = found.pop("caption", None)
    kinds = [str(kind) for kind in rng.permutation(list(found))]
    if caption and rng.random() < CAPTIONED:
        return [caption, found[kinds[0]]]
    if rng.random() < COUNTED:
        kinds.sort(key=lambda kind: kind != "count")
    asked = [found[kind] for kind in kinds]
    if caption and rng.random() < CAPTIONED_LAST:
        return [*asked[:2], caption]
    return asked


def _known_rows(folder: Path, pictures: int) -> Iterator[Row]:
    """What the model can do already, of the training split."""
    rng = np.random.default_rng(1)
    for part, share in REHEARSED.items():
        wanted = pictures * share // 100
        # Half of the words behind four examples, half behind eight.
        cases = part_cases(part, wanted // 2 if part == "words" else wanted, "train")
        groups = (
            list(some) for _, some in groupby(cases, key=lambda c: id(c.pictures))
        )
        for i, some in enumerate(islice(groups, wanted)):
            shots = [(shown, some[0].question, told) for shown, told in some[0].shots]
            name, shown = f"{part}{i}", some[0].pictures
            yield _row(folder, name, shown, _rehearsed(some, rng), shots)


def _rehearsed(cases: Sequence[Case], rng: np.random.Generator) -> list[Asked]:
    """What is asked about a picture: for a caption and two things, or for four things."""
    found = {
        kind: [(case.question, case.expected) for case in some]
        for kind, some in groupby(sorted(cases, key=_kind), key=_kind)
        if kind not in TWICE
    }
    caption = found.pop("caption", [])
    lost = [asked for kind in SOON_LOST for asked in found.pop(kind, [])]
    rest = [asked for some in found.values() for asked in some]
    lost, rest = _shuffled(lost, rng), _shuffled(rest, rng)
    if caption and rng.random() < CAPTIONED:
        return [*caption, *lost[:1], *rest[:1]]
    return [*lost[:2], *rest[:2]] or caption


def _kind(case: Case) -> str:
    return case.kind


def _shuffled(asked: Sequence[Asked], rng: np.random.Generator) -> list[Asked]:
    return [asked[i] for i in rng.permutation(len(asked))]


def _row(
    folder: Path,
    name: str,
    pictures: Sequence[Image.Image],
    asked: Sequence[Asked],
    shots: Sequence[tuple[Image.Image, str, str]] = (),
) -> Row:
    """A conversation behind examples, of whose answers nothing is learned."""
    messages: list[Row] = []
    for _, question, answer in shots:
        told = _turn("assistant", answer) | {"weight": 0}
        messages += [_turn("user", f"<image>\n{question}"), told]
    images = "<image>\n" * len(pictures)
    for question, answer in asked:
        messages += [_turn("user", images + question), _turn("assistant", answer)]
        images = ""
    shown = [*(picture for picture, _, _ in shots), *pictures]
    return {"messages": messages, "images": _saved(shown, folder, name)}


def _turn(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def _saved(pictures: Sequence[Image.Image], folder: Path, name: str) -> list[str]:
    names = [f"{name}-{i}.png" for i in range(len(pictures))]
    for picture, file in zip(pictures, names, strict=True):
        picture.save(folder / file)
    return names


def mm1(*words: object, processes: int = 1) -> float:
    """Run the command, as so many processes of one run; the seconds that it took.

    Raises:
        CalledProcessError: it failed, or one of them did.
    """
    command = [str(Path(sys.executable).with_name("mm1")), *map(str, words)]
    start = time.perf_counter()
    if processes == 1:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    elif code := run_ring(command, processes):
        raise subprocess.CalledProcessError(code, command)
    return time.perf_counter() - start


def train(model: Path, data: Path, run: Path) -> float:
    """Learn the rows, into an adapter in the folder; the seconds of ``mm1 train sft``."""
    told = [x for name, value in FLAGS.items() for x in (f"--{name}", value)]
    told += [x for target in TARGETS for x in ("--adapter-targets", target)]
    told += [f"--{name}" for name in SWITCHES]
    words = ("train", "sft", model, run, "--data", data, *told)
    return mm1(*words, processes=PROCESSES)


def new_figures(
    model: Path, adapter: Path | None, number: int
) -> tuple[Figures, list[str]]:
    """What is answered about arrows, at least so many cases of each kind; the words."""
    return _figures(model, adapter, [NEW], number)


def old_figures(
    model: Path, adapter: Path | None, number: int
) -> tuple[Figures, list[str]]:
    """What is answered of every old kind, so many cases of each, held out; the words."""
    return _figures(model, adapter, PARTS, number)


def _figures(
    model: Path, adapter: Path | None, parts: Sequence[str], number: int
) -> tuple[Figures, list[str]]:
    """Of all these parts, a process for each, and as many at a time as there are cores."""
    asked = partial(_part_figures, model, adapter, number)
    rows: Figures = {}
    words: list[str] = []
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for some, said in pool.map(asked, parts):
            rows |= some
            words += said
    return rows, words


def _part_figures(
    model: Path, adapter: Path | None, number: int, part: str
) -> tuple[Figures, list[str]]:
    words: list[str] = []
    with ExitStack() as stack:
        answer = answerer(str(model), stack, [(adapter, SCALE)] if adapter else [])

        def heard(cases: list[Case]) -> list[str]:
            said = answer(cases)
            words.extend(said)
            return said

        return evaluate(heard, asked_of(part, number)), words


def asked_of(part: str, number: int) -> Iterable[Case]:
    """The cases of a part, at least so many of each kind, behind what was chosen on."""
    if part == NEW:
        # The rarest is the colour: half of the pictures show the one arrow that it takes.
        return arrow_cases(2 * number, first=2 * CHOSEN_ON)
    first = 0 if part == FEW else CHOSEN_ON
    return _behind_first(part_cases(part, first + number), first)


def _behind_first(cases: Iterable[Case], number: int) -> Iterator[Case]:
    """All but so many of each kind."""
    seen: Counter[str] = Counter()
    for case in cases:
        seen[case.kind] += 1
        if seen[case.kind] > number:
            yield case


def known(before: Figures) -> list[str]:
    """The old kinds that were answered better than by chance, each question once."""
    return [
        kind
        for kind, row in before.items()
        if kind not in TWICE
        and row["interval_95"][0] > max(row["chance_uniform"], row["chance_majority"])
    ]


def figures_of(news: Figures, old: Figures, before: Figures) -> dict[str, Any]:
    """Of all arrows, and of all old tasks that were known; and of each kind."""
    return {
        "arrows": total({kind: row for kind, row in news.items() if kind not in TWICE}),
        "old tasks": total({kind: old[kind] for kind in known(before)}),
        "new kinds": news,
        "old kinds": old,
    }


def total(rows: Figures) -> dict[str, Any]:
    """The figures of all kinds together."""
    count = sum(row["n"] for row in rows.values())
    right = round(sum(row["n"] * row["accuracy"] for row in rows.values()))
    return counted(right, count)


def lost_most(before: Figures, after: Figures) -> dict[str, Any]:
    """The known kind that lost the most, and its share of right answers that it lost."""
    lost = {
        kind: round(before[kind]["accuracy"] - after[kind]["accuracy"], 4)
        for kind in known(before)
    }
    kind = max(lost, key=lambda kind: lost[kind])
    return {"kind": kind, "lost": lost[kind]}


def verdict(result: Mapping[str, Any]) -> dict[str, bool]:
    """Which of what was set out is so."""

    def right(name: str, what: str) -> float:
        accuracy: float = result[name][what]["accuracy"]
        return accuracy

    lost = right("before", "old tasks") - right("lora", "old tasks")
    apart = [
        right("lora", what) - right("qlora", what) for what in ("arrows", "old tasks")
    ]
    return {
        f"arrows before under {RIGHT:.0%}": right("before", "arrows") < RIGHT,
        f"arrows at least {RIGHT:.0%}": right("lora", "arrows") >= RIGHT,
        f"under {SECONDS} s": max(result["seconds"].values()) < SECONDS,
        f"old tasks together lose at most {LOST:.0%}": lost <= LOST,
        f"QLoRA within {APART:.0%} of LoRA": max(apart) <= APART,
        "fused says the same": result["fused"]["others"]["float32"] == 0,
    }


def table(result: Mapping[str, Any]) -> str:
    """What was learned and what it cost, as a Markdown table."""
    names = {"before": "before", "lora": "LoRA", "qlora": "QLoRA"}
    rows = [result[name] for name in names]
    seconds = result["seconds"]

    def share(row: Mapping[str, Any]) -> str:
        low, high = row["interval_95"]
        return f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})"

    def lost(row: Mapping[str, Any]) -> str:
        worst = row.get("worst")
        return f"{worst['kind']}: {100 * worst['lost']:.1f} points" if worst else ""

    lines = {
        f"arrows, {rows[0]['arrows']['n']:,} questions": [
            share(x["arrows"]) for x in rows
        ],
        f"old tasks, {rows[0]['old tasks']['n']:,}": [
            share(x["old tasks"]) for x in rows
        ],
        "the old task that lost the most": [lost(x) for x in rows],
        "training, seconds": [
            f"{seconds[name]:.0f}" if name in seconds else "" for name in names
        ],
    }
    fused = result["fused"]
    for kind, others in fused["others"].items():
        name = f"other answers fused in {kind}, of {fused['answers']:,}"
        lines[name] = ["", f"{others:,}", ""]
    head = [f"| | {' | '.join(names.values())} |", "|---|--:|--:|--:|"]
    return "\n".join(
        [*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())]
    )


def weights_of(model: Path) -> Path:
    """The file of a model's weights."""
    return model / "model.safetensors"


def flags() -> dict[str, Any]:
    """All that ``mm1 train sft`` is told, and how many processes run it."""
    told = {"adapter-targets": list(TARGETS), "processes": PROCESSES}
    return FLAGS | told | dict.fromkeys(SWITCHES, True)


def is_same(result: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two results are of the same model, rows, settings and number of cases."""
    names = ("model", "rows", "flags", "scale", "chosen on", "cases")
    return all(result.get(name) == other[name] for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("-n", type=int, default=500, help="cases of each kind")
    parser.add_argument("--model", type=Path, default=TINY)
    parser.add_argument("--json", type=Path, help="figures (FOLDER/result.json)")
    arguments = parser.parse_args()
    folder, number = arguments.folder, arguments.n
    kept = arguments.json or folder / "result.json"
    data, quantized = folder / "data", folder / "4bit"
    if not data.exists():
        shutil.rmtree(folder / "partial", ignore_errors=True)
        write_rows(folder / "partial", PICTURES).parent.rename(data)
    if not quantized.exists():
        mm1("quantize", arguments.model, quantized, "--bits", "4", "--vision", "4")
    result: dict[str, Any] = {
        "what": "mm1 train sft, python -m benchmarks.shapes.fine_tune",
        "machine": describe(BLAS),
        "flags": flags(),
        "scale": SCALE,
        "chosen on": CHOSEN_ON,
        "rows": sha256(data / "rows.jsonl"),
        "model": sha256(weights_of(arguments.model)),
        "cases": number,
        "seconds": {},
        "bytes": {
            "model": weights_of(arguments.model).stat().st_size,
            "4-bit copy": weights_of(quantized).stat().st_size,
        },
    }
    if kept.exists():
        begun = json.loads(kept.read_text())
        if not is_same(begun, result):
            sys.exit(f"error: {kept} is of other settings; remove it, and its folder")
        result = begun

    def keep(name: str, figures: Mapping[str, Any]) -> None:
        result[name] = figures
        kept.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {json.dumps(figures, indent=2)}", flush=True)

    if "before" not in result:
        old, _ = old_figures(arguments.model, None, number)
        news, _ = new_figures(arguments.model, None, number)
        keep("before", figures_of(news, old, old))
    before = result["before"]["old kinds"]
    for name, base in (("lora", arguments.model), ("qlora", quantized)):
        if name in result:
            continue
        adapter = folder / name / "adapter"
        if name not in result["seconds"]:
            # They count: what a stop left of a training is not gone on with.
            shutil.rmtree(folder / name, ignore_errors=True)
            seconds = train(base, data / "rows.jsonl", folder / name)
            keep("seconds", result["seconds"] | {name: round(seconds, 1)})
        news, words = new_figures(base, adapter, number)
        old, more = old_figures(base, adapter, number)
        if name == "lora":
            others = {}
            for kind in FUSED:
                fused = folder / f"fused-{kind}"
                shutil.rmtree(fused, ignore_errors=True)
                scaled = f"{adapter}:{SCALE}"
                mm1("fuse", base, fused, "--adapter", scaled, "--dtype", kind)
                said = new_figures(fused, None, number)[1]
                said += old_figures(fused, None, number)[1]
                others[kind] = sum(
                    a != b for a, b in zip(words + more, said, strict=True)
                )
            keep("fused", {"answers": len(words + more), "others": others})
        worst = lost_most(before, old)
        rows = figures_of(news, old, before)
        keep(name, {"worst": worst, **rows})
    held = verdict(result)
    keep("verdict", held)
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()
