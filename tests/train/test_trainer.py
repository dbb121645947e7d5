"""A run learns, averages its micro-batches, and goes on where it was killed."""

import errno
import json
import shutil
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.chips import Chip
from mm1_mlx.errors import CheckpointError, ConfigError, DataError
from mm1_mlx.train import trainer as trainer_module
from mm1_mlx.train.budget import step_seconds, training_of
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.gradients import AHEAD
from mm1_mlx.train.loss import next_token_loss
from mm1_mlx.train.optimizer import schedule
from mm1_mlx.train.record import read_log
from mm1_mlx.train.state import STATE, saved_steps
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

    def make_trainer(name, batches=batches, valid=(), record=None, **changes):
        return Trainer(
            make_model(),
            next_token_loss,
            batches,
            replace(CONFIG, **changes),
            tmp_path / name,
            valid=valid,
            record=record,
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


def test_a_run_that_stands_further_is_not_cut_back(make_trainer):
    run(make_trainer("cut"))
    with pytest.raises(
        ConfigError,
        match=r"cut stands at step 8, beyond the 6 that are asked for; give --steps 8 or",
    ):
        run(make_trainer("cut", steps=6))


def test_what_a_run_is_made_of_is_known_by_its_digest(make_trainer):
    made_of = {"data": {"rows": 3, "digest": "a", "lies": "here"}}
    run(make_trainer("made", record=made_of))
    assert make_trainer("made", record={"data": {"digest": "a"}}).resume()
    for digest in ("b", None):
        with pytest.raises(ConfigError, match="holds a run of another data; choose"):
            make_trainer("made", record={"data": {"digest": digest}}).resume()


def test_a_damaged_checkpoint_neither_stands_nor_is_kept(make_trainer, batches):
    run(make_trainer("damaged", batches=batches))
    folder = make_trainer("damaged").folder
    assert saved_steps(folder) == [6, 8]
    (folder / "step-000008" / STATE).write_bytes(b"cut off")
    broken = Broken(batches, 6)
    with pytest.raises(
        DataError, match=r"'a.png'; the checkpoint of step 6 stands; put"
    ):
        run(make_trainer("damaged", batches=broken))
    broken.mended = True
    run(make_trainer("damaged", batches=broken, steps=9, save_every=7))
    assert saved_steps(folder) == [7, 9]


class Broken:
    """Batches, one of which cannot be made until it is mended."""

    def __init__(self, batches, step):
        self.batches, self.step, self.mended = batches, step, False

    def __call__(self, step, shard):
        if step == self.step and shard and not self.mended:
            raise DataError("rows.jsonl:18: there is no picture 'a.png'")
        return self.batches(step, shard)


def test_a_row_that_cannot_be_used_costs_no_step(make_trainer, batches):
    broken = Broken(batches, 5)
    # None is saved before the end.
    settings = {"save_every": 100, "log_every": 3}
    with pytest.raises(
        DataError,
        match=r"^rows.jsonl:18: there is no picture 'a.png'; the checkpoint of step 5 "
        r"stands; put back .* \(--skip-bad\), and go on with the same command$",
    ):
        run(make_trainer("row", batches=broken, **settings))
    broken.mended = True
    whole = make_trainer("whole", **settings)
    lines = run(whole)
    # What becomes of bad rows may change.
    resumed = make_trainer("row", batches=broken, skip_bad=True, **settings)
    assert machine_free(*run(resumed)) == machine_free(*lines[1:])
    assert_equal(resumed, whole)
    with pytest.raises(
        DataError, match=r"^rows.jsonl:18: there is no picture 'a.png'$"
    ):
        run(make_trainer("first", batches=Broken(batches, 0), **settings))


def machine_free(*lines):
    """Log lines without what is the machine's."""
    machines = ("seconds_per_step", "tokens_per_second", "peak_bytes")
    return [{k: v for k, v in x.items() if k not in machines} for x in lines]


def test_a_line_is_of_all_steps_since_the_last(make_trainer, batches):
    lines = run(make_trainer("lines", log_every=3))
    assert [line["step"] for line in lines] == [3, 6, 8]
    single = make_trainer("single")
    losses = [single.train_step() for _ in range(8)]
    learned = [
        sum(batches(step, shard).learned[:, 1:].sum() for shard in range(2))
        for step in range(8)
    ]
    assert len(set(learned)) > 1
    for line, first in zip(lines, (0, 3, 6), strict=True):
        place = slice(first, line["step"])
        mean = np.average(losses[place], weights=learned[place])
        assert line["loss"] == pytest.approx(mean, rel=1e-12)


def test_a_line_is_the_same_behind_a_checkpoint_between_two(make_trainer):
    whole = run(make_trainer("whole", log_every=4))
    stopped = make_trainer("stopped", log_every=4)
    stopped.folder.mkdir()
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    lines = run(make_trainer("stopped", log_every=4))
    assert machine_free(*lines) == machine_free(*whole)


def test_the_held_out_loss_is_measured_before_the_first_step(make_trainer, batches):
    trainer = make_trainer("held", valid=[batches(90, 0)], eval_every=8)
    untrained = trainer.validate()
    lines = run(trainer)
    held = [x for x in lines if "valid_loss" in x]
    assert [x["step"] for x in held] == [0, 8]
    assert held[0]["valid_loss"] == untrained
    assert lines[0] == held[0]
    # Once each, also where the run was killed before its first checkpoint.
    for path in trainer.folder.glob("step-*"):
        shutil.rmtree(path)
    again = run(make_trainer("held", valid=[batches(90, 0)], eval_every=8))
    assert machine_free(*read_log(trainer.folder)) == machine_free(*again)
    assert machine_free(*again) == machine_free(*lines)


def test_a_held_out_loss_that_is_infinite_is_null_and_ends_nothing(
    make_model, batches, tmp_path
):
    def loss(model, batch):
        value, *rest = next_token_loss(model, batch)
        return value if model.training else value * mx.inf, *rest

    config = replace(CONFIG, eval_every=8)
    trainer = Trainer(
        make_model(), loss, batches, config, tmp_path, valid=[batches(90, 0)]
    )
    lines = run(trainer)
    assert trainer.step == 8
    held = [x for x in lines if "valid_loss" in x]
    assert held == [{"step": 0, "valid_loss": None}, {"step": 8, "valid_loss": None}]
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()


class Unusable(list):
    def __getitem__(self, index):
        raise DataError("held.jsonl:2: it has no answer")


def steps_of(lines, what="valid_loss"):
    return [line["step"] for line in lines if what in line]


def test_who_stops_a_run_waits_for_no_measurement(make_trainer, batches):
    held = [batches(90, 0), batches(91, 0)]
    settings = {"valid": held, "eval_every": 2, "save_every": 4, "log_every": 1}
    whole = run(make_trainer("whole", **settings))
    trainer = make_trainer("stopped", **settings)
    told = []
    # It is told to stop in the step behind which it would measure.
    assert not trainer.run(
        lambda line: told.append(line) or (line["step"] == 1 and trainer.stop())
    )
    assert (trainer.step, steps_of(told)) == (2, [0])
    assert [x.name for x in trainer.folder.glob("step-*")] == ["step-000002"]
    # What was left out then comes when it goes on; here it is left out once more.
    again = make_trainer("stopped", **settings)
    moments = []

    def watch(moment):
        moments.append(moment)
        again.stop()

    assert not again.run(told.append, watch=watch)
    assert [moment[:3] for moment in moments] == [(2, 1, 2)]
    assert steps_of(told) == [0]
    resumed = run(make_trainer("stopped", **settings))
    assert machine_free(*told, *resumed) == machine_free(*whole)


def test_where_a_run_is_is_told_at_every_step_and_held_out_batch(
    make_trainer, batches, monkeypatch
):
    # Each look at the clock is a second: a step, and a held-out batch, takes one.
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    held = [batches(90, 0), batches(91, 0)]
    trainer = make_trainer("told", valid=held, steps=6, log_every=5, save_every=4)
    moments = []
    trainer.run(lambda _: None, watch=moments.append)
    measured = [(step, n, 2) for step in (0, 4, 6) for n in (1, 2)]
    done = [(step, 0, 0) for step in range(1, 7)]
    assert [moment[:3] for moment in moments] == sorted(
        measured + done, key=lambda x: x[::2]
    )
    left = {moment[:3]: moment.seconds_left for moment in moments}
    assert left[0, 1, 2] is None
    # Steps, and two measurements of two batches each.
    assert left[1, 0, 0] == 5 + 4
    assert left[4, 0, 0] == 2 + 4
    assert left[4, 1, 2] == 2 + 1 + 2
    assert left[5, 0, 0] == 1 + 2
    assert left[6, 2, 2] == 0


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[malloc] Unable to allocate 68719476736 bytes."),
        RuntimeError(
            "[metal::malloc] Attempting to allocate 9 bytes which is greater than the "
            "maximum allowed buffer size of 8 bytes."
        ),
        RuntimeError(
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:"
            "kIOGPUCommandBufferCallbackErrorOutOfMemory)"
        ),
        MemoryError(),
    ],
    ids=["cpu", "size", "gpu", "python"],
)
def test_memory_that_ends_costs_no_step(error, make_trainer, monkeypatch):
    trainer = make_trainer("memory", save_every=100)
    teach = trainer._gradients._teach

    def ends(step, shard):
        if step == 3 and shard:
            raise error
        return teach(step, shard)

    monkeypatch.setattr(trainer._gradients, "_teach", ends)
    with pytest.raises(
        ConfigError,
        match=r"^step 4 finds no memory beyond the [\d.]+ .B that it had \(.+\); the "
        r"checkpoint of step 3 stands; close other programs, or add --checkpointing, and "
        r"go on with the same command; else begin in another folder with smaller",
    ):
        run(trainer)
    whole = make_trainer("whole")
    run(whole)
    # The way out that is named.
    resumed = make_trainer("memory", save_every=100)
    run(resumed)
    assert_equal(resumed, whole)


