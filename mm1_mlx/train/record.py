"""What a run is made of and how it went, on disk: ``run.json`` and ``log.jsonl``.

run.json    config  its settings, defaults filled in
            given   those that were given: the rest may come out otherwise elsewhere
            ...     what else it is made of, each known by its digest
log.jsonl   a line every few steps
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import CheckpointError, ConfigError, MM1Error
from mm1_mlx.files import read_json, replace_json
from mm1_mlx.folders import RUN_RECORD
from mm1_mlx.train.config import TrainConfig

RECORD, LOG = RUN_RECORD, "log.jsonl"
# How a checkpoint's names begin of what the next line says.
TALLY = "tally."


class Settings(NamedTuple):
    """What a file says of a run.

    Attributes:
        stage: which command it is of, None if nothing is said.
        given: fields of ``TrainConfig`` that were given.
        config: all of them, None where the file is no record.
    """

    stage: str | None
    given: dict[str, Any]
    config: TrainConfig | None


def read_settings(path: Path) -> Settings:
    """The settings in a file: a run's record, or a config alone.

    Raises:
        ConfigError: it is neither.
        CheckpointError: it cannot be read.
    """
    values = read_json(path)
    config: TrainConfig | None = None
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        config = TrainConfig.from_dict(values["config"])
        values = values["config"] | {"given": values.get("given")}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} is no record of a run; write its settings as an object"
        )
    stage, given = values.pop("stage", None), values.pop("given", None)
    found = given if isinstance(given, dict) else values
    # A null where none can be says, as people write it, that nothing is given.
    none = {x.name for x in fields(TrainConfig) if x.default is None}
    found = {k: x for k, x in found.items() if x is not None or k in none}
    return Settings(stage, found, config)


def is_record(path: Path) -> bool:
    """Whether a file is the record of a training run, and not somebody else's."""
    try:
        return read_settings(path).config is not None
    except MM1Error:
        return False


def write_record(
    folder: Path,
    config: TrainConfig,
    given: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write ``run.json``; ``parts`` is what else the run is made of."""
    record = {"config": config.to_dict(), "given": dict(given), **parts}
    replace_json(folder / RECORD, record)


def check_record(
    folder: Path, config: TrainConfig, parts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Pass only if the folder is of this run, whose length may be another.

    Raises:
        ConfigError: it is of another one.
        CheckpointError: its record cannot be read.
    """
    path = folder / RECORD
    record = read_json(path)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is no record of a run")
    then = TrainConfig.from_dict(record.get("config", {}))
    for name, its, ours in config.differences(then):
        raise ConfigError(
            f"{folder} holds a run with {name} {its!r}, not {ours!r}; "
            "choose another folder, or the same settings"
        )
    for name, part in parts.items():
        known = record.get(name)
        if not isinstance(known, dict) or known.get("digest") != part["digest"]:
            raise ConfigError(
                f"{folder} holds a run of another {name}; choose another "
                f"folder, or get back what it was begun with, {path} says what"
            )


@dataclass
class Tally:
    """What was lost since the last log line.

    Attributes:
        learned: tokens.
        lost: the loss and its parts by name, each times the tokens it is the mean of.
    """

    learned: float = 0.0
    lost: dict[str, float] = field(default_factory=dict)

    def add(self, learned: float, lost: Mapping[str, float]) -> None:
        """Count a step."""
        self.learned += learned
        for name, x in lost.items():
            self.lost[name] = self.lost.get(name, 0.0) + x

    def means(self) -> dict[str, float]:
        """The loss and its parts, in nats per token."""
        return {name: x / max(self.learned, 1.0) for name, x in self.lost.items()}

    def tensors(self) -> dict[str, mx.array]:
        """It, to be kept to the bit: halves of its numbers."""
        numbers = {"learned": self.learned} | {
            f"lost.{k}": x for k, x in self.lost.items()
        }
        return {
            f"{TALLY}{name}": mx.array(np.array([x]).view(np.uint32))
            for name, x in numbers.items()
        }

    @classmethod
    def of(cls, tensors: Mapping[str, mx.array]) -> Tally:
        """The tally whose ``tensors`` are among these."""
        numbers = {
            name.removeprefix(TALLY): float(np.array(x).view(np.float64)[0])
            for name, x in tensors.items()
            if name.startswith(TALLY)
        }
        learned = numbers.pop("learned", 0.0)
        return cls(learned, {k.removeprefix("lost."): x for k, x in numbers.items()})


def add_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Write a line at the end of the log."""
    with (folder / LOG).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; the last one may have been cut off by a kill.

    What is no line of a run's is passed over.
    """
    path, lines = folder / LOG, []
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            break
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines


def trim_log(folder: Path, step: int) -> None:
    """Forget what was logged after a step, or at all if it is 0: it comes again."""
    path = folder / LOG
    kept = [line for line in read_log(folder) if line["step"] <= step] if step else []
    # Beside it first: a kill in between would lose what came before.
    trimmed = path.with_suffix(".partial")
    trimmed.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
    trimmed.replace(path)
