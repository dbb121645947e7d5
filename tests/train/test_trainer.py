"""A run learns, averages its micro-batches, and goes on where it was killed."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.chips import Chip
from mm1_mlx.errors import ConfigError
from mm1_mlx.train import trainer
from mm1_mlx.train.budget import step_seconds, training_of
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.loss import next_token_loss
from mm1_mlx.train.optimizer import schedule
from mm1_mlx.train.trainer import Trainer

CONFIG = TrainConfig(
    steps=8,
    learning_rate=3e-3,
    warmup_steps=2,
    decay_steps=4,
    micro_batches=2,
    save_every=3,
    log_every=2,
)


@pytest.fixture
def make_trainer(make_model, batches, tmp_path):
    """A function: a trainer of the same fresh model, in a folder of its own."""

    def make_trainer(name, **changes):
        return Trainer(
            make_model(),
            next_token_loss,
            batches,
            replace(CONFIG, **changes),
            tmp_path / name,
        )

    return make_trainer


def run(trainer):
    lines = []
    trainer.run(lines.append)
    return lines


def assert_equal(trainer, expected):
    pairs = [
        (trainer.model.parameters(), expected.model.parameters()),
        (trainer.optimizer.state, expected.optimizer.state),
    ]
    for left, right in pairs:
        left, right = dict(tree_flatten(left)), dict(tree_flatten(right))
        assert left.keys() == right.keys()
        for name in left:
            assert mx.array_equal(left[name], right[name]), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 7}, "holds a run with seed 0, not 7; choose another folder"),
        ({"optimizer": "muon"}, "holds a run with optimizer 'adamw', not 'muon'"),
    ],
)
def test_a_run_with_other_settings_is_not_continued(fields, message, make_trainer):
    run(make_trainer("first"))
    with pytest.raises(ConfigError, match=message):
        make_trainer("first", **fields).resume()


def test_a_run_may_be_continued_longer(make_trainer):
    run(make_trainer("longer"))
    trainer = make_trainer("longer", steps=CONFIG.steps + 2, save_every=1)
    run(trainer)
    assert trainer.step == CONFIG.steps + 2


def test_the_loss_of_a_tiny_model_falls(make_trainer):
    trainer = make_trainer("falls", steps=40, decay_steps=10, learning_rate=1e-2)
    losses = [trainer.train_step() for _ in range(40)]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_that_goes_on_equals_the_uninterrupted_one(
    optimizer, make_trainer
):
    whole = make_trainer("whole", optimizer=optimizer)
    run(whole)
    stopped = make_trainer("stopped", optimizer=optimizer)
    stopped.folder.mkdir()
    for _ in range(5):
        stopped.train_step()
        if stopped.step == 3:
            stopped.save()
    # As a fresh process: other weights, until the checkpoint of step 3 is read.
    resumed = make_trainer("stopped", optimizer=optimizer)
    resumed.model.update(tree_map(mx.zeros_like, resumed.model.parameters()))
    run(resumed)
    assert resumed.step == whole.step == 8
    assert_equal(resumed, whole)


def test_weights_made_just_before_a_run_are_trained(make_trainer):
    """A worker thread could not evaluate what this thread has not."""
    trainer = make_trainer("made")
    norm = trainer.model.decoder.norm
    norm.weight = norm.weight + 0.5 * mx.ones_like(norm.weight)
    run(trainer)
    assert trainer.step == 8


def test_a_finished_run_has_nothing_to_do(make_trainer):
    finished = make_trainer("finished")
    run(finished)
    again = make_trainer("finished")
    assert run(again) == []
    assert_equal(again, finished)


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_a_step_takes_the_clipped_mean_gradient_of_its_micro_batches(
    clip, make_trainer, make_model, batches, tolerances
):
    trainer, model = make_trainer("mean", clip_norm=clip), make_model()
    grad = nn.value_and_grad(model, next_token_loss)
    optimizer = optim.AdamW(
        schedule(CONFIG, CONFIG.learning_rate),
        [0.9, 0.95],
        weight_decay=CONFIG.weight_decay,
        bias_correction=True,
    )
    # The first step's rate is 0: only the second one moves the weights.
    for step in range(2):
        results = [grad(model, batches(step, shard)) for shard in range(2)]
        n = [count.item() for (_, count), _ in results]
        assert n[0] != n[1]
        mean = tree_map(
            lambda a, b, n=n: (n[0] * a + n[1] * b) / sum(n), *(g for _, g in results)
        )
        clipped, norm = optim.clip_grad_norm(mean, clip)
        assert (norm.item() > clip) == (clip < 1)
        optimizer.update(model, clipped)
        expected = np.average([loss.item() for (loss, _), _ in results], weights=n)
        assert trainer.train_step() == pytest.approx(expected, rel=tolerances["op"])
    # The moments too: AdamW's steps do not show the gradient's scale.
    pairs = [
        (trainer.model.parameters(), model.parameters()),
        (trainer.optimizer.state, optimizer.state),
    ]
    for left, right in pairs:
        left, right = dict(tree_flatten(left)), dict(tree_flatten(right))
        assert left.keys() == right.keys()
        for name, x in left.items():
            # Rounding alone: a key's bias adds the same to every score.
            if "k_proj.bias" not in name:
                largest = mx.abs(right[name]).max()
                difference = mx.abs(x - right[name]).max()
                assert difference <= tolerances["model"] * largest, name


def test_every_micro_batch_is_a_shard_of_its_own(make_trainer, batches):
    asked = []
    trainer = make_trainer("shards", micro_batches=3)
    trainer.batches = lambda *place: asked.append(place) or batches(*place)
    trainer.train_step()
    trainer.train_step()
    # The next step's are made while a step computes.
    for loading in trainer._loading.values():
        loading.result()
    assert sorted(asked) == [(step, shard) for step in range(3) for shard in range(3)]


def test_a_run_keeps_its_record(make_trainer):
    trainer = make_trainer("record")
    lines = run(trainer)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    log = (trainer.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in log] == lines
    record = json.loads((trainer.folder / "run.json").read_text())
    assert TrainConfig.from_dict(record["config"]) == CONFIG
    assert sorted(path.name for path in trainer.folder.iterdir()) == [
        "log.jsonl", "run.json", "step-000006", "step-000008",
    ]  # fmt: skip


def test_what_a_step_takes_is_said_before_the_first(make_trainer, batches, monkeypatch):
    chip = Chip("slow", 0, 1e9, 1e6, ())
    monkeypatch.setattr(trainer, "this_chip", lambda _: chip)
    monkeypatch.setattr(trainer, "allowed", lambda: 7_000_000)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 500)
    begun = make_trainer("said", micro_batches=2)
    told = []

    def expect(forecast):
        assert begun.step == 0
        told.append(forecast)

    begun.run(lambda _: told.append("step"), expect)
    batch, workers = batches(0, 0), len(begun._workers)
    step = training_of(begun.model, batch, "adamw", 2, workers)
    config = begun.model.config
    seconds = step_seconds(chip, config, step)
    assert seconds == step.flops(config) / 1e6
    assert told[1:] == ["step"] * 4
    assert told[0] == {
        "tokens": 2 * batch.tokens.size,
        "bytes": sum(step.bytes(config).values()),
        # With what the model has taken already.
        "free_bytes": 7_000_500,
        "least_seconds": pytest.approx(seconds, rel=5e-3),
    }
    # Where nobody knows the machine, what is known is said.
    monkeypatch.setattr(trainer, "this_chip", lambda _: None)
    monkeypatch.setattr(trainer, "allowed", lambda: None)
    assert begun.forecast().keys() == {"tokens", "bytes"}


def test_a_step_takes_the_seconds_that_are_said_at_least(make_trainer):
    trainer = make_trainer("slower")
    least = trainer.forecast()["least_seconds"]
    assert 0 < least < run(trainer)[0]["seconds_per_step"]


def test_the_log_holds_every_step_once_after_a_stop(make_trainer):
    stopped = make_trainer("logged", log_every=1)
    stopped.folder.mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    (stopped.folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    run(make_trainer("logged", log_every=1))
    logged = (stopped.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, 9))
