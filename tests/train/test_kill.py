"""A run that is killed at any moment goes on as if nothing had been, to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mm1_mlx.runtime import TINY

SCRIPT = Path(__file__).with_name("killed.py")
# Often saved, so that some are killed meanwhile.
FLAGS = (
    *("--save-every", "1", "--log-every", "2", "--batch-size", "2"),
    *("--micro-batches", "2", "--valid-share", "0.2", "--eval-every", "3"),
    *("--learning-rate", "0.01"),
)
# Its keys count too.
DROPOUT = ("--adapter-dropout", "0.2")
# Of a log's line, what is the run's and not the machine's.
MACHINES = ("seconds_per_step", "tokens_per_second", "peak_bytes")


def log(folder):
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MACHINES} for line in lines]


@pytest.fixture
def killed_runs(tmp_path, make_model, write_folder, write_rows):
    """A function: the folders of an undisturbed run and of as many killed ones."""
    model = write_folder(tmp_path / "model", make_model())
    rows = write_rows(tmp_path / "rows", ["red", "blue", "lime", "white"] * 10)

    def killed_runs(count, *flags, model=model, steps=6, seed=0):
        runs = tmp_path / "runs"
        command = ["train", "sft", str(model), "{}", "--data", str(rows), *FLAGS]
        command += ["--steps", str(steps), *flags]
        done = subprocess.run(
            [sys.executable, SCRIPT, runs, str(count), str(seed), "--", *command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        sys.stdout.write(done.stdout)
        counts = json.loads(done.stdout.splitlines()[-1])
        # Others were killed before there was anything to go on from.
        assert counts["begun"] >= count // 4
        *killed, whole = sorted(path for path in runs.iterdir() if path.is_dir())
        assert whole.name == "whole"
        assert len(killed) == count
        assert_equal(whole, killed, steps)
        return counts

    return killed_runs


def assert_equal(whole, killed, steps):
    expected = log(whole)
    # Some are killed between two lines: what both steps lost is in the checkpoint.
    lines = [x["step"] for x in expected if "loss" in x]
    assert lines == [
        step for step in range(1, steps + 1) if step % 2 == 0 or step == steps
    ]
    assert [x["step"] for x in expected if "valid_loss" in x] == [
        step for step in range(steps + 1) if step % 3 == 0
    ]
    last = [f"step-{step:06}" for step in (steps - 1, steps)]
    made = sorted(path for path in whole.glob("*/*.safetensors"))
    assert len(made) == 3
    for folder in killed:
        assert log(folder) == expected, folder
        for path in made:
            twin = folder / path.relative_to(whole)
            assert twin.read_bytes() == path.read_bytes(), twin
        assert sorted(path.name for path in folder.glob("step-*")) == last


def test_killed_runs_go_on_to_the_bit(killed_runs):
    killed_runs(5, *DROPOUT)


@pytest.mark.drill
@pytest.mark.parametrize(
    "options",
    [
        {"flags": ("--packing", "--checkpointing", *DROPOUT), "steps": 12},
        # What is saved is larger, so that more are killed while it is.
        {"flags": ("--full",), "model": TINY, "steps": 9},
    ],
)
def test_fifty_killed_runs_go_on_to_the_bit(options, killed_runs):
    flags = options.pop("flags")
    counts = killed_runs(25, *flags, seed=len(flags), **options)
    if "--full" in flags:
        assert counts["saving"] >= 1


@pytest.mark.drill
def test_killed_runs_in_float16_go_on_to_the_bit(killed_runs):
    """Whose scale is another in the middle of a run."""
    killed_runs(10, "--precision", "float16", *DROPOUT, seed=3)


@pytest.mark.drill
def test_killed_runs_of_muon_with_rates_of_their_own_go_on_to_the_bit(killed_runs):
    rates = ("--decoder-learning-rate", "1e-4", "--vision-learning-rate", "3e-4")
    killed_runs(10, "--full", "--optimizer", "muon", *rates, seed=6)


@pytest.mark.drill
def test_killed_runs_of_experts_go_on_to_the_bit(
    killed_runs, make_model, write_folder, tmp_path
):
    moe = {"num_experts": 4, "every": 1, "offset": 0}
    model = write_folder(tmp_path / "sparse", make_model(decoder={"moe": moe}))
    killed_runs(10, "--full", model=model, seed=4)
