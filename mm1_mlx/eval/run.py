"""A task, its data and a model -> figures: every case asked, answered and counted.

What is asked is a function of data, settings and seed, and each answer is written as it
comes, so that a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from mm1_mlx.answer import Answer, Piece, join
from mm1_mlx.batch import SIZE, Ask, stream_batch
from mm1_mlx.errors import DataError, MM1Error
from mm1_mlx.eval.case import Box, Case, digest_of, read_case
from mm1_mlx.eval.log import Log, began, legible
from mm1_mlx.eval.metrics import METRICS, Metric, Reply
from mm1_mlx.eval.prompts import Asker, check_prompt, is_base
from mm1_mlx.eval.tasks import TASKS, Task
from mm1_mlx.grounding import load_upright, parse_boxes
from mm1_mlx.likelihood import Candidates, Likelihood, loglikelihoods
from mm1_mlx.resolution import name_mode
from mm1_mlx.runtime import Runtime
from mm1_mlx.tokenizer import Tokenizer
from mm1_mlx.train.data.example import located
from mm1_mlx.train.data.files import Files, find_files
from mm1_mlx.train.data.pictures import PictureFolder

Progress = Callable[[str, int, int], None]
# What came of a row: a line of the log without its row.
Line = dict[str, Any]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Options:
    """How a task is put to a model.

    Attributes:
        shots: solved examples before each question.
        shots_from: the file that they are drawn from.
        fresh_shots: drawn anew for each question, not once for all.
        seed: of the drawing.
        limit: ask so many rows, the first ones.
        tiled: how many of a prompt's last pictures may be split into tiles.
        style: ``chat``, ``base``, or ``auto`` by the model's template.
        image_folder: where relative paths of pictures begin; by default beside the data.
        outside: whether they may lead out of it.
        skip_bad: pass over rows that cannot be asked, and count them.
        size: how many answers are under way at once.
    """

    shots: int = 0
    shots_from: Path | None = None
    fresh_shots: bool = False
    seed: int = 0
    limit: int | None = None
    tiled: int | None = None
    style: str = "auto"
    image_folder: Path | None = None
    outside: bool = False
    skip_bad: bool = False
    size: int = SIZE


@dataclass
class _Run:
    """A task's rows and the examples for them."""

    runtime: Runtime
    task: Task
    options: Options
    files: Files
    solved: Files | None
    asker: Asker
    metric: Metric
    _drawn: list[Case] = field(default_factory=list)
    # Of examples by their origins.
    _digests: dict[str, bytes] = field(default_factory=dict)

    def __len__(self) -> int:
        return min(len(self.files), self.options.limit or len(self.files))

    def case(self, row: int) -> Case:
        """The case of a row.

        Raises:
            DataError: it is none.
        """
        # Not kept: of some files a row holds its pictures.
        return self._read(self.files, row)

    def question(self, row: int) -> Case:
        """The case of a row, held against its picture where that shows a mistake.

        Raises:
            MM1Error: it cannot be asked.
        """
        case = self.case(row)
        if case.box is not None and self.task.metric == "box":
            with located(case.origin):
                _check_box(case.box, load_upright(case.images[0]).size)
        return case

    def asked(self, row: int, case: Case) -> str:
        """A digest of a row's case and examples: whose answer an answer is."""
        digest = hashlib.sha256(case.digest())
        for shot in self.shots(row):
            if shot.origin not in self._digests:
                self._digests[shot.origin] = shot.digest()
            digest.update(self._digests[shot.origin])
        return digest.hexdigest()

    def shots(self, row: int) -> list[Case]:
        """The solved examples before a row's question."""
        if self.solved is None or self._drawn:
            return self._drawn
        fresh = self.options.fresh_shots
        stream = random.Random(f"{self.options.seed}:{row if fresh else 0}")
        numbers = stream.sample(range(len(self.solved)), self.options.shots)
        shots = [self._read(self.solved, number) for number in numbers]
        if not fresh:
            self._drawn = shots
        return shots

    def _read(self, files: Files, row: int) -> Case:
        record = files[row]
        folder = PictureFolder(
            self.options.image_folder or record.folder, self.options.outside
        )
        needs = self.metric.needs | ({"images"} if self.task.pictured else set())
        case = read_case(record, folder, needs, passage=self.metric.passage)
        if wrong := self.metric.wrong(case):
            raise DataError(f"{case.origin}: {wrong}")
        return case


def _check_box(box: Box, size: tuple[int, int]) -> None:
    """Refuse a box that is not in its picture, but for what rounding takes it out."""
    if min(box) < -1 or box[2] > size[0] + 1 or box[3] > size[1] + 1:
        raise DataError(
            f"box is {list(box)}, which is not in its picture of {size[0]} x {size[1]} "
            "pixels; expected [left, top, right, bottom], not COCO's "
            "[x, y, width, height]"
        )


