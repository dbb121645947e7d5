"""The training loop: steps over micro-batches, checkpoints, several processes.

A batch is a pure function of the step and the shard, and so is what is random, so a run
that was killed goes on from its last checkpoint as if nothing had been.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Generic, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mm1_mlx.blas import one_thread_a_product, steps_kept
from mm1_mlx.device import this_chip
from mm1_mlx.errors import CheckpointError, ConfigError, DataError
from mm1_mlx.models import MM1
from mm1_mlx.room import allowed
from mm1_mlx.sizes import human_bytes
from mm1_mlx.train import state
from mm1_mlx.train.budget import Training, check_training, step_seconds, training_of
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.gradients import (
    AHEAD,
    DOUBLE_EVERY,
    HALF_SCALE,
    Batch,
    Gradients,
    Loss,
    Model,
    Taught,
)
from mm1_mlx.train.optimizer import make_optimizer, schedule
from mm1_mlx.train.pace import Moment, Pace
from mm1_mlx.train.processes import ended, first_arrays, is_of_another
from mm1_mlx.train.record import (
    LOG,
    RECORD,
    Tally,
    add_line,
    check_record,
    read_log,
    trim_log,
    write_record,
)
from mm1_mlx.train.sample import Batch as Rows
from mm1_mlx.writer import FULL

# What a checkpoint calls float16's.
SCALE = "scale"
# How mlx says that it gets no memory: in an allocator's name, or behind a GPU's.
_NO_MEMORY = re.compile(
    r"^\[(metal::)?malloc(_or_wait)?\]|^\[METAL\].*Insufficient Memory", re.DOTALL
)


class Trainer(Generic[Model, Batch]):
    """Trains what is not frozen of a module on batches.

    A step's loss is the mean over all its learned tokens, in whatever micro-batch or
    process they are. Trained weights and all that is summed are float32; in a precision
    of fewer bits weights are rounded on their way through the model.

    Args:
        model: trained in place.
        loss: mean loss of (model, batch), how many targets it is the mean of, and, for
            a loss of several parts, these by name for the log.
        batches: the batch of (step, shard); every micro-batch is a shard of its own.
        config: the run.
        folder: where checkpoints, ``run.json`` and ``log.jsonl`` are kept.
        valid: batches to measure the loss on.
        data_bytes: of rows that are kept decoded meanwhile.
        record: what else the run is made of, each with its ``digest``; one of others is
            not continued.
        given: fields of ``config`` that are not left to a default, for the record.
        warn: told in a line what went wrong and was mended.
        saved: called behind every checkpoint, in the process that writes them.

    Raises:
        ConfigError: the micro-batches cannot be shared out; nothing is to be trained; or
            the device has no room for a step of an MM1 on batches like the first,
            before anything is allocated.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss[Model, Batch],
        batches: Callable[[int, int], Batch],
        config: TrainConfig,
        folder: Path,
        *,
        valid: Sequence[Batch] = (),
        data_bytes: int = 0,
        record: Mapping[str, Mapping[str, Any]] | None = None,
        given: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = lambda _: None,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.config = config
        self.folder = folder
        self.valid = valid
        self._data_bytes = data_bytes
        self.record = dict(record or {})
        self.given = config.to_dict() if given is None else dict(given)
        self.warn = warn
        self.saved = saved
        self.step = self._saved = 0
        self._tally = Tally()
        # Of the last step: its loss's parts, and what else is logged.
        self.parts: dict[str, float] = {}
        self.norm = 0.0
        self.tokens = 0
        # Asked for here, and what all processes agreed on.
        self._stop_wanted = self._stopping = False
        # Whether the weights are those of ``step``: not while they take one.
        self._whole = True
        self._watch: Callable[[Moment], None] = lambda _: None
        self._schedule = schedule(config, config.learning_rate)
        self.group = mx.distributed.init()
        self._gradients = Gradients(model, loss, batches, config, self.group)
        if not tree_flatten(model.trainable_parameters()):
            raise ConfigError("nothing is trained: every weight is frozen")
        self._training = self._training_step()
        if self._training and isinstance(model, MM1):
            check_training(model.config, self._training)
        model.update(
            tree_map(lambda x: x.astype(mx.float32), model.trainable_parameters())
        )
        self.optimizer = make_optimizer(config)
        self.optimizer.init(model.trainable_parameters())
        mx.eval(model.state, self.optimizer.state)
        self._pace = Pace(config, len(self._held_out))

    @property
    def _held_out(self) -> range:
        """Which of ``valid``'s batches this process measures."""
        return range(self.group.rank(), len(self.valid), self.group.size())

    def _training_step(self) -> Training | None:
        """What this process does in a step; of a module that is no MM1 nobody knows."""
        if not isinstance(self.model, MM1):
            return None
        return self._training_on(self._gradients.first_batch())

    def _training_on(self, batch: Batch) -> Training | None:
        """What this process does in a step on batches like this one."""
        if not isinstance(self.model, MM1) or not isinstance(batch, Rows):
            return None
        return training_of(
            self.model,
            batch,
            self.config.optimizer,
            len(self._gradients.shards),
            self._gradients.parallel,
            itemsize=getattr(mx, self.config.precision).size,
            checkpointing=self.config.checkpointing,
            ahead=AHEAD,
            data=self._data_bytes,
        )

    def judge(self, batch: Batch) -> None:
        """Have what a step takes judged by this batch, where it is larger than the first.

        Raises:
            ConfigError: the device has no room for a step on batches like it.
        """
        training, model = self._training_on(batch), self.model
        if training is None or self._training is None or not isinstance(model, MM1):
            return
        if training.tokens > self._training.tokens:
            self._training = training
            check_training(model.config, training)

    def forecast(self) -> dict[str, Any]:
        """What a step takes of each process, on batches like the first; of an MM1.

        Tokens, those that fill short rows included, bytes of memory, those that are
        free, what is there of the model among them, and the least seconds; the last two
        where they are known or could be measured.
        """
        training, model = self._training, self.model
        if training is None or not isinstance(model, MM1):
            return {}
        expected: dict[str, Any] = {
            "tokens": training.tokens,
            "bytes": sum(training.bytes(model.config).values()),
        }
        if (free := allowed()) is not None:
            expected["free_bytes"] = free + mx.get_active_memory()
        if chip := this_chip(mx.float32 if training.itemsize == 4 else mx.float16):
            seconds = step_seconds(chip, model.config, training)
            expected["least_seconds"] = float(f"{seconds:.3g}")
        return expected

    def run(
        self,
        report: Callable[[dict[str, Any]], None],
        expect: Callable[[dict[str, Any]], None] | None = None,
        watch: Callable[[Moment], None] = lambda _: None,
    ) -> bool:
        """Train to the last step, or until ``stop``; whether the last one was reached.

        ``report`` receives every log line, whose ``valid_loss`` is None where it is no
        finite number, ``watch`` where the run is, behind every step
        and every held-out batch. Before the first step ``expect`` receives the
        ``forecast``, where there is one, and the loss on ``valid`` is measured. What
        ends the run early leaves a checkpoint of the steps that are done.

        Raises:
            ConfigError: the folder is of another run, or one of more steps; or the loss
                is no number; or memory has run out.
            DataError: a row cannot be used.
            CheckpointError: the checkpoints are damaged, or the disk is full.
        """
        self._watch = watch
        alone = one_thread_a_product() if self._gradients.crowded else nullcontext()
        with steps_kept(), alone:
            return self._run(report, expect)

    def _run(
        self,
        report: Callable[[dict[str, Any]], None],
        expect: Callable[[dict[str, Any]], None] | None,
    ) -> bool:
        first = self.group.rank() == 0
        if first:
            with self._on_disk(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        if self.step > self.config.steps:
            raise ConfigError(
                f"{self.folder} stands at step {self.step}, beyond the "
                f"{self.config.steps} that are asked for; give --steps {self.step} or "
                "more, or choose another folder"
            )
        if first:
            with self._on_disk(self.folder / RECORD):
                self._write_record()
            with self._on_disk(self.folder / LOG):
                trim_log(self.folder, self.step)
        # Weights that the caller has just made: workers could not evaluate them.
        mx.eval(self.model.state)
        begins = first and self.step < self.config.steps
        if expect and begins and (expected := self.forecast()):
            expect(expected)
        if self.valid and self.step < self.config.steps:
            with self._in_order():
                self._begin_to_validate(report)
        start, tokens, since = time.perf_counter(), 0, self.step
        while self.step < self.config.steps and not self._stopping:
            begun = time.perf_counter()
            with self._in_order():
                self.train_step()
            tokens += self.tokens
            paused = time.perf_counter()
            self._pace.stepped(paused - begun)
            coming = len(self._held_out) * self.config.measures(self.step)
            left = self._pace.left(self.step, coming)
            self._watch(Moment(self.step, seconds_left=left))
            if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                line = self._line(paused - start, tokens, self.step - since)
                self._log(line, report)
                start, tokens, since = time.perf_counter(), 0, self.step
                paused = start
            # Before it is saved: what is logged later would not come again. Whoever
            # stops the run does not wait for it.
            if self.valid and self.config.measures(self.step) and not self._stopping:
                with self._in_order():
                    self._log_held_out(report)
            last = self.step == self.config.steps or self._stopping
            if last or self.step % self.config.save_every == 0:
                self.save()
            start += time.perf_counter() - paused
        return self.step >= self.config.steps

    def _begin_to_validate(self, report: Callable[[dict[str, Any]], None]) -> None:
        """Measure before the first step; later only see that the rows can be used.

        Now, and not when hours have gone into the steps before the first measurement.
        Where the run was stopped before it measured, it does now.
        """
        if self.step == 0 or self._is_unmeasured():
            self._log_held_out(report)
            return
        for number, i in enumerate(self._held_out, start=1):
            if self._stop_wanted:
                return
            self.valid[i]
            self._watch(Moment(self.step, number, len(self._held_out)))

    def _is_unmeasured(self) -> bool:
        """Whether the log lacks the measurement behind the step that the run stands at."""
        lacks = self.group.rank() == 0 and self.config.measures(self.step)
        if lacks:
            lacks = not any(
                line["step"] == self.step and "valid_loss" in line
                for line in read_log(self.folder)
            )
        (told,) = first_arrays([mx.array(int(lacks))])
        return bool(told.item())

    def _log_held_out(self, report: Callable[[dict[str, Any]], None]) -> None:
        loss = self.validate()
        if loss is not None:
            # JSON has no other numbers. A later measurement may be one.
            told = loss if math.isfinite(loss) else None
            self._log({"step": self.step, "valid_loss": told}, report)

    @contextmanager
    def _on_disk(self, path: Path) -> Iterator[None]:
        """Says in one line that a file of the run's cannot be written.

        Raises:
            CheckpointError: it cannot.
        """
        try:
            yield
        except OSError as error:
            way_out = "free some room" if error.errno in FULL else "check the disk"
            raise CheckpointError(
                f"{str(path)!r} cannot be written ({error.strerror or error}); "
                f"{self._stands()}{way_out} and go on with the same command"
            ) from None

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """Says in one line that a row cannot be used, another process or memory is gone.

        The steps that are done are saved.
        """
        try:
            yield
        except DataError as error:
            if not (stands := self._stands()):
                raise
            raise DataError(
                f"{error}; {stands}put back what is missing, or leave such rows out "
                "(--skip-bad), and go on with the same command"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or _NO_MEMORY.match(str(error)):
                used = human_bytes(mx.get_peak_memory())
                said = " ".join(str(error).split()) or "no memory"
                # Before it is saved, which takes some.
                mx.clear_cache()
                raise ConfigError(
                    f"step {self.step + 1} finds no memory beyond the {used} that it had "
                    f"({said}); {self._stands()}{self._less_memory()}"
                ) from None
            if not is_of_another(error):
                raise
            raise ConfigError(
                f"{ended(error)} at step {self.step + 1}; {self._stands()}go on with the "
                "same command"
            ) from None

    def _less_memory(self) -> str:
        """The ways out where memory is too small."""
        again = "" if self.config.checkpointing else ", or add --checkpointing,"
        return (
            f"close other programs{again} and go on with the same command; else begin in "
            "another folder with smaller batches (--batch-size) or shorter rows "
            "(--max-length)"
        )

    def _stands(self) -> str:
        """Which checkpoint the run goes on from, if there is one; one is made first."""
        if self.step > self._saved and self._whole:
            # What ends the run is said before what comes of it; where memory is gone
            # mlx may say so once more.
            with suppress(CheckpointError, OSError, RuntimeError, MemoryError):
                self.save()
        steps = state.saved_steps(self.folder)
        return f"the checkpoint of step {steps[-1]} stands; " if steps else ""

    def stop(self) -> None:
        """End the run behind the step that is under way, with a checkpoint.

        Of several processes all end when one is told to.
        """
        self._stop_wanted = True

    def train_step(self) -> float:
        """One optimizer step; the loss before it, in nats per token.

        Raises:
            ConfigError: the loss or a gradient is no finite number.
        """
        self.model.train()
        while True:
            totals, gradients = self._shared(*self._gradients.sum(self.step))
            count = max(totals.learned, 1.0)
            loss = totals.loss / count
            gradients, norm = self._clipped(gradients, count)
            # Before a weight changes: what ends the run leaves those of the last step.
            self.norm = cast(float, norm.item())
            if math.isfinite(loss) and math.isfinite(self.norm):
                break
            self._halve_scale(loss)
        self._whole = False
        self.optimizer.update(self.model, gradients)
        # Each is freed when it has been used.
        del gradients
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        self.step += 1
        self._whole = True
        self.tokens = int(totals.tokens)
        self.parts = {name: part / count for name, part in totals.parts.items()}
        self._tally.add(totals.learned, {"loss": totals.loss, **totals.parts})
        if self.step % DOUBLE_EVERY == 0:
            self._gradients.scale = min(2 * self._gradients.scale, HALF_SCALE)
        # Batches of other lengths will not use what is freed now.
        if mx.get_cache_memory() > mx.get_active_memory():
            mx.clear_cache()
        return loss

    def _shared(self, own: Taught, gradients: Any) -> tuple[Taught, Any]:
        """The sums of all processes, of what each one's micro-batches taught."""
        names = sorted(own.parts)
        numbers = [
            *(own.loss, own.learned, own.tokens, float(self._stop_wanted)),
            *(own.parts[name] for name in names),
        ]
        if self.group.size() > 1:
            sums = mx.distributed.all_sum(mx.array(numbers), stream=mx.cpu)
            numbers = cast(list[float], sums.tolist())
            mean = nn.average_gradients(gradients)
            gradients = tree_map(lambda g: g * self.group.size(), mean)
        loss, learned, tokens, stop, *parts = numbers
        self._stopping = stop > 0
        shared = Taught(
            loss, learned, tokens, dict(zip(names, parts, strict=True)), None
        )
        return shared, gradients

    def _clipped(self, gradients: Any, count: float) -> tuple[Any, mx.array]:
        """The mean gradients of ``count`` tokens, clipped, and their norm before."""
        squares = [g.square().sum() for _, g in cast(Any, tree_flatten(gradients))]
        norm = mx.sqrt(mx.stack(squares).sum()) / count
        # As mlx clips, and divided by the count on the way.
        factor = mx.minimum(1.0, self.config.clip_norm / (norm + 1e-6)) / count
        return tree_map(lambda g: g * factor, gradients), norm

    def _halve_scale(self, loss: float) -> None:
        """Have a step computed again whose gradients were too large in float16.

        All that was computed before depends on the steps alone, so a run that goes on
        from a checkpoint does the same.

        Raises:
            ConfigError: that is not what makes its loss or gradients no numbers.
        """
        half = self._gradients.half
        if half and math.isfinite(loss) and self._gradients.scale > 1.0:
            self._gradients.scale /= 2
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        value = loss if what == "loss" else self.norm
        way_out = f"lower the learning rate, which is {self.config.learning_rate:g}"
        if half:
            way_out = "float16 holds nothing above 65,504: train in bfloat16"
        raise ConfigError(
            f"the {what} of step {self.step + 1} is {value}, which nothing can be "
            f"learned from; {self._stands()}{way_out}, in another folder"
        )

    def validate(self) -> float | None:
        """The mean loss of ``valid``'s learned tokens, without the gates' losses.

        None where the run is stopped meanwhile.
        """
        self.model.eval()
        total, learned = 0.0, 0.0
        begun = time.perf_counter()
        batches = self._gradients.ahead(self.valid, self._held_out)
        for number, batch in enumerate(batches, start=1):
            if self._stop_wanted:
                break
            loss, count = self._gradients.measure(batch)
            total += loss * count
            learned += count
            now = time.perf_counter()
            self._pace.measured(now - begun)
            begun = now
            rest = len(self._held_out) - number
            left = self._pace.left(self.step, rest)
            self._watch(Moment(self.step, number, number + rest, left))
        self.model.train()
        sums = mx.distributed.all_sum(
            mx.array([total, learned, float(self._stop_wanted)]), stream=mx.cpu
        )
        total, learned, stop = cast(list[float], sums.tolist())
        self._stopping = stop > 0
        return None if self._stopping else total / max(learned, 1.0)

    def _line(self, seconds: float, tokens: int, steps: int) -> dict[str, Any]:
        """The log line of a step; losses, speed and memory of those since the last."""
        means, self._tally = self._tally.means(), Tally()
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return {
            "step": self.step,
            **means,
            "learning_rate": self._schedule(mx.array(self.step - 1)).item(),
            "gradient_norm": self.norm,
            "seconds_per_step": round(seconds / steps, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_bytes": peak,
        }

    def _log(
        self, line: dict[str, Any], report: Callable[[dict[str, Any]], None]
    ) -> None:
        if self.group.rank() != 0:
            return
        with self._on_disk(self.folder / LOG):
            add_line(self.folder, line)
        report(line)

    def save(self) -> None:
        """Write what is trained, the optimizer and the step.

        Raises:
            CheckpointError: the disk is full; the old checkpoint stands.
        """
        if self.group.rank() == 0:
            if not (self.folder / RECORD).is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write_record()
            with self._gradients.untraced():
                tensors = self._tensors()
            if self._gradients.half:
                tensors[SCALE] = mx.array([self._gradients.scale])
            state.save(self.folder, self.step, tensors | self._tally.tensors())
            self.saved()
        self._saved = self.step

    def _write_record(self) -> None:
        write_record(self.folder, self.config, self.given, self.record)

    @property
    def checkpoint_bytes(self) -> int:
        """How large a checkpoint is."""
        return sum(x.nbytes for x in self._tensors().values())

    def _tensors(self) -> dict[str, mx.array]:
        """What a checkpoint holds."""
        weights: Any = tree_flatten(self.model.trainable_parameters())
        optimizer: Any = tree_flatten(self.optimizer.state)
        return {f"model.{k}": v for k, v in weights} | {
            f"optimizer.{k}": v for k, v in optimizer
        }

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; whether there is one.

        Of several processes the first one reads it.

        Raises:
            ConfigError: the checkpoint is of a run with other settings.
            CheckpointError: all of them are damaged.
        """
        found = None
        if self.group.rank() == 0 and (found := state.load(self.folder, self.warn)):
            check_record(self.folder, self.config, self.record)
            saved = found[1]
            self._tally = Tally.of(saved)
            scale = saved.get(SCALE, mx.array(HALF_SCALE))
            self._gradients.scale = cast(float, scale.item())
            self._restore(saved)
            with self._on_disk(self.folder):
                state.tidy(self.folder, found[0])
        place = [mx.array(found[0] if found else -1), mx.array(self._gradients.scale)]
        at, self._gradients.scale = (cast(float, x.item()) for x in first_arrays(place))
        if at == -1:
            return False
        if self.group.size() > 1:
            # In one order, whatever order each process made them in.
            names, tensors = zip(*sorted(self._tensors().items()), strict=True)
            self._restore(dict(zip(names, first_arrays(tensors), strict=True)))
        self._gradients.forget()
        # Now: a worker could not evaluate them on this thread's stream.
        mx.eval(self.model.state, self.optimizer.state)
        self.step = self._saved = int(at)
        return True

    def _restore(self, tensors: dict[str, mx.array]) -> None:
        """Take up what a checkpoint holds.

        Raises:
            CheckpointError: it is not what this run trains.
        """
        expected = {name: x.shape for name, x in self._tensors().items()}
        prefixes = ("model.", "optimizer.")
        found = {k: x.shape for k, x in tensors.items() if k.startswith(prefixes)}
        if found != expected:
            raise CheckpointError(
                f"{self.folder} holds a run that trains other weights; choose another "
                "folder"
            )
        weights, optimizer = (
            [(k.removeprefix(p), v) for k, v in tensors.items() if k.startswith(p)]
            for p in prefixes
        )
        self.model.load_weights(weights, strict=False)
        self.optimizer.state = tree_unflatten(optimizer)
