"""What only a Mac can say is put together from what the commands really print."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from benchmarks import depths, mac_proof
from benchmarks.mac_proof import (
    assemble,
    failures,
    file_name,
    largest_preset,
    metal_tests,
    trained,
)
from mm1_mlx import bench
from mm1_mlx.apps.cli import app
from mm1_mlx.bench.synthetic import synthetic_model
from mm1_mlx.chips import Chip
from mm1_mlx.kernels.choice import switch
from mm1_mlx.presets import PRESETS
from mm1_mlx.runtime import TINY
from mm1_mlx.train.record import add_line

ROOT = Path(__file__).parents[2]
MACHINE = {"chip": "Apple M4 Max", "gpu_cores": 40, "commit": "0123456789ab"}
REPORT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_metal" name="test_a"/>
<testcase classname="tests.kernels.test_metal" name="test_b[8]">{}</testcase>
<testcase classname="tests.kernels.test_metal" name="test_c"><skipped/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def run(monkeypatch, make_config, capsys):
    """Runs mm1's commands in this process, and of pytest's only what it reports."""
    monkeypatch.setattr(
        bench, "measure_speed", lambda _: Chip("measured", 0, 1e10, 1e11, ())
    )
    small = make_config(
        decoder={
            "hidden_size": 64, "head_dim": 64, "max_position_embeddings": 4096,
        },
        connector={"output_size": 64},
    )  # fmt: skip
    for name in mac_proof.PRESETS:
        monkeypatch.setitem(PRESETS, name, small)

    def run(command):
        program, *options = command
        run.commands.append(options)
        if options[:2] == ["-m", "pytest"]:
            (report,) = [x for x in options if x.startswith("--junitxml=")]
            if run.report is None:
                return 4, "", "pytest is not installed"
            Path(report.removeprefix("--junitxml=")).write_text(run.report)
            return int("<failure" in run.report), "", ""
        if options[:2] == ["-m", "benchmarks.depths"]:
            few = ["--depths", "8", "16", "24", "--decoded", "3", "--rounds", "2"]
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", ["depths", *options[2:], *few])
                depths.main()
            return 0, capsys.readouterr().out, ""
        if options == ["-m", "benchmarks.coreml_mac"]:
            return 0, json.dumps({"rows": ["measured"]}), ""
        assert Path(program).name == "mm1"
        if options[0] == "quantize" and not run.trains:
            return 0, "", ""
        if options[0] == "train" and not run.trains:
            return write_run(Path(options[3]), run.losses)
        # As often as needed here, not as a measurement needs it.
        benched = options[0] == "bench" and "--kernels" not in options
        quick = ["-r", "1", "-p", "8", "-n", "2"] if benched else []
        quick += ["--batch-size", "1"] if options[0] == "train" else []
        options += quick
        result = CliRunner().invoke(app, options)
        return result.exit_code, result.stdout, str(result.exception)

    run.commands = []
    run.report = REPORT.format("")
    # Whether models are trained here, and else what the logs say.
    run.trains, run.losses = False, [3.0] * 4 + [1.0] * 4
    return run


def write_run(out, losses):
    """Leave what is read of a run's folder."""
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"config": {"precision": "bfloat16"}}))
    for step, loss in enumerate(losses, 1):
        speed = {"tokens_per_second": 100.0 * step, "peak_bytes": 5000 - step}
        add_line(out, {"step": step, "loss": loss, **speed})
    return 0, "", ""


