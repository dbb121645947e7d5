"""The answers of a run in a folder, line by line: what a killed run goes on from."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mm1_mlx.errors import DataError
from mm1_mlx.eval.intervals import Figure
from mm1_mlx.files import read_json, replace_json
from mm1_mlx.hold import Hold
from mm1_mlx.journal import Journal, written

RUN = "run.json"
ANSWERS = "answers.jsonl"
RESULTS = "results.json"


class Log:
    """The answers of one run, held while it is at work; a context manager.

    Args:
        folder: where they are; made if need be.
        settings: what decides the answers, as JSON values.

    Raises:
        CheckpointError: another run is at work there.
        DataError: it holds answers to something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._hold = Hold(folder)
        try:
            self._check(settings)
            self._journal = Journal(folder / ANSWERS)
            self.known = self._read()
        except BaseException:
            self._hold.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._journal.close()
        self._hold.release()

    def add(self, line: dict[str, Any]) -> None:
        """Write a row's line, whole before the next.

        Raises:
            DataError: there is no room for it.
        """
        self._journal.add(line)

    def finish(self, results: dict[str, Any]) -> None:
        """Write the figures beside the answers.

        Raises:
            DataError: there is no room for them.
        """
        with written(self.folder / RESULTS):
            replace_json(self.folder / RESULTS, results)

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / RUN
        before = read_json(path) if path.exists() else None
        # As they come back from a file.
        settings = json.loads(json.dumps(settings))
        if before == settings:
            return
        paths = (self.folder / name for name in (ANSWERS, RESULTS))
        stand = [x for x in paths if x.exists() and x.stat().st_size]
        if before is None and stand:
            raise DataError(
                f"{stand[0]} stands, but not what was asked; give another --out"
            )
        # A run that was refused before its first answer leaves its settings.
        if before is None or (not stand and _have_same_names(before, settings)):
            with written(path):
                replace_json(path, settings)
            return
        differ = (
            sorted(
                key for key in before | settings if before.get(key) != settings.get(key)
            )
            if isinstance(before, dict)
            else []
        )
        raise DataError(
            f"{self.folder} holds answers of another run, whose {differ or 'settings'} "
            "differ; give another --out, or remove it"
        )

    def _read(self) -> dict[int, dict[str, Any]]:
        """The lines of answers by their rows; one that was cut off is taken away."""
        path = self._journal.path
        known: dict[int, dict[str, Any]] = {}
        for number, text in enumerate(self._journal.read(), start=1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if not _is_answer(line):
                raise DataError(
                    f"{path}:{number}: no answer of a run; remove the line to have it "
                    "asked again"
                )
            known[line["row"]] = line
        return known


def _have_same_names(before: Any, settings: dict[str, Any]) -> bool:
    return isinstance(before, dict) and before.keys() == settings.keys()


def _is_answer(line: Any) -> bool:
    """Whether a value is a row's line: an error, or an answer with what it was to."""
    if (
        not isinstance(line, dict)
        or type(line.get("row")) is not int
        or line["row"] < 0
    ):
        return False
    if "error" in line:
        return isinstance(line["error"], str)
    boxes = line.get("boxes", [])
    if not isinstance(boxes, list) or not all(_are(box, int) for box in boxes):
        return False
    if not isinstance(line.get("asked"), str) or any(len(box) != 4 for box in boxes):
        return False
    if type(line.get("unended", False)) is not bool:
        return False
    if "logprobs" not in line:
        return isinstance(line.get("answer"), str)
    scores, greedy = line["logprobs"], line.get("greedy")
    if not isinstance(greedy, list) or not _are(greedy, bool):
        return False
    return _are(scores, float) and len(scores) == len(greedy)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def began(folder: Path) -> date | None:
    """The day that prompts of the run in a folder say, None where they say none.

    Raises:
        CheckpointError: its settings cannot be read.
    """
    path = folder / RUN
    settings = read_json(path) if path.exists() else {}
    with suppress(KeyError, TypeError, ValueError):
        return date.fromisoformat(settings["date"])
    return None


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a run in a folder.

    Raises:
        MM1Error: it holds none.
    """
    results = read_json(folder / RESULTS)
    try:
        for figures in (results["figures"], *results["categories"].values()):
            for figure in figures.values():
                numbers = [
                    v for v in asdict(Figure(**figure)).values() if v is not None
                ]
                if not all(type(number) in (int, float) for number in numbers):
                    raise TypeError
                if figure["value"] is None or figure["n"] is None:
                    raise TypeError
        if not isinstance(results["task"], str):
            raise TypeError
    except (TypeError, KeyError, AttributeError):
        raise DataError(f"{folder / RESULTS} holds no results of mm1 eval") from None
    return dict(results)


def legible(name: object) -> str:
    """A path's text, with marks for what is not UTF-8 in it, so that it can be written."""
    return str(name).encode(errors="replace").decode()
