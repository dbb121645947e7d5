"""One run in several processes of this machine."""

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.shapes import fine_tune
from benchmarks.shapes.ring import run_ring

SAYS = """
import json, os, sys
hosts = json.load(open(os.environ["MLX_HOSTFILE"]))
rank = os.environ["MLX_RANK"]
open(f"{sys.argv[1]}/{rank}", "w").write(json.dumps(hosts))
"""
# The first leaves its number, and waits for the second in vain.
FAILS = """
import os, signal, sys, time
if os.environ["MLX_RANK"] == "0":
    open(f"{sys.argv[1]}/pid", "w").write(str(os.getpid()))
    time.sleep(60)
while not os.path.exists(f"{sys.argv[1]}/pid"):
    time.sleep(0.01)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3)
"""


def python(program, *arguments):
    return [sys.executable, "-c", program, *map(str, arguments)]


def test_each_knows_its_rank_and_all_addresses(tmp_path):
    assert run_ring(python(SAYS, tmp_path), 2) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    first, second = (path.read_text() for path in tmp_path.iterdir())
    assert first == second
    assert first.count("127.0.0.1:") == 2


@pytest.mark.parametrize(("end", "code"), [("failed", 3), ("killed", -9)])
def test_one_that_fails_ends_the_others(end, code, tmp_path):
    start = time.monotonic()
    assert run_ring(python(FAILS, tmp_path, end), 2) == code
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_command_runs_alone_or_in_a_ring(tmp_path, monkeypatch):
    command = tmp_path / "mm1"
    command.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "rank = os.environ.get('MLX_RANK', 'alone')\n"
        "open(f'{sys.argv[1]}/rank-{rank}', 'w').close()\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    command.chmod(0o755)
    monkeypatch.delenv("MLX_RANK", raising=False)
    monkeypatch.setattr(sys, "executable", str(Path(tmp_path) / "python"))

    def ranks():
        return sorted(path.name for path in tmp_path.glob("rank-*"))

    assert fine_tune.mm1(tmp_path, 0) > 0
    assert ranks() == ["rank-alone"]
    assert fine_tune.mm1(tmp_path, 0, processes=2) > 0
    assert ranks() == ["rank-0", "rank-1", "rank-alone"]
    for processes in (1, 2):
        with pytest.raises(fine_tune.subprocess.CalledProcessError):
            fine_tune.mm1(tmp_path, 4, processes=processes)
