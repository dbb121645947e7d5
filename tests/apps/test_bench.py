"""``mm1 bench``: a table, Markdown, JSON, and one line where it cannot."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mm1_mlx import bench as benchmark
from mm1_mlx.apps.cli import main
from mm1_mlx.chips import Chip
from mm1_mlx.device import nominal
from mm1_mlx.kernels.report import Row
from mm1_mlx.models import MM1
from mm1_mlx.presets import PRESETS
from mm1_mlx.recipe import find_recipe, plan
from mm1_mlx.runtime import TINY

SMALL = ("-p", "16", "-n", "4", "-r", "2")


@pytest.fixture
def mm1(monkeypatch, capsys):
    """A function: run the command line; its exit status, stdout and stderr."""
    # Reading half a gigabyte takes seconds, and is tested by itself.
    monkeypatch.setattr(
        benchmark, "measure_speed", lambda _: Chip("measured", 0, 1e10, 1e11, ())
    )

    def run(*arguments, columns=80):
        monkeypatch.setattr(sys, "argv", ["mm1", "bench", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        else:
            status = 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def preset(monkeypatch, make_config):
    """The name of a preset that is small; a group of 64 divides its widths."""
    config = make_config(
        decoder={"hidden_size": 64, "head_dim": 64}, connector={"output_size": 64}
    )
    monkeypatch.setitem(PRESETS, "mm1-small", config)
    return "mm1-small"


def test_json_holds_rows_speeds_and_the_machine(mm1):
    status, out, err = mm1(*SMALL, "-d", 32, "--json")
    facts = json.loads(out)
    assert status == 0
    names = [row["name"] for row in facts["rows"]]
    assert names == ["enc1@96", "pp16", "tg4", "tg4@d32", "ttft(1img+56)"]
    for row in facts["rows"]:
        assert row["min"] <= row["median"] <= row["max"]
        assert len(row["seconds"]) == facts["repetitions"] == 2
        assert row["limits"].keys() == {"measured"}
        assert row["limits"]["measured"]["share"] > 0
    model = facts["model"]
    assert (model["name"], model["random_weights"]) == ("mm1-tiny", False)
    assert (model["dtype"], model["bits"]) == ("float32", 32)
    assert facts["load_seconds"] > 0
    assert facts["peak_bytes"] > model["bytes"] > 1e6
    assert facts["speed"]["measured"] == {"bytes_per_second": 1e10, "flops": 1e11}
    assert facts["machine"]["versions"].keys() == {"mm1-mlx", "mlx", "mlx-lm"}
    # What is measured is told, elsewhere.
    assert [line for line in err.splitlines() if line in names] == names


def counted():
    """The embedded model's weights, and what they take in float32."""
    tensors = mx.load(str(TINY / "model.safetensors")).values()
    weights = sum(tensor.size for tensor in tensors)
    return f"{weights / 1e6:.2f} M", f"{4 * weights / 1e6:.1f} MB"


def test_the_table_fits_a_narrow_terminal(mm1):
    status, out, _ = mm1(*SMALL, columns=64)
    assert status == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 64
    weights, size = counted()
    assert lines[0].startswith(f"mm1-tiny: {weights} parameters, {size}, 32 bits")
    (row,) = [line.split() for line in lines if line.startswith(" tg4")]
    assert row[2] == "t/s"
    assert re.fullmatch(r"[\d,.]+\.\.[\d,.]+", row[3])
    assert re.fullmatch(r"\d+% of [\d,.]+", " ".join(row[4:]))
    assert "peak memory" in out
    assert "mlx-lm" in out


def test_markdown_has_the_model_in_every_row(mm1):
    status, out, _ = mm1(*SMALL, "--md")
    assert status == 0
    table = out.partition("\n\n")[0].splitlines()
    header, line, *rows = ([c.strip() for c in x.split("|")[1:-1]] for x in table)
    assert header[:6] == ["model", "size", "params", "backend", "keys", "test"]
    assert set("".join(line)) == {"-", ":"}
    assert [row[5] for row in rows] == ["enc1@96", "pp16", "tg4", "ttft(1img+56)"]
    for row in rows:
        assert len(row) == len(header) == len(line)
        weights, size = counted()
        assert row[:5] == ["mm1-tiny", size, weights, "CPU", "32 bits"]