def test_one_object_holds_all_of_it(run):
    proof = json.loads(json.dumps(assemble(run, MACHINE, 100e9)))
    assert proof["machine"] == MACHINE
    assert proof["tests"] == {"run": 2, "skipped": 1, "failed": []}
    assert proof["bench"].keys() == {"mm1-tiny", "mm1-7b"}
    for name, facts in proof["bench"].items():
        assert facts["model"]["name"] == name
        assert {"pp8", "tg2", "ttft(1img+56)"} <= {r["name"] for r in facts["rows"]}
    assert "tg2@d2048" in {row["name"] for row in proof["bench"]["mm1-7b"]["rows"]}
    assert {row["why"] for row in proof["kernels"]} == {"no Metal here"}
    assert "mm1-tiny" in proof["doctor"]
    assert proof["core_ml"] == {"rows": ["measured"]}
    assert proof["train"].keys() == {"lora", "qlora", "float16"}
    assert proof["train"]["qlora"] == {
        "precision": "bfloat16", "steps": 8, "loss": [3.0, 1.0],
        "tokens_per_second": 450.0, "peak_bytes": 4999,
    }  # fmt: skip
    rows = proof["depths"]["rows"]
    assert [(row["kv_bits"], row["depth"]) for row in rows] == [
        (bits, depth) for bits in (None, 8, 4) for depth in (8, 16, 24)
    ]
    for row in rows:
        assert {switch: len(x) for switch, x in row["runs"].items()} == {
            "on": 2, "off": 2,
        }  # fmt: skip
        rates = row["tokens_per_second"]
        assert row["on_to_off"] == rates["on"] / rates["off"] > 0
    assert failures(proof) == []
    assert run.commands[0][:3] == ["-m", "pytest", "-m"]


@pytest.mark.parametrize(
    ("report", "failed", "error"),
    [
        (REPORT.format("<failure/>"), ["tests.kernels.test_metal::test_b[8]"],
         "1 of 2 tests failed"),
        ("<testsuites/>", [], "0 of 0 tests failed"),
        (None, None, "pytest is not installed"),
    ],
)  # fmt: skip
def test_tests_that_fail_or_do_not_run_are_an_error(run, report, failed, error):
    run.report = report
    found = metal_tests(run, sys.executable)
    assert found.get("failed") == failed
    assert failures({"tests": found, "kernels": [{}]}) == [error]


def test_a_command_that_fails_leaves_its_error(run):
    def broken(command):
        return (1, "", "error: no room") if "doctor" in command else run(command)

    proof = assemble(broken, MACHINE, 0)
    assert proof["doctor"] == {"error": "error: no room"}
    # Nor has anything room in nothing.
    assert proof["bench"].keys() == {"mm1-tiny"}
    assert failures(proof) == ["error: no room"]


def test_the_embedded_model_is_trained_in_every_way(run, monkeypatch):
    """Once of each, of one row: on this CPU half precision is slow."""
    monkeypatch.setattr(mac_proof, "STEPS", 2)
    monkeypatch.setattr(mac_proof, "ENDS", 1)
    monkeypatch.setattr(mac_proof, "ROWS", 1)
    run.trains = True
    found = trained(run, "mm1")
    assert failures(found) == []
    assert [x["precision"] for x in found.values()] == ["float32"] * 2 + ["float16"]
    packed = run.commands[0]
    assert packed[0] == "quantize"
    models = [command[2] for command in run.commands[1:]]
    assert models == [str(TINY), packed[2], str(TINY)]
    for way in found.values():
        assert way["steps"] == 2
        assert way["loss"][1] < way["loss"][0]
        assert way["tokens_per_second"] > 0
        assert way["peak_bytes"] > 2_000_000


@pytest.mark.parametrize(
    ("losses", "error"),
    [
        ([2.0, 1.0] * 4, "the loss went from 1.5 to 1.5"),
        ([float("nan"), *[1.0] * 7], "the loss went from nan to 1"),
    ],
)
def test_what_does_not_learn_is_an_error(run, losses, error):
    run.losses = losses
    assert failures(trained(run, "mm1")) == [error] * 3


def test_a_copy_that_cannot_be_made_leaves_its_error(run):
    def broken(command):
        return (1, "", "error: no room") if command[1] == "quantize" else run(command)

    found = trained(broken, "mm1")
    assert found["qlora"] == {"error": "error: no room"}
    assert failures(found) == ["error: no room"]


def test_commands_are_run_in_the_checkout(capfd):
    program = (
        "import os, sys; print(os.getcwd()); print('a\\nb', file=sys.stderr); exit(3)"
    )
    assert mac_proof.run([sys.executable, "-c", program]) == (3, f"{ROOT}\n", "b")
    assert capfd.readouterr().err == "a\nb\n"


