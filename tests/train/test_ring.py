"""Processes that share a step's micro-batches train as one process does."""

import os
import subprocess
import sys

import mlx.core as mx

SCRIPT = """
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.trainer import Trainer

config = TrainConfig(
    steps=3, learning_rate=0.1, warmup_steps=1, decay_steps=0, micro_batches=2
)
mx.random.seed(3)
trainer = Trainer(
    nn.Linear(4, 2),
    lambda model, x: (model(mx.array(x)).square().mean(), mx.array(1)),
    lambda step, shard: [[step + 1.0, shard - 0.5, step * shard, 1.0]],
    config,
    Path(sys.argv[1]) / str(mx.distributed.init().size()),
)
trainer.run(lambda line: None)
"""


def train(folder, environment):
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    return subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )


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
    ring = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            env=os.environ | {"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ring:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "3 micro-batches cannot be shared out among 2 processes" in errors