def test_packed_keys_are_said_in_every_form(mm1):
    few = ("-p", 8, "-n", 2, "-r", 1, "--images", 0)
    _, out, _ = mm1(*few, "-d", 16, "--kv-bits", 8, "--json")
    facts = json.loads(out)
    assert facts["kv"] == {"bits": 8, "group_size": 32}
    assert [row["name"] for row in facts["rows"]][1:3] == ["tg2", "tg2@d16"]
    _, out, _ = mm1(*few, "--kv-bits", 4)
    # The line may be wrapped.
    assert "; keys and values 4 bits in 32s " in " ".join(out.split())
    _, out, _ = mm1(*few, "--kv-bits", 4, "--md")
    assert "| CPU | 4 bits in 32s | pp8 |" in out
    _, out, _ = mm1(*few, "--json")
    assert json.loads(out)["kv"] == {"bits": 32, "group_size": None}


def test_a_known_chips_limits_stand_beside_those_measured(mm1, monkeypatch):
    monkeypatch.setattr(benchmark, "nominal", lambda *_: nominal("Apple M1", 8))
    _, out, _ = mm1(*SMALL, "--json")
    facts = json.loads(out)
    assert facts["speed"]["nominal"]["bytes_per_second"] == 68.25e9
    for row in facts["rows"]:
        assert row["limits"].keys() == {"measured", "nominal"}
        # Its operations and its bytes are both more.
        limits = row["limits"]
        assert limits["nominal"]["share"] < limits["measured"]["share"]
    _, out, _ = mm1(*SMALL, columns=80)
    lines = out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith(" tg4")]
    assert row[4].endswith("%")
    assert row[7].endswith("%")
    assert "GB/s of 68" in out


@pytest.mark.parametrize(
    ("options", "recipe"),
    [((), "4bit"), (("--bits", "16"), None), (("--recipe", "mxfp4"), "mxfp4")],
)
def test_a_preset_has_random_weights(mm1, preset, options, recipe):
    status, out, err = mm1(*SMALL, "--preset", preset, *options, "--json")
    facts = json.loads(out)
    model = facts["model"]
    assert status == 0
    assert (model["name"], model["random_weights"]) == (preset, True)
    assert facts["load_seconds"] is None
    assert f"random weights of {preset}" in err
    packed = plan(find_recipe(recipe), PRESETS[preset]).packed if recipe else {}
    bits = sizes = 0
    for name, tensor in MM1(PRESETS[preset]).tensors().items():
        path, _, leaf = name.rpartition(".")
        way = packed.get(path) if leaf == "weight" else None
        # A group's scale and bias are of 32 bits here, a microscaled one's scale of 8.
        own = 64 if way and way.mode == "affine" else 8
        bits += tensor.size * (way.bits + own / way.group_size if way else 32)
        sizes += tensor.size
    assert model["bytes"] == bits / 8
    assert model["parameters"] == sizes


def test_the_resolution_is_that_of_all_rows(mm1, preset):
    for model in (("--preset", preset), ()):
        size = 16 if model else 96
        _, out, _ = mm1(*SMALL, *model, "--resolution", f"2x{size}", "--json")
        facts = json.loads(out)
        assert facts["model"]["resolution"] == f"2x{size}"
        assert facts["rows"][0]["name"] == f"enc5@{size}"


LONG = "does not run: program_source:12:3: error: use of undeclared identifier 'x'"


