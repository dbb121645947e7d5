"""``mm1 export coreml`` from the command line: what it prints, writes and refuses."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm1_mlx.apps.cli import main
from mm1_mlx.runtime import TINY


@pytest.fixture
def mm1(monkeypatch, capfd):
    """Run the command; exit status, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_it_writes_checks_and_says_so(mm1, tmp_path):
    out = tmp_path / "E.mlpackage"
    star = TINY / "red-star.png"
    code, stdout, stderr = mm1("export", "coreml", TINY, "-o", out, "-i", star)
    assert (code, stdout) == (0, "")
    checked, written = stderr.splitlines()
    assert checked.startswith("96 pixels: 0.000")
    assert "numbers reach" in checked
    made = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert written == f"{out}: {made / 1e6:.1f} MB"
    code, _, stderr = mm1("export", "coreml", TINY, "-o", out)
    assert code == 1
    assert stderr.startswith(f"error: '{out}' already exists")
    assert stderr.count("\n") == 1


def test_json_is_one_object(mm1, tmp_path):
    out = tmp_path / "E.mlpackage"
    options = ("--precision", "4bit", "--resolution", "96,128", "--input", "tensor")
    code, stdout, stderr = mm1("export", "coreml", TINY, "-o", out, *options, "--json")
    assert (code, stderr) == (0, "")
    made = json.loads(stdout)
    assert made["sizes"] == [96, 128]
    assert made["precision"] == "4bit"
    assert made["bytes"] > 300_000
    assert made["errors"].keys() == {"96", "128"}
    # mm1-tiny's real weights; measured 0.13.
    assert 0.01 < made["errors"]["96"][-1]["l2"] < 0.2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-o", "E.mlpackage", "--resolution", "96,x"], 2, "names no sizes"),
        (["-o", "E.mlpackage", "--resolution", "97"], 1, "not a multiple of the"),
        (["-o", "E.mlpackage", "--resolution", "99999"], 1, "not a multiple|patches"),
        (["-o", "E.mlpackage", "--resolution", "96000"], 1, "patches, more than"),
        (["-o", "E.zip"], 1, r"end it with \.mlpackage"),
        (["-o", "E.mlpackage", "--no-check", "-i", "a.png"], 2, "--check compares"),
        (["-o", "E.mlpackage", "-i", "nowhere.png"], 1, r"nowhere\.png"),
    ],
)
def test_what_cannot_be_is_refused(arguments, code, said, mm1, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended, stdout, stderr = mm1("export", "coreml", TINY, *arguments)
    assert (ended, stdout) == (code, "")
    assert re.search(said, " ".join(stderr.split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_one_that_is_stopped_leaves_nothing(kind, tmp_path):
    out = tmp_path / "E.mlpackage"
    command = [
        Path(sys.executable).with_name("mm1"),
        "export",
        "coreml",
        TINY,
        "-o",
        out,
        # So much to do that it is still at work when a busy machine gets to the signal.
        "--resolution",
        "56,112,168,224,280",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as child:
        # It is at work from the moment its folder is there.
        while child.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.02)
        child.send_signal(kind)
        child.communicate()
    assert child.returncode in (128 + kind, -kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "darwin", reason="here it is not refused")
def test_elsewhere_a_package_answers_nothing(mm1):
    code, stdout, stderr = mm1("generate", "-p", "What?", "--vision-backend", "coreml")
    assert (code, stdout) == (1, "")
    assert stderr.startswith("error: Core ML needs macOS; answer with")
    assert stderr.count("\n") == 1


def test_without_coremltools_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['coremltools'] = None\n"
        "from mm1_mlx.apps.cli import main\n"
        f"sys.argv = ['mm1', 'export', 'coreml', {str(TINY)!r}, '-o', 'E.mlpackage']\n"
        "main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        'error: Core ML packages need coremltools; pip install "mm1-mlx[coreml]"\n'
    )