def evaluate(
    runtime: Runtime,
    task: Task,
    data: Path,
    options: Options,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The figures of a task, and all that they depend on, as JSON values.

    Args:
        runtime: answers.
        task: what is asked, and how it is counted.
        data: a file of rows, or a pattern.
        options: how it is asked.
        out: a folder for answers and results; a run that was ended goes on there.
        progress: called with what is done, how many rows are, and of how many.

    Raises:
        DataError: a file or a row cannot be used, or the folder is another run's.
    """
    if out is not None and runtime.engine.group is not None:
        raise DataError(
            f"several processes would write to {out}; evaluate without mlx.launch, or "
            "without --out"
        )
    run = _open(runtime, task, data, options)
    settings = _settings(run, data)
    with _dated(runtime.tokenizer, out) as day:
        settings |= day
        if out is None:
            return _results(run, _answer(run, {}, None, progress), settings)
        with Log(out, _decisive(settings)) as log:
            lines = _answer(run, _still_asked(run, log), log, progress)
            results = _results(run, lines, settings)
            log.finish(results)
            return results


@contextmanager
def _dated(tokenizer: Tokenizer, out: Path | None) -> Iterator[dict[str, str]]:
    """The day that prompts say within, where they do: that on which the run began."""
    if not tokenizer.dated:
        yield {}
        return
    begun = began(out) if out else None
    before, tokenizer.today = tokenizer.today, begun or date.today()
    try:
        yield {"date": tokenizer.today.isoformat()}
    finally:
        tokenizer.today = before


def _open(runtime: Runtime, task: Task, data: Path, options: Options) -> _Run:
    assert runtime.config.prompt is not None
    files, solved = _files(data), None
    if not len(files):
        raise DataError(f"{data} holds no rows, expected a question each")
    if bool(options.shots) != (options.shots_from is not None):
        raise DataError(
            f"shots is {options.shots} and their file is {options.shots_from}; give both, "
            "a number of solved examples and the file to draw them from"
        )
    if options.shots_from is not None:
        solved = _files(options.shots_from)
        if len(solved) < options.shots:
            raise DataError(
                f"{options.shots_from} holds {len(solved)} rows, too few to draw "
                f"{options.shots} different examples from"
            )
        if any(a.samefile(b) for a in solved.paths for b in files.paths):
            raise DataError(
                f"{options.shots_from} is what is asked, too; draw examples from a file "
                "of training data, so that no question is shown with its answer"
            )
        if task.metric == "box":
            raise DataError(
                f"{task.name} has no examples to show, as their boxes are in pixels and "
                "an answer's are not; leave --shots out"
            )
    base = is_base(options.style, runtime.config.prompt)
    asker = Asker(task, base, options.tiled)
    if task.stop and not asker.ends and task.stop != TASKS[task.name].stop:
        raise DataError(
            f"--stop {task.stop[0]!r:.40} ends only a base model's answer, and this one "
            "is asked in turns; leave it out, or give --style base"
        )
    run = _Run(runtime, task, options, files, solved, asker, METRICS[task.metric])
    if run.metric.together is not None:
        _check_once(run)
    return run


def _check_once(run: _Run) -> None:
    """Refuse a picture of two rows: how rare words are is counted by pictures.

    Raises:
        DataError: names both.
    """
    seen: dict[Any, str] = {}
    for row in range(len(run)):
        try:
            case = run.case(row)
        except MM1Error:
            continue  # Told when it is asked.
        named = [x if isinstance(x, str | Path) else digest_of(x) for x in case.images]
        first = seen.setdefault(tuple(named), case.origin)
        if first != case.origin:
            raise DataError(
                f"{case.origin}: its picture is that of {first}, too; write all that "
                "people said of a picture into one row, as captions"
            )


def _files(path: Path) -> Files:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the file of questions in it")
    found = find_files(path)
    for file in found:
        if legible(file.name) != file.name:
            raise DataError(f"{legible(file)} has a name that is not UTF-8; rename it")
    return Files(found)


def _settings(run: _Run, data: Path) -> dict[str, Any]:
    """What was asked, of which data, and by which model."""
    runtime, options = run.runtime, run.options
    image = runtime.config.image
    dtype = runtime.model.decoder.norm.weight.dtype
    return {
        "task": {
            "name": run.task.name,
            "metric": run.task.metric,
            "prompt": run.asker.template,
            "style": run.task.style if run.asker.base else "chat",
            "stop": list(run.asker.ends),
            "max_tokens": run.task.max_tokens,
        },
        "data": {"path": legible(data), "digest": run.files.identity()},
        "image_folder": options.image_folder and legible(options.image_folder),
        "rows": len(run),
        "style": "base" if run.asker.base else "chat",
        "shots": options.shots,
        "shots_from": run.solved
        and {"path": legible(options.shots_from), "digest": run.solved.identity()},
        "fresh_shots": options.fresh_shots,
        "shots_seed": options.seed,
        "resolution": image and name_mode(image),
        "tiled": options.tiled,
        "model": {
            "path": legible(runtime.path),
            "digest": runtime.digest,
            "adapters": [
                {"name": legible(name), "scale": scale}
                for name, scale in runtime.adapters
            ],
            "dtype": str(dtype).removeprefix("mlx.core."),
        },
        "versions": {
            **{name: version(name) for name in ("mm1-mlx", "mlx", "mlx-lm")},
            "python": platform.python_version(),
        },
    }


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide answers, wherever files lie.

    What rows and examples hold is told by the digest on each answer's line, so that more
    rows may be asked later.
    """
    told = ("data", "image_folder", "rows", "shots_from")
    model, versions = settings["model"], settings["versions"]
    return {key: value for key, value in settings.items() if key not in told} | {
        "model": {key: model[key] for key in ("digest", "dtype")},
        "versions": {k: v for k, v in versions.items() if k != "python"},
    }


def _still_asked(run: _Run, log: Log) -> dict[int, Line]:
    """The answers of an earlier run, each to what its row is now.

    Raises:
        DataError: one is to something else.
    """
    known = {}
    for row, line in log.known.items():
        if row >= len(run) or "error" in line:
            continue
        try:
            case = run.case(row)
        except MM1Error:
            continue  # Told when it is asked.
        if line["asked"] != run.asked(row, case):
            raise DataError(
                f"{log.folder} holds an answer to {case.origin} as it was before: the row, "
                "its pictures or its examples have changed; give another --out"
            )
        # What a metric counts is there, whoever wrote the line.
        scores = (len(case.choices) or 1) if run.metric.scored else 0
        boxes = run.task.metric == "box"
        if len(line.get("logprobs", ())) != scores or ("boxes" in line) != boxes:
            raise DataError(
                f"{log.folder} holds an answer to {case.origin} that is none of "
                f"{run.task.name}; remove the line of row {row} to have it asked again"
            )
        known[row] = line
    return known


def _answer(
    run: _Run,
    known: dict[int, Line],
    log: Log | None,
    progress: Progress | None,
) -> dict[int, Line]:
    """What came of every row, those known from before included.

    A row that could not be asked before is asked again.
    """
    lines = dict(known)
    rows = [row for row in range(len(run)) if row not in lines]
    tell = progress or (lambda *_: None)
    tell(run.task.name, len(lines), len(run))
    said = _scored(run, rows) if run.metric.scored else _generated(run, rows)
    for row, line in said:
        if "error" in line and not run.options.skip_bad:
            raise DataError(line["error"])
        lines[row] = line
        if log is not None:
            log.add({"row": row, **line})
        tell(run.task.name, len(lines), len(run))
    return lines


@dataclass
class _Failed:
    """What could not be asked: rows, and the examples, which ends the run."""

    rows: list[tuple[int, Line]] = field(default_factory=list)
    shots: MM1Error | None = None


def _made(
    run: _Run,
    rows: Sequence[int],
    make: Callable[[Any, Any], Made],
    failed: _Failed,
) -> Iterator[tuple[int, Made]]:
    """What is to be asked of each row, until one cannot be; that joins ``failed``."""
    for row in rows:
        try:
            shots = run.shots(row)
        except MM1Error as error:
            failed.shots = error
            return
        try:
            made = make(run.question(row), shots)
        except MM1Error as error:
            failed.rows.append((row, {"error": str(error)}))
            if run.options.skip_bad:
                continue
            return
        yield row, made


def _generated(run: _Run, rows: Sequence[int]) -> Iterator[tuple[int, Line]]:
    """What was said to each row, in the order in which answers end."""
    asked: list[int] = []
    failed = _Failed()

    def asks() -> Iterator[Ask]:
        for row, ask in _made(run, rows, run.asker.ask, failed):
            asked.append(row)
            yield ask

    pieces: dict[int, list[Piece]] = {}
    for number, piece in stream_batch(run.runtime, asks(), size=run.options.size):
        row = asked[number]
        if isinstance(piece, MM1Error):
            yield row, _refused(run, row, piece)
            continue
        pieces.setdefault(number, []).append(piece)
        if piece.finish_reason is not None:
            yield row, _line(run, row, said=join(pieces.pop(number)))
    if failed.shots:
        raise failed.shots
    yield from failed.rows


def _scored(run: _Run, rows: Sequence[int]) -> Iterator[tuple[int, Line]]:
    """How likely each row's texts are."""
    owners: list[tuple[int, bool]] = []  # The row, and whether it is its last question.
    failed = _Failed()

    def questions() -> Iterator[Candidates]:
        for row, found in _made(run, rows, run.asker.candidates, failed):
            owners.extend((row, i + 1 == len(found)) for i in range(len(found)))
            yield from found

    held: list[Likelihood] = []
    refused: set[int] = set()
    for number, found in loglikelihoods(run.runtime, questions()):
        row, last = owners[number]
        if isinstance(found, MM1Error):
            if row not in refused:
                yield row, _refused(run, row, found)
            refused.add(row)
        else:
            held += found
        if last:
            if row not in refused:
                yield row, _line(run, row, scores=held)
            held = []
    if failed.shots:
        raise failed.shots
    yield from failed.rows


def _refused(run: _Run, row: int, error: MM1Error) -> Line:
    """The line of a row that could not be asked.

    Raises:
        DataError: an example before it is to blame, which no other row does without.
    """
    for shot in run.shots(row):
        for image in shot.images:
            with located(shot.origin):
                load_upright(image)
    return {"error": f"{run.case(row).origin}: {error}"}


def _line(
    run: _Run,
    row: int,
    *,
    said: Answer | None = None,
    scores: Sequence[Likelihood] = (),
) -> Line:
    """A row's line of the log."""
    case = run.case(row)
    line: Line = {
        "origin": legible(case.origin),
        "asked": run.asked(row, case),
        "expected": list(case.answers) or case.box,
    }
    if said is None:
        line["logprobs"] = [score.logprob for score in scores]
        line["greedy"] = [score.greedy for score in scores]
        return line
    line["answer"] = run.asker.cut(said.text)
    # What is left out of the answer anyhow may end anywhere.
    whole = line["answer"] == said.text.strip()
    line["unended"] = said.finish_reason == "length" and whole
    if run.task.metric == "box":
        assert run.runtime.config.prompt is not None
        size = load_upright(case.images[0]).size
        most = run.runtime.config.prompt.coordinate_range
        line["boxes"] = [list(box.box) for box in parse_boxes(said.text, size, most)]
    return line


def _results(
    run: _Run, lines: dict[int, Line], settings: dict[str, Any]
) -> dict[str, Any]:
    """The figures, of all and of each category, and what they depend on."""
    bad = [line["error"] for _, line in sorted(lines.items()) if "error" in line]
    good: list[tuple[Case, Reply]] = []
    blind = 0
    for row, line in sorted(lines.items()):
        if "error" not in line:
            case = run.case(row)
            blind += not case.images
            good.append((replace(case, images=()), _reply(line)))
    if not good:
        raise DataError(
            f"none of the {len(lines)} rows could be asked, the first since {bad[0]}"
        )
    if run.metric.together is not None:
        scores = run.metric.together(*zip(*good, strict=True))
        pairs = zip(good, scores, strict=True)
        good = [(case, replace(reply, score=score)) for (case, reply), score in pairs]
    categories = sorted({case.category for case, _ in good if case.category})
    return {
        "task": run.task.name,
        "figures": _figures(run.metric, good),
        "categories": {
            name: _figures(
                run.metric, [(c, reply) for c, reply in good if c.category == name]
            )
            for name in categories
        },
        "n": len(good),
        "without_picture": blind,
        "unended": sum(line.get("unended", False) for line in lines.values()),
        "skipped": len(bad),
        "bad_rows": [legible(error) for error in bad[:20]],
        "settings": settings,
    }


def _figures(metric: Metric, good: Sequence[tuple[Case, Reply]]) -> dict[str, Any]:
    figures = metric.figures([case for case, _ in good], [reply for _, reply in good])
    return {name: asdict(figure) for name, figure in figures.items()}


def _reply(line: Line) -> Reply:
    return Reply(
        text=line.get("answer", ""),
        boxes=tuple(map(tuple, line.get("boxes", ()))),
        logprobs=tuple(line.get("logprobs", ())),
        greedy=tuple(line.get("greedy", ())),
    )


def altered(
    task: Task,
    *,
    prompt: str | None = None,
    stop: Sequence[str] | None = None,
    max_tokens: int | None = None,
) -> Task:
    """The task with what a user asks otherwise.

    Raises:
        PromptError: the prompt leaves out what the task asks.
    """
    if prompt is not None:
        check_prompt(task, prompt)
    return replace(
        task,
        prompt=task.prompt if prompt is None else prompt,
        plain=task.plain if prompt is None else prompt,
        stop=task.stop if stop is None else tuple(stop),
        max_tokens=max_tokens or task.max_tokens,
    )
