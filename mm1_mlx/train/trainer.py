"""The training loop: AdamW, warmup and cosine, clipping, checkpoints, several processes.

A batch is a pure function of the step and the shard, so a run that was killed goes
on from its last checkpoint with the very batches it would have seen.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mm1_mlx.device import this_chip
from mm1_mlx.errors import ConfigError
from mm1_mlx.files import fsync, read_json, read_shard
from mm1_mlx.models import MM1, named_tensors
from mm1_mlx.train.budget import Training, check_training, step_seconds, training_of
from mm1_mlx.train.optimizer import is_matrix
from mm1_mlx.train.sample import Batch as Rows
from mm1_mlx.worker import Worker

# What a run may change when it is continued: its length, and what it leaves behind.
MAY_CHANGE = ("steps", "decay_steps", "final_fraction", "save_every", "log_every")

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")
# A loss's parts by their names.
Parts = dict[str, mx.array]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run is made of: its flags and its record."""

    steps: int = field(metadata={"help": "optimizer steps"})
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata={"help": "muon: AdamW for embeddings and vectors"}
    )
    learning_rate: float = field(metadata={"help": "peak of the schedule"})
    warmup_steps: int = field(default=200, metadata={"help": "linear warmup, in steps"})
    decay_steps: int = field(
        default=1000, metadata={"help": "cosine decay at the end, in steps"}
    )
    final_fraction: float = field(
        default=0.1, metadata={"help": "last learning rate, as a share of the peak"}
    )
    matrix_learning_rate: float = field(
        default=0.02, metadata={"help": "peak of muon's schedule"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "decoupled decay"})
    clip_norm: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    micro_batches: int = field(
        default=1, metadata={"help": "batches of a step, shared out among processes"}
    )
    seed: int = field(default=0, metadata={"help": "of initialisation and data"})
    save_every: int = field(default=200, metadata={"help": "steps per checkpoint"})
    log_every: int = field(default=20, metadata={"help": "steps per log line"})

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batches", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"TrainConfig.{name}: {getattr(self, name)} is not above 0"
                )
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"TrainConfig.{name}: {getattr(self, name)} is below 0"
                )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f"TrainConfig: warmup_steps {self.warmup_steps} and decay_steps "
                f"{self.decay_steps} are more than the {self.steps} steps"
            )


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """AdamW, or Muon for matrices and AdamW for the rest."""
    adamw = optim.AdamW(
        learning_rate=schedule(config, config.learning_rate),
        betas=[0.9, 0.95],
        weight_decay=config.weight_decay,
        bias_correction=True,
    )
    if config.optimizer == "adamw":
        return adamw
    muon = optim.Muon(
        learning_rate=schedule(config, config.matrix_learning_rate), weight_decay=0.0
    )
    return optim.MultiOptimizer([muon, adamw], [is_matrix])


def schedule(config: TrainConfig, peak: float) -> Callable[[mx.array], mx.array]:
    """Linear warmup to the peak, the peak, then a cosine to ``final_fraction`` of it.

    Until the decay begins the schedule does not depend on the number of steps, so a run
    may be lengthened or cut short and still equal one that was planned so.
    """
    parts = [lambda _: mx.array(peak)]
    starts = []
    if config.warmup_steps:
        parts.insert(0, optim.linear_schedule(0.0, peak, config.warmup_steps))
        starts.append(config.warmup_steps)
    if config.decay_steps:
        last = peak * config.final_fraction
        parts.append(optim.cosine_decay(peak, config.decay_steps, last))
        starts.append(config.steps - config.decay_steps)
    return optim.join_schedules(parts, starts)


