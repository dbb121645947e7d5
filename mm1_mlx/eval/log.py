"""The answers of a run in a folder, line by line: what a killed run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mm1_mlx.errors import DataError
from mm1_mlx.files import read_json, replace_json
from mm1_mlx.hold import Hold

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
            self.known = self._read()
            self._file = (folder / ANSWERS).open("a", encoding="utf-8")
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
        self._file.close()
        self._hold.release()

    def add(self, line: dict[str, Any]) -> None:
        """Write a row's line, whole before the next."""
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def finish(self, results: dict[str, Any]) -> None:
        """Write the figures beside the answers."""
        replace_json(self.folder / RESULTS, results)

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.folder / RUN
        if not path.exists():
            if (self.folder / ANSWERS).exists():
                raise DataError(
                    f"{self.folder} holds answers, but not what was asked; give another "
                    "--out"
                )
            replace_json(path, settings)
            return
        before = read_json(path)
        # As they come back from a file.
        settings = json.loads(json.dumps(settings))
        if before == settings:
            return
        differ = (
            [key for key in settings if before.get(key) != settings[key]]
            if isinstance(before, dict)
            else []
        )
        raise DataError(
            f"{self.folder} holds answers of another run, whose {differ or 'settings'} "
            "differ; give another --out, or remove it"
        )

    def _read(self) -> dict[int, dict[str, Any]]:
        """The lines of answers by their rows; one that was cut off is taken away."""
        path = self.folder / ANSWERS
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return {}
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        known: dict[int, dict[str, Any]] = {}
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
                row = line["row"]
            except (ValueError, TypeError, KeyError, RecursionError):
                raise DataError(
                    f"{path}:{number}: no answer of a run; remove the line to have it "
                    "asked again"
                ) from None
            known[row] = line
        return known
