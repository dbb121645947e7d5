"""Processes that share a step's micro-batches train as one process does."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest

from mm1_mlx.hold import LOCK
from mm1_mlx.train.state import saved_steps

SCRIPT = """
import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.errors import MM1Error
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.trainer import Trainer

config = TrainConfig(
    steps=3, learning_rate=0.1, warmup_steps=1, decay_steps=0, micro_batches=2,
    save_every=1,
)
mx.random.seed(3)
rank = mx.distributed.init().rank()
what = sys.argv[2]

def batches(step, shard):
    if what == "die" and (step, rank) == (2, 1):
        os._exit(9)
    # The second has three times as many targets.
    return [[step + 1.0, shard - 0.5, step * shard, 1.0]] * (1 + 2 * shard)

trainer = Trainer(
    nn.Linear(4, 2),
    lambda model, x: (model(mx.array(x)).square().mean(), mx.array(len(x))),
    batches,
    config,
    # Other disks: only the first process's counts.
    Path(sys.argv[1]) / str(mx.distributed.init().size()) / (str(rank) * rank),
)
if what == "stop" and rank == 1:
    trainer.stop()
try:
    whole = trainer.run(lambda line: None)
except MM1Error as error:
    sys.exit(str(error))
sys.exit(0 if whole else 3)
"""


def start_script(environment, *command):
    """A process that runs a script with its arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", *command],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(folder, environment, what="whole"):
    return start_script(environment, SCRIPT, str(folder), what)


