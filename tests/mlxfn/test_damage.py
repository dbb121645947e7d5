"""What is wrong with a folder of functions is one line, in Python and in C++."""

import re
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from mlxfn_damage import CASES
from mlxfn_demo import run_demo

from mm1_mlx.errors import CheckpointError
from mm1_mlx.mlxfn import open_program

each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def damaged(exported, tmp_path):
    """A function: a copy of the embedded model's functions, and what is to be said."""

    def damage(case):
        folder = shutil.copytree(exported, tmp_path / "functions")
        change, match = CASES[case]
        change(folder)
        return folder, match

    return damage


@each_case
def test_the_loader_says_it(case, damaged, monkeypatch):
    folder, match = damaged(case)
    if case == "other device":
        # Whatever this machine has.
        monkeypatch.setattr(mx, "is_available", lambda device: device == mx.cpu)
    if "shape" not in match and case not in ("foreign file",):
        # Before mlx sees a file.
        monkeypatch.setattr(mx, "import_function", pytest.fail)
    with pytest.raises(CheckpointError, match=match) as raised:
        open_program(folder)
    assert "\n" not in str(raised.value)


@each_case
def test_the_program_says_it(case, damaged):
    if case == "other device" and mx.is_available(mx.gpu):
        pytest.skip("this machine has the device")
    folder, match = damaged(case)
    status, out, err = run_demo(folder, "What is it?")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(match, err)


def test_an_unharmed_copy_is_read(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "functions")
    assert open_program(folder).sidecar.capacity == 1024
    assert run_demo(folder, "What is it?")[0] == 0


ELSEWHERE = """
import sys, threading
from pathlib import Path
import mlx.core as mx

first = threading.Thread(target=lambda: mx.eval(mx.zeros(1)))
first.start()
first.join()
from mm1_mlx.mlxfn import open_program
open_program(Path(sys.argv[1]))
"""


def test_another_thread_is_told_so(exported):
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, exported], capture_output=True, text=True
    )
    assert "open them on the thread that first used mlx" in run.stderr