def test_kernels_alone(mm1, monkeypatch):
    rows = [
        Row(
            "8 bits", "Apple M9", "agrees to 1e-4", 1e-4, 3e-4, True, "3 times as fast"
        ),
        Row("4 bits", "Apple M9", "failed", None, None, False, "differs | by 1"),
        Row("shared", "Apple M9", "failed", None, None, False, LONG),
    ]
    monkeypatch.setattr("mm1_mlx.kernels.kernel_report", lambda _: rows)
    status, out, err = mm1("--kernels", columns=80)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split() for line in lines if line.startswith(" 8 bits")] == [
        ["8", "bits", "100", "us", "300", "us", "kernel"]
    ]
    # Whole, however narrow the terminal is, and a line each for programs.
    assert lines[-4:] == [
        "Device: Apple M9",
        "8 bits: 3 times as fast (check: agrees to 1e-4)",
        "4 bits: differs | by 1 (check: failed)",
        f"shared: {LONG} (check: failed)",
    ]
    _, out, _ = mm1("--kernels", "--md")
    assert out.splitlines()[-2] == (
        "| 4 bits |  |  | plain | Apple M9 | failed | differs \\| by 1 |"
    )
    _, out, _ = mm1("--kernels", "--json")
    assert json.loads(out)[0] == {
        "kernel": "8 bits", "device": "Apple M9", "check": "agrees to 1e-4",
        "seconds": 1e-4, "other_seconds": 3e-4, "chosen": True, "why": "3 times as fast",
    }  # fmt: skip


def test_kernels_on_a_cpu_say_so(mm1):
    status, out, _ = mm1("--kernels", "--json")
    assert status == 0
    assert {row["why"] for row in json.loads(out)} == {"no Metal here"}
    _, out, _ = mm1("--kernels", columns=80)
    assert out.splitlines()[-1] == "all: no Metal here (check: not run)"


def test_kernels_say_why_in_a_pipe():
    program = Path(sys.executable).with_name("mm1")
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    done = subprocess.run(
        [program, "bench", "--kernels"],
        env=environment | {"MM1_KERNELS": "off"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "all: MM1_KERNELS=off (check: not run)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "mm1-8b"), "preset 'mm1-8b' is not one of ['mm1-1.2b'"),
        (("--preset", "afm-3b", "--images", "1"), "text only; pass --images 0"),
        (("--preset", "afm-3b", "--resolution", "672"), "takes no pictures"),
        (("-d", "5000", "--preset", "mm1-3b"), "context holds 4,096; pass a smaller"),
        (("--images", "25"), "at most 24"),
        (("-m", "nowhere/at/all"), "does not exist"),
        (("--preset", "mm1-3b", "--recipe", "5bit"), "'5bit' is not one of"),
        (("-p", "5000"), "context holds 1,024; pass a smaller"),
        (("--resolution", "97"), "are not a multiple"),
    ],
)
def test_what_cannot_be_measured_is_one_line(mm1, monkeypatch, options, message):
    # Told before anything is measured, or a model loaded.
    monkeypatch.setattr(benchmark, "measure_speed", pytest.fail)
    monkeypatch.setattr("mm1_mlx.runtime.load", pytest.fail)
    status, out, err = mm1(*options)
    assert (status, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_a_preset_that_will_not_fit_is_refused_with_numbers(mm1, monkeypatch):
    monkeypatch.setattr("mm1_mlx.budget.allowed", lambda: 6 << 30)
    monkeypatch.setattr("mm1_mlx.bench.synthetic.pack_deferred", pytest.fail)
    monkeypatch.setattr(benchmark, "measure_speed", pytest.fail)
    status, _, err = mm1("--preset", "mm1-30b")
    assert status == 1
    assert re.search(r"mm1-30b needs [\d.]+ GB .* but 6.4 GB are free here", err)


@pytest.mark.parametrize(
    "options",
    [
        ("-m", TINY, "--preset", "mm1-3b"),
        ("--preset", "mm1-3b", "--bits", "4", "--recipe", "4bit"),
        ("--bits", "4"),
        ("--preset", "mm1-3b", "--bits", "5"),
        ("--dtype", "float64"),
        ("--kv-bits", "5"),
        ("--json", "--md"),
        ("-r", "0"),
    ],
)
def test_options_that_contradict_each_other_are_usage_errors(mm1, options):
    status, out, err = mm1(*options)
    assert (status, out) == (2, "")
    assert "Usage: mm1 bench" in err