def ring_of(hosts, *command):
    """Exit codes and errors of two processes that run a script with its arguments."""
    processes = [
        start_script({"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)}, *command)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], errors


def ring(folder, hosts, what):
    """Exit codes and errors of two processes that train."""
    return ring_of(hosts, SCRIPT, str(folder), what)


def test_two_processes_equal_one(tmp_path, hosts, tolerances):
    ring = [
        train(tmp_path, {"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)})
        for rank in range(2)
    ]
    alone = train(tmp_path, {})
    for process in (*ring, alone):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = (
        mx.load(str(tmp_path / size / "step-000003/state.safetensors"))
        for size in ("1", "2")
    )
    assert one.keys() == two.keys()
    for name in one:
        assert mx.allclose(
            one[name], two[name], rtol=tolerances["op"], atol=tolerances["op"]
        ), name


def test_micro_batches_that_cannot_be_shared_out_are_refused(tmp_path, hosts):
    script = SCRIPT.replace("micro_batches=2", "micro_batches=3")
    codes, errors = ring_of(hosts, script, str(tmp_path), "whole")
    assert codes == [1, 1]
    for said in errors:
        assert "3 micro-batches cannot be shared out among 2 processes" in said


@pytest.mark.slow
def test_where_one_is_told_to_stop_all_do_and_go_on(tmp_path, hosts, tolerances):
    codes, errors = ring(tmp_path, hosts, "stop")
    assert codes == [3, 3], errors
    assert [p.name for p in (tmp_path / "2").glob("step-*")] == ["step-000001"]
    # Told by the first: the other's disk holds no checkpoint.
    codes, errors = ring(tmp_path, hosts, "whole")
    assert codes == [0, 0], errors
    assert not list((tmp_path / "2/1").glob("step-*"))
    alone = train(tmp_path, {})
    assert alone.wait(timeout=120) == 0
    one, two = (
        mx.load(str(tmp_path / size / "step-000003/state.safetensors"))
        for size in ("1", "2")
    )
    for name in one:
        assert mx.allclose(one[name], two[name], rtol=tolerances["op"]), name


def test_one_that_dies_does_not_leave_the_other_waiting(tmp_path, hosts):
    codes, errors = ring(tmp_path, hosts, "die")
    assert codes == [1, 9]
    assert re.search(
        r"^another process of the run has ended \(\[ring\] connection .*\) at step \d; "
        r"the checkpoint of step \d stands; go on with the same command$",
        errors[0],
        re.MULTILINE,
    )


def test_what_the_first_says_all_are_told(hosts):
    script = """
import mlx.core as mx
from mm1_mlx.train.processes import first_text

rank = mx.distributed.init().rank()
assert first_text(["{}", "another"][rank]) == "{}"
assert first_text(["größer, 大", ""][rank]) == "größer, 大"
"""
    codes, errors = ring_of(hosts, script)
    assert codes == [0, 0], errors


def test_what_they_do_not_agree_on_is_named_in_all(hosts):
    script = """
import mlx.core as mx
import mm1_mlx.train.job as job
from mm1_mlx.errors import ConfigError
from mm1_mlx.train.processes import agree

rank = mx.distributed.init().rank()
agree({"the data": "12 rows", "steps": "3"})
try:
    agree({"the data": "12 rows", "steps": str(3 + rank), "seed": str(rank)})
except ConfigError as error:
    assert str(error) == (
        "process 1 of the run and the first one do not agree on steps: 4 and 3; give all "
        "of them the same"
    ), error
else:
    raise AssertionError
# An M1 beside an M3, either first; a CPU beside one.
older, newer, cpu = [mx.float16], [mx.bfloat16, mx.float16], [mx.float32]
for both, kind in (
    ((older, newer), "float16"), ((newer, older), "float16"),
    ((newer, newer), "bfloat16"), ((newer, cpu), "float32"), ((cpu, older), "float32"),
):
    job.device_dtypes = lambda: both[rank]
    assert job._precision() == kind
"""
    codes, errors = ring_of(hosts, script)
    assert codes == [0, 0], errors


@pytest.fixture
def start(tmp_path, make_model, write_folder, write_rows):
    """Start the command on a batch's rows and micro-batches."""
    model = write_folder(tmp_path / "model", make_model())
    # Answers of other lengths: the shards have not as many targets.
    rows = write_rows(
        tmp_path / "rows", ["red", "a blue star", "lime", "two, or more"] * 4
    )

    def start(out, environment, shape, *flags):
        program = "from mm1_mlx.apps.cli import main; main()"
        command = [sys.executable, "-c", program, "train", "sft", str(model), str(out)]
        command += ["--data", str(rows), "--steps", "3", "--log-every", "1"]
        command += ["--batch-size", str(shape[0]), "--micro-batches", str(shape[1])]
        command += ["--warmup-steps", "0", *flags]
        return subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def start_ring(start, hosts):
    """Start the command in two processes, on batches of two in two micro-batches."""

    def start_ring(out, *flags):
        return [
            start(out, {"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)}, (2, 2), *flags)
            for rank in range(2)
        ]

    return start_ring


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "7"])
def test_what_one_refuses_is_a_line_of_the_other(seed, tmp_path, start, start_ring):
    """Before the run is met with and when it is: made without, or with another seed."""
    out = tmp_path / "run"
    if seed == "0":
        (out / "adapter").mkdir(parents=True)
        reason = "error: .*adapter stands, and no checkpoint to go on from"
    else:
        assert start(out, {}, (2, 2), "--steps", "1").wait(timeout=120) == 0
        reason = "error: .* holds a run with seed 0, not 7; choose another folder"
    started = start_ring(out, "--seed", seed)
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1], said
    assert re.search(reason, said[0])
    # Beside what mlx writes there of its sockets.
    ours = [line for line in said[1].splitlines() if not line.startswith("[ring]")]
    assert ours == [
        "error: another process of the run has ended ([ring] connection to a peer was "
        "lost), which says why; mend that, and give all of them the same command"
    ]


@pytest.mark.slow
def test_other_rows_on_another_machine_are_refused(tmp_path, start, hosts, write_rows):
    older = write_rows(tmp_path / "older", ["red", "a blue star"] * 8)
    out = tmp_path / "run"
    started = [
        start(out, {"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)}, (2, 2), *flags)
        for rank, flags in enumerate([(), ("--data", str(older))])
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1], said
    for text in said:
        assert re.search(
            r"error: process 1 of the run and the first one do not agree on the data: "
            r'{"rows": 32, .* and {"rows": 16, ',
            text,
        )
    assert not (out / "run.json").exists()


@pytest.mark.slow
def test_the_command_in_two_processes_equals_it_in_one(
    tmp_path, start, start_ring, tolerances
):
    """In one with twice the batch, and no sum of two."""
    two, one = tmp_path / "two", tmp_path / "one"
    started = [*start_ring(two), start(one, {}, (4, 1))]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert said[0][0] == f"{two / 'adapter'}\n"
    # The second is silent.
    assert said[1] == ("", "")
    logs = [
        [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert len(logs[0]) == len(logs[1]) == 3
    for left, right in zip(*logs, strict=True):
        for name in ("loss", "gradient_norm"):
            assert left[name] == pytest.approx(right[name], rel=tolerances["op"])
    left, right = (
        mx.load(str(out / "adapter/adapter.safetensors")) for out in (one, two)
    )
    for name in left:
        # Adam's first steps are the signs of gradients, which rounding may turn.
        difference = mx.abs(left[name] - right[name]).mean()
        assert difference <= tolerances["model"] * mx.abs(left[name]).max(), name


@pytest.mark.drill
def test_killed_runs_of_two_processes_go_on_to_the_bit(tmp_path, start_ring):
    """One of them or both, at any moment once they met; what is left ends with a line."""
    flags = ("--steps", "12", "--save-every", "1", "--adapter-dropout", "0.2")

    def finish(started):
        said = [process.communicate(timeout=600) for process in started]
        assert [process.returncode for process in started] == [0, 0], said

    def meet(out):
        """The processes, once the first of them holds the folder."""
        started = start_ring(out, *flags)
        while not (out / LOCK).exists():
            assert [process.poll() for process in started] == [None, None]
            time.sleep(0.01)
        return started

    began = time.perf_counter()
    started = meet(tmp_path / "whole")
    met = time.perf_counter()
    finish(started)
    took = time.perf_counter() - met
    whole = (tmp_path / "whole/adapter/adapter.safetensors").read_bytes()
    moments, killed, begun = random.Random(5), 0, 0
    while killed < 10:
        out = tmp_path / f"killed-{killed}"
        started = meet(out)
        time.sleep(moments.uniform(0, 0.95) * took)
        first = moments.randrange(2)
        for process in started[first : first + 1] if killed % 2 else started:
            process.send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=240)[1] for process in started]
        codes = [process.returncode for process in started]
        if codes == [0, 0]:  # It was done before.
            shutil.rmtree(out)
            continue
        assert -signal.SIGKILL in codes
        for code, text in zip(codes, said, strict=True):
            assert code in (0, -signal.SIGKILL) or "has ended" in text, text
        killed += 1
        begun += bool(saved_steps(out))
        finish(start_ring(out, *flags))
        assert (out / "adapter/adapter.safetensors").read_bytes() == whole
    assert begun >= 3
    sys.stdout.write(
        f"{killed} killed, {begun} after a checkpoint, {met - began + took:.1f} s a run\n"
    )
