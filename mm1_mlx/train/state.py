"""Where a run stands, on disk: folders ``step-000200``, each whole or not there.

A folder holds ``state.safetensors`` (trained weights, what the optimizer keeps, what was
lost since the last log line, what float16's gradients are multiplied by) and
``state.sha256``, its digest. The position in the data and the keys of what is random are
functions of the step, so the step is both. It is written beside its place, flushed and
renamed; the last two are kept. One that is damaged is passed over for the other and set
aside as ``step-000200.damaged``, so that it is not taken for one of the two.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import fsync, read_shard, sha256
from mm1_mlx.shard import Deferred, in_order, write_shard
from mm1_mlx.sizes import human_bytes
from mm1_mlx.writer import FULL

STATE, DIGEST = "state.safetensors", "state.sha256"
KEPT = 2
_NAME = re.compile(r"step-(\d{6,})")
# What a run that was killed left of one that it wrote or cleared away.
_UNFINISHED = re.compile(rf"{_NAME.pattern}\.(partial|gone)")
_DAMAGED = re.compile(rf"{_NAME.pattern}\.damaged")


def save(folder: Path, step: int, tensors: Mapping[str, mx.array]) -> None:
    """Write the checkpoint of a step; the ones before it stand until it is whole.

    Raises:
        CheckpointError: the disk is full, or does not take it for another reason.
    """
    partial = folder / f"{_name(step)}.partial"
    try:
        _clear(_named(folder, _UNFINISHED))
        partial.mkdir(parents=True)
        deferred = {name: Deferred.of(x) for name, x in tensors.items()}
        digest = write_shard(partial / STATE, in_order(deferred), lambda: None)
        (partial / DIGEST).write_text(f"{digest}\n")
        for path in (partial / STATE, partial / DIGEST, partial):
            fsync(path)
        place = folder / _name(step)
        # Of a run that was set back and comes by again.
        _clear([place])
        partial.rename(place)
        fsync(folder)
    except OSError as error:
        # What holds the room that is missing.
        with suppress(OSError):
            _clear([partial])
        steps = saved_steps(folder)
        stands = f"the checkpoint of step {steps[-1]} stands; " if steps else ""
        way_out = "free some room" if error.errno in FULL else "check the disk"
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {str(folder)!r} "
            f"({error.strerror or error}); {stands}{way_out} and go on with the same "
            "command"
        ) from None
    _clear_old(folder)


def check_room(folder: Path, size: int, made: int, what: str) -> None:
    """Pass only where the disk has room for what a run leaves.

    That are checkpoints, of which a third is written before the first of two goes; what
    stands of them is room.

    Args:
        folder: the run's.
        size: bytes of a checkpoint.
        made: bytes of what the run makes.
        what: that is.

    Raises:
        CheckpointError: it has not.
    """
    stand = [*_named(folder, _NAME), *_named(folder, _UNFINISHED)]
    held = [path for place in stand for path in place.iterdir() if path.is_file()]
    above = next(x for x in (folder.absolute() / "_").parents if x.exists())
    free = shutil.disk_usage(above).free + sum(path.stat().st_size for path in held)
    need = (KEPT + 1) * size + made
    if need > free:
        raise CheckpointError(
            f"{str(folder)!r} needs {human_bytes(need)} ({KEPT + 1} checkpoints of "
            f"{human_bytes(size)}, and {human_bytes(made)} of {what}), but its disk has "
            f"{human_bytes(free)} free; free some room, name a folder on another disk, "
            "or train less (--trained, --adapter)"
        )


def load(
    folder: Path, warn: Callable[[str], None] = lambda _: None
) -> tuple[int, dict[str, mx.array]] | None:
    """Step and tensors of the newest checkpoint that is whole; None where there is none.

    ``warn`` receives a line for a newer one that is damaged.

    Raises:
        CheckpointError: all are damaged.
    """
    steps = saved_steps(folder)
    reasons = []
    for step in reversed(steps):
        try:
            tensors = _read(folder / _name(step))
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        if reasons:
            warn(f"{reasons[-1]}; going on from step {step}")
        return step, tensors
    if reasons:
        raise CheckpointError(
            f"no checkpoint of the run can be used ({'; '.join(reasons)}); get one back, "
            "or choose another folder"
        )
    return None


def tidy(folder: Path, step: int) -> None:
    """Leave of the checkpoints the step that was loaded and the one before it.

    What is newer ``load`` found damaged: the last such one is set aside, for whoever can
    mend it. What else is there a run left that was killed as it cleared it away.
    """
    newer = [folder / _name(x) for x in saved_steps(folder) if x > step]
    if newer:
        _clear(_named(folder, _DAMAGED))
        newer[-1].rename(newer[-1].with_suffix(".damaged"))
        _clear(newer[:-1])
        fsync(folder)
    _clear(_named(folder, _UNFINISHED))
    _clear_old(folder)


def saved_steps(folder: Path) -> list[int]:
    """Of the checkpoints in a folder, the oldest first."""
    return sorted(
        int(path.name.removeprefix("step-")) for path in _named(folder, _NAME)
    )


def _read(place: Path) -> dict[str, mx.array]:
    """The tensors of one checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        said = (place / DIGEST).read_bytes().strip()
        intact = said == sha256(place / STATE).encode()
    except OSError as error:
        raise CheckpointError(
            f"{place} is damaged ({error.strerror or error})"
        ) from None
    if not intact:
        raise CheckpointError(f"{place} is damaged (its digest is another)")
    return read_shard(place / STATE)


def _named(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """What is called so in a folder; nothing where there is no folder."""
    return [x for x in folder.glob("step-*") if name.fullmatch(x.name)]


def _name(step: int) -> str:
    return f"step-{step:06}"


def _clear_old(folder: Path) -> None:
    _clear(folder / _name(old) for old in saved_steps(folder)[:-KEPT])


def _clear(places: Iterable[Path]) -> None:
    for place in places:
        if place.is_dir():
            # A folder that is half gone must not be taken for a checkpoint.
            gone = place.with_suffix(".gone")
            if gone != place:
                shutil.rmtree(gone, ignore_errors=True)
                place.rename(gone)
            shutil.rmtree(gone)
