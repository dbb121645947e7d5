"""Servers that run as processes of their own: ``mm1 serve``, and those of its peers."""

from __future__ import annotations

import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.peers.compare import ENVIRONMENT

# Seconds until a server is ready, or an answer there; and until a server has ended.
PATIENCE, ENDING = 600, 60
READY = re.compile(r"serving \S+ at (http://\S+) .*\n")
COMMAND = "from mm1_mlx.apps.cli import main; main()"
# OpenBLAS under every server alike, as in ``peers``.
PEER = """
import ctypes, runpy, sys
try:
    ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
except OSError:
    pass
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class FaultError(Exception):
    """What is measured, or how, is not as it should be."""


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        url: its address.
        log: a file of all that it printed.
    """

    url: str
    log: Path

    def said(self) -> str:
        """What it printed, without the line that says where it is."""
        return READY.sub("", self.log.read_text(errors="replace"), count=1)


@contextmanager
def mm1(python: str, model: str, *options: str) -> Iterator[Running]:
    """A running ``mm1 serve``."""
    arguments = ["serve", "-m", model, "--port", "0", "--no-log", *options]

    def find(log: Path) -> str | None:
        found = READY.match(log.read_text(errors="replace"))
        return found and found[1]

    with _launched([python, "-c", COMMAND, *arguments], find) as running:
        yield running


@contextmanager
def peer(python: str, module: str, model: str) -> Iterator[Running]:
    """A running server of mlx-lm or mlx-vlm."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"

    def find(_: Path) -> str | None:
        try:
            httpx.get(f"{url}/v1/models", timeout=10)
        except httpx.TransportError:
            return None
        return url

    options = ["--model", model, "--host", "127.0.0.1", "--port", port]
    with _launched([python, "-c", PEER, module, *options], find) as running:
        yield running


@contextmanager
def _launched(
    command: Sequence[str], find: Callable[[Path], str | None]
) -> Iterator[Running]:
    """A process that serves; ``find`` says where, once it does.

    Raises:
        FaultError: it did not start, or it ended before it was told to.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        # A pipe that nobody reads would fill, and stop the server.
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=ENVIRONMENT
            )
        try:
            end = time.monotonic() + PATIENCE
            while (url := find(log)) is None:
                _check(process, log)
                if time.monotonic() > end:
                    raise FaultError(
                        f"{command[3]} is not ready after {PATIENCE} seconds"
                    )
                time.sleep(0.1)
            yield Running(url, log)
            _check(process, log)
        finally:
            process.terminate()
            try:
                process.wait(ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _check(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        said = log.read_text(errors="replace")[-2000:]
        raise FaultError(f"the server ended with {process.returncode}: {said}")