class Trainer(Generic[Model, Batch]):
    """Trains every parameter of a module on batches.

    Args:
        model: trained in place.
        loss: mean loss of (model, batch), how many targets it is the mean of, and, for
            a loss of several parts, these by name for the log.
        batches: the batch of (step, shard); every micro-batch is a shard of its own.
        config: the run.
        folder: where the checkpoint and ``log.jsonl`` are kept.

    Raises:
        ConfigError: the micro-batches cannot be shared out; or the device has no room
            for a step of an MM1 on batches like the first, before anything is allocated.
    """

    def __init__(
        self,
        model: Model,
        loss: Callable[
            [Model, Batch],
            tuple[mx.array, mx.array] | tuple[mx.array, mx.array, Parts],
        ],
        batches: Callable[[int, int], Batch],
        config: TrainConfig,
        folder: Path,
    ) -> None:
        self.model = model
        self.batches = batches
        self.config = config
        self.folder = folder
        self.step = 0
        # Of the last step's loss.
        self.parts: dict[str, float] = {}
        self._schedule = schedule(config, config.learning_rate)
        self.group = mx.distributed.init()
        self._share, rest = divmod(config.micro_batches, self.group.size())
        if rest:
            raise ConfigError(
                f"{config.micro_batches} micro-batches cannot be shared out among "
                f"{self.group.size()} processes"
            )
        parallel = self._share if mx.default_device() == mx.cpu else 1
        self._training = self._training_step(parallel)
        if self._training and isinstance(model, MM1):
            check_training(model.config, self._training)
        self.optimizer = make_optimizer(config)
        self.optimizer.init(model.trainable_parameters())
        mx.eval(model.state, self.optimizer.state)
        self._workers = [Worker() for _ in range(parallel)]
        self._tracing = threading.Lock()
        self._loader = Worker()
        self._loading: dict[tuple[int, int], Future[Batch]] = {}
        self._loss_and_grad = nn.value_and_grad(model, loss)

    def _training_step(self, workers: int) -> Training | None:
        """What this process does in a step; of a module that is no MM1 nobody knows."""
        if not isinstance(self.model, MM1):
            return None
        batch = self.batches(0, self.group.rank() * self._share)
        if not isinstance(batch, Rows):
            return None
        name, share = self.config.optimizer, self._share
        return training_of(self.model, batch, name, share, workers)

    def forecast(self) -> dict[str, Any]:
        """What a step takes of each process, on batches like the first; of an MM1.

        Tokens, those that fill short rows included, bytes of memory, and the least
        seconds, where the machine's speed is known or could be measured.
        """
        training, model = self._training, self.model
        if training is None or not isinstance(model, MM1):
            return {}
        expected: dict[str, Any] = {
            "tokens": training.tokens,
            "bytes": sum(training.bytes(model.config).values()),
        }
        if chip := this_chip(mx.float32 if training.itemsize == 4 else mx.float16):
            seconds = step_seconds(chip, model.config, training)
            expected["least_seconds"] = float(f"{seconds:.3g}")
        return expected

    def run(
        self,
        report: Callable[[dict[str, Any]], None],
        expect: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Train to the last step; ``report`` receives every log line.

        Before the first step ``expect`` receives the ``forecast``, where there is one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        # Weights that the caller has just made: workers could not evaluate them.
        mx.eval(self.model.state)
        self._trim_log()
        self.model.train()
        begins = self.group.rank() == 0 and self.step < self.config.steps
        if expect and begins and (expected := self.forecast()):
            expect(expected)
        start, first = time.perf_counter(), self.step
        while self.step < self.config.steps:
            loss = self.train_step()
            if self.step % self.config.log_every == 0:
                seconds = (time.perf_counter() - start) / (self.step - first)
                self._log(loss, seconds, report)
            if (
                self.step % self.config.save_every == 0
                or self.step == self.config.steps
            ):
                self.save()

    def train_step(self) -> float:
        """One optimizer step; the loss before it, in nats per token.

        The micro-batches' gradients are averaged.
        """
        first = self.group.rank() * self._share
        shards = range(first, first + self._share)
        for step in (self.step, self.step + 1):
            for shard in shards:
                self._load(step, shard)
        pending = [
            self._workers[i % len(self._workers)].submit(self._backward, shard)
            for i, shard in enumerate(shards)
        ]
        losses, parts, grads = zip(*(p.result() for p in pending), strict=True)
        self.parts = {
            name: sum(part[name] for part in parts) / len(parts) for name in parts[0]
        }
        mean = tree_map(lambda *g: sum(g) / len(g), *grads)
        # Else they would be in memory until the step is done.
        del pending, grads
        mean = nn.average_gradients(mean)
        mean, _ = optim.clip_grad_norm(mean, self.config.clip_norm)
        self.optimizer.update(self.model, mean)
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.step += 1
        return sum(losses) / len(losses)

    def _load(self, step: int, shard: int) -> None:
        """Begin to make a batch, unless that is done or under way."""
        if step < self.config.steps and (step, shard) not in self._loading:
            batch = self._loader.submit(self.batches, step, shard)
            self._loading[step, shard] = batch

    def _backward(self, shard: int) -> tuple[float, dict[str, float], Any]:
        """Loss, its parts and gradients of one micro-batch, evaluated.

        Runs on a worker thread, whose stream is its own: on a CPU, micro-batches run
        side by side. Only tracing, which puts tracers into the shared model, must not:
        nor does a decoder with experts, which reads its routes while it is traced.
        """
        batch = self._loading.pop((self.step, shard)).result()
        with self._tracing:
            parameters = self.model.trainable_parameters()
            (loss, _, *rest), grads = self._loss_and_grad(self.model, batch)
            self.model.update(parameters)
        parts: Parts = rest[0] if rest else {}
        mx.eval(loss, parts, grads)
        values = {name: cast(float, part.item()) for name, part in parts.items()}
        return cast(float, loss.item()), values, grads

    def _log(
        self, loss: float, seconds: float, report: Callable[[dict[str, Any]], None]
    ) -> None:
        if self.group.rank() != 0:
            return
        line = {
            "step": self.step,
            "loss": round(loss, 5),
            **{name: round(part, 5) for name, part in self.parts.items()},
            "learning_rate": self._schedule(mx.array(self.step)).item(),
            "seconds_per_step": round(seconds, 4),
        }
        with self._log_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        report(line)

    def _trim_log(self) -> None:
        """Forget what was logged after the checkpoint: those steps come again."""
        if self.group.rank() != 0 or not self._log_path.is_file():
            return
        lines = self._log_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        self._log_path.write_text("".join(kept))

    @property
    def _log_path(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.safetensors"

    def save(self) -> None:
        """Write model, optimizer and step; the old checkpoint stands until it is whole."""
        if self.group.rank() != 0:
            return
        state = {f"model.{k}": v for k, v in named_tensors(self.model).items()}
        optimizer: Any = tree_flatten(self.optimizer.state)
        state |= {f"optimizer.{k}": v for k, v in optimizer}
        state["step"] = mx.array(self.step)
        partial = self.folder / "state.partial.safetensors"
        mx.save_safetensors(str(partial), state)
        record = {"step": self.step, "config": asdict(self.config)}
        (self.folder / "run.partial.json").write_text(json.dumps(record, indent=2))
        fsync(partial)
        partial.replace(self._state_path)
        (self.folder / "run.partial.json").replace(self.folder / "run.json")
        fsync(self.folder)

    def _check_record(self) -> None:
        """Pass only if the checkpoint is of this run, which may have changed its length.

        Without a record there is nothing to compare: it is written with the state, but
        not in the same instant.
        """
        path = self.folder / "run.json"
        record = read_json(path) if path.is_file() else {}
        then = record.get("config") if isinstance(record, dict) else None
        if not isinstance(then, dict):
            return
        for name, now in asdict(self.config).items():
            if name not in MAY_CHANGE and then.get(name, now) != now:
                raise ConfigError(
                    f"{self.folder} holds a run with {name} {then[name]!r}, not {now!r}; "
                    "choose another folder, or the same settings"
                )

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; whether there is one.

        Raises:
            ConfigError: the checkpoint is of a run with other settings.
            CheckpointError: it is damaged.
        """
        if not self._state_path.is_file():
            return False
        self._check_record()
        state = read_shard(self._state_path)
        model = [
            (k.removeprefix("model."), v)
            for k, v in state.items()
            if k.startswith("model.")
        ]
        optimizer = [
            (k.removeprefix("optimizer."), v)
            for k, v in state.items()
            if k.startswith("optimizer.")
        ]
        self.model.load_weights(model)
        self.optimizer.state = tree_unflatten(optimizer)
        self._loading.clear()
        # Now: a worker could not evaluate them on this thread's stream.
        mx.eval(self.model.state, self.optimizer.state)
        self.step = cast(int, state["step"].item())
        return True