def test_the_preset_is_the_largest_that_has_room():
    # What a Mac of 8 and of 16 GB lets its GPU use, and too little for any.
    assert largest_preset(5.7e9) == "mm1-3b"
    assert largest_preset(11.4e9) == "mm1-7b"
    assert largest_preset(2.8e9) is None


def test_every_chip_has_a_file_of_its_own():
    assert file_name(MACHINE) == "m4-max-40.json"
    assert file_name({"chip": "Apple M1", "gpu_cores": None}) == "m1.json"


def test_without_metal_it_says_so_in_one_line(tmp_path):
    import mlx.core as mx

    if mx.metal.is_available():
        pytest.skip("this is a Mac")
    command = [sys.executable, "-m", "benchmarks.mac_proof", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: this machine has no Metal; run it on a Mac\n"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_mac_writes_the_file_and_fails_with_its_steps(
    run, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr(bench, "describe", lambda *_: MACHINE)
    monkeypatch.setattr(mac_proof, "run", run)
    monkeypatch.setattr(sys, "argv", ["mac_proof", "--out", str(tmp_path / "results")])
    run.report = REPORT.format("<failure/>")
    assert mac_proof.main() == 1
    path = tmp_path / "results/m4-max-40.json"
    out, err = capsys.readouterr()
    assert out == f"{path}\n"
    assert err.splitlines()[-1:] == ["error: 1 of 2 tests failed"]
    assert json.loads(path.read_text())["tests"]["run"] == 2
    run.report = REPORT.format("")
    assert mac_proof.main() == 0


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_every_turn_decodes_behind_the_same_keys_by_either_road(
    make_config, monkeypatch, bits
):
    config = make_config(
        decoder={"hidden_size": 64, "head_dim": 64}, connector={"output_size": 64}
    )
    model = synthetic_model("small", config, {}, mx.float32)
    seen, decode = [], depths.decode

    def watched(model, token, cache, *rest):
        packed = {getattr(layer, "bits", None) for layer in cache}
        seen.append((switch(), cache[0].offset, packed))
        return decode(model, token, cache, *rest)

    monkeypatch.setattr(depths, "decode", watched)
    monkeypatch.setattr(depths, "KV_BITS", (bits,))
    monkeypatch.setenv("MM1_KERNELS", "on")
    rows = list(depths.sweep(model, (8, 16), 3, 1))
    assert seen == [
        (way, depth, {bits}) for depth in (8, 16) for way in ("on", "off") * 2
    ]
    assert [row["depth"] for row in rows] == [8, 16]
    assert switch() == "on"


def test_depths_without_room_are_left_out_with_the_numbers(make_config, monkeypatch):
    config = make_config(
        decoder={"hidden_size": 64, "head_dim": 64}, connector={"output_size": 64}
    )
    model = synthetic_model("small", config, {}, mx.float32)
    monkeypatch.setattr(depths, "allowed", lambda: 1000)
    monkeypatch.setattr(depths, "prefill", pytest.fail)
    rows = list(depths.sweep(model, (8,), 3, 1))
    assert len(rows) == 3
    assert all("1,000 are free" in row["left_out"] for row in rows)


def test_behind_a_depth_that_is_left_out_all_is_read(make_config, monkeypatch):
    config = make_config(
        decoder={"hidden_size": 64, "head_dim": 64}, connector={"output_size": 64}
    )
    model = synthetic_model("small", config, {}, mx.float32)
    asked = []

    def no_room(_model, _kv, before, positions):
        asked.append(before)
        return "full" if positions == 16 + 3 else None

    read, prefill = [], depths.prefill

    def watched(model, context):
        read.append((context.reused, len(context.prompt.tokens)))
        return prefill(model, context)

    monkeypatch.setattr(depths, "_no_room", no_room)
    monkeypatch.setattr(depths, "prefill", watched)
    monkeypatch.setattr(depths, "KV_BITS", (None,))
    rows = list(depths.sweep(model, (8, 16, 24), 3, 1))
    assert [row.get("left_out") for row in rows] == [None, "full", None]
    assert asked == [0, 8, 8]
    assert read == [(0, 8), (8, 24)]