def test_memory_that_ends_while_weights_change_leaves_the_step_before(
    make_trainer, monkeypatch
):
    trainer = make_trainer("torn")
    update = trainer.optimizer.update

    def ends(*arguments):
        update(*arguments)
        if trainer.step == 4:
            raise RuntimeError("[malloc] Unable to allocate 8 bytes.")

    monkeypatch.setattr(trainer.optimizer, "update", ends)
    # Step 4 is done, but its weights are gone.
    with pytest.raises(
        ConfigError, match=r"step 5 .*; the checkpoint of step 3 stands"
    ):
        run(trainer)


def test_other_faults_are_no_lack_of_memory(make_trainer, monkeypatch):
    trainer = make_trainer("fault")
    fault = RuntimeError("a fault of ours, in malloc")
    monkeypatch.setattr(trainer, "train_step", lambda: (_ for _ in ()).throw(fault))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run(trainer)


def test_a_log_that_cannot_be_written_is_one_line(make_trainer, monkeypatch):
    settings = {"save_every": 100, "log_every": 1}
    whole = run(make_trainer("whole", **settings))
    trainer = make_trainer("full", **settings)
    add_line = trainer_module.add_line

    def full(folder, line):
        if line["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        add_line(folder, line)

    monkeypatch.setattr(trainer_module, "add_line", full)
    with pytest.raises(
        CheckpointError,
        match=r"^'.*log.jsonl' cannot be written \(No space left on device\); the "
        r"checkpoint of step 3 stands; free some room and go on with the same command$",
    ):
        run(trainer)
    monkeypatch.setattr(trainer_module, "add_line", add_line)
    resumed = run(make_trainer("full", **settings))
    assert machine_free(*resumed) == machine_free(*whole[3:])


def test_a_held_out_row_that_cannot_be_used_is_met_before_a_step(make_trainer):
    with pytest.raises(DataError, match=r"^held.jsonl:2: it has no answer$"):
        run(make_trainer("bad", valid=Unusable([1])))
    # Nor are steps lost where it came later.
    stopped = make_trainer("later")
    stopped.folder.mkdir()
    stopped.train_step()
    stopped.save()
    resumed = make_trainer("later", valid=Unusable([1]))
    with pytest.raises(DataError, match=r"no answer; the checkpoint of step 1 stands"):
        run(resumed)
    assert resumed.step == 1


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
    trainer = make_trainer(
        "shards",
        batches=lambda *place: asked.append(place) or batches(*place),
        micro_batches=3,
    )
    # The first one says what a step will take, and is not made again.
    assert asked == [(0, 0)]
    trainer.train_step()
    trainer.train_step()
    # The next ones are made while a step computes, and no more than those.
    for loading in trainer._gradients._coming.values():
        loading.result()
    order = [(step, shard) for step in range(3) for shard in range(3)]
    assert asked == order[: 6 + AHEAD]


def test_few_batches_are_in_memory_at_once(make_trainer, batches):
    held, most = [], []

    def counted(*place):
        batch = batches(*place)
        held[:] = [reference for reference in held if reference()]
        held.append(weakref.ref(batch))
        most.append(len(held))
        return batch

    trainer = make_trainer("few", batches=counted, micro_batches=12)
    for _ in range(2):
        trainer.train_step()
    # The first of all is the caller's, and one that was used may be about to go.
    assert max(most) <= trainer._gradients.parallel + AHEAD + 2


def test_held_out_batches_are_made_ahead_in_their_order(make_trainer):
    trainer = make_trainer("ahead")
    asked = []

    class Listed(list):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    made = trainer._gradients.ahead(Listed("abcdefg"), range(1, 7, 2))
    assert next(made) == "b"
    assert len(asked) <= 1 + AHEAD
    assert [*made] == ["d", "f"]
    assert asked == [1, 3, 5]


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


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_micro_batches_side_by_side_ask_for_a_thread_a_product(
    micro_batches, make_trainer, monkeypatch
):
    entered = []

    @contextmanager
    def alone():
        entered.append(True)
        yield

    monkeypatch.setattr(trainer_module, "one_thread_a_product", alone)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    trainer = make_trainer("beside", micro_batches=micro_batches)
    trainer.run(lambda _: None)
    on_cpu = mx.default_device() == mx.cpu
    assert len(entered) == (micro_batches - 1 if on_cpu else 0)


def test_what_a_step_takes_is_said_before_the_first(make_trainer, batches, monkeypatch):
    chip = Chip("slow", 0, 1e9, 1e6, ())
    monkeypatch.setattr(trainer_module, "this_chip", lambda _: chip)
    monkeypatch.setattr(trainer_module, "allowed", lambda: 7_000_000)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 500)
    begun = make_trainer("said", micro_batches=2)
    told = []

    def expect(forecast):
        assert begun.step == 0
        told.append(forecast)

    begun.run(lambda _: told.append("step"), expect)
    batch, workers = batches(0, 0), begun._gradients.parallel
    step = training_of(begun.model, batch, "adamw", 2, workers, ahead=AHEAD)
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
    monkeypatch.setattr(trainer_module, "this_chip", lambda _: None)
    monkeypatch.setattr(trainer_module, "allowed", lambda: None)
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


def test_a_line_says_the_speed_and_memory_of_its_steps(make_trainer, monkeypatch):
    """Of training alone: neither what came before nor that a checkpoint was written."""
    mx.eval(mx.zeros((64, 1024, 1024)) + 1)
    earlier = mx.get_peak_memory()
    trainer = make_trainer("lines", steps=6, log_every=1, save_every=1)
    save, clock, written = trainer.save, time.perf_counter, []

    def slow():
        written.append(1000)
        save()

    monkeypatch.setattr(trainer, "save", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(written))
    lines = run(trainer)
    assert len(written) == 6
    assert all(line["seconds_per_step"] < 1000 for line in lines)
    # The first holds what traces and compiles.
    assert all(0 < line["peak_bytes"] < earlier / 2 for line in lines[1:])
