"""Kill runs at random moments and continue each: ``python killed.py OUT COUNT SEED -- ...``.

What stands behind ``--`` is the command, ``{}`` in the place of the run's folder. Every
process is a fork of this one, which has imported everything and computed nothing.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from mm1_mlx.blas import preload_blas

preload_blas()

import mlx.core as mx  # noqa: E402

mx.set_default_device(mx.cpu)

import mm1_mlx.train.job  # noqa: E402, F401
from mm1_mlx.apps.cli import main  # noqa: E402
from mm1_mlx.train.state import saved_steps  # noqa: E402


def start(command, out):
    """The number of a process that runs the command."""
    process = os.fork()
    if process:
        return process
    try:
        sys.argv = ["mm1", *(word.replace("{}", str(out)) for word in command)]
        said = os.open(f"{out}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        main()
    except SystemExit as ended:
        os._exit(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def finish(command, out):
    """Seconds until the first checkpoint stood, and until the end."""
    began = time.perf_counter()
    process, first = start(command, out), 0.0
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if not first and saved_steps(out):
            first = time.perf_counter() - began
        time.sleep(0.005)
    assert ended[1] == 0, Path(f"{out}.said").read_text()
    return first, time.perf_counter() - began


def kill(command, out, delay, begun):
    """Whether the run was killed, and not at its end already.

    After so many seconds, from the start or, if ``begun``, from its first checkpoint.
    """
    process, ended = start(command, out), (0, 0)
    while begun and not ended[0] and not saved_steps(out):
        ended = os.waitpid(process, os.WNOHANG)
        time.sleep(0.005)
    if not ended[0]:
        time.sleep(delay)
        # Still there, for nobody has waited for it.
        os.kill(process, signal.SIGKILL)
        ended = os.waitpid(process, 0)
    assert ended[1] in (0, signal.SIGKILL), Path(f"{out}.said").read_text()
    return ended[1] != 0


def run(folder, count, seed, command):
    folder.mkdir()
    first, took = finish(command, folder / "whole")
    assert 0 < first < took
    moments = random.Random(seed)
    # How many were killed at all, behind a checkpoint, and while one was written.
    killed = begun = saving = 0
    for i in range(count):
        out = folder / f"killed-{i}"
        # Every other one behind a checkpoint: to start may take most of a run.
        behind = i % 2 == 1
        span = (0, took - first) if behind else (0.1 * took, took)
        # Until one was hit: a faster run may have ended before.
        while not kill(command, out, moments.uniform(*span), behind):
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
        killed += 1
        begun += bool(saved_steps(out))
        saving += any("." in path.name for path in out.glob("step-*"))
        finish(command, out)
    counts = {"killed": killed, "begun": begun, "saving": saving}
    sys.stdout.write(json.dumps(counts | {"seconds_a_run": round(took, 2)}) + "\n")


if __name__ == "__main__":
    _, folder, count, seed, _, *command = sys.argv
    run(Path(folder), int(count), int(seed), command)
