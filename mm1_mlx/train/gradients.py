"""What the micro-batches of a step teach, added up in one order.

Batches are made ahead by a thread of their own; on a CPU, several micro-batches are run side
by side.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mm1_mlx.errors import ConfigError
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.sample import Batch as Rows
from mm1_mlx.worker import Worker

Model = TypeVar("Model", bound=nn.Module)
Batch = TypeVar("Batch")
# A loss's parts by their names.
Parts = dict[str, mx.array]
Loss = Callable[
    [Model, Batch], tuple[mx.array, mx.array] | tuple[mx.array, mx.array, Parts]
]
# What float16's gradients are multiplied by on their way: the least of them would be 0.
# Where the largest are then infinite it is halved, and doubled every so many steps.
HALF_SCALE, DOUBLE_EVERY = 1024.0, 200
# Batches that are made, pictures and all, beside those that are under way.
AHEAD = 2


class Taught(NamedTuple):
    """What one micro-batch teaches, or several together.

    Attributes:
        loss: its mean over the learned tokens; of several, the sum of their tokens'.
        learned: how many they are.
        tokens: how many it has.
        parts: of the loss, as this is.
        gradients: of the mean, times ``learned``.
    """

    loss: float
    learned: float
    tokens: float
    parts: dict[str, float]
    gradients: Any


class Gradients(Generic[Model, Batch]):
    """Differentiates a loss on this process's micro-batches.

    Args:
        model: whose trainable weights are differentiated.
        loss: as ``Trainer`` has it.
        batches: the batch of (step, shard).
        config: the run.
        group: the processes that share its micro-batches.

    Attributes:
        parallel: how many micro-batches are run side by side.
        crowded: whether several threads or processes of this run share a CPU's cores.
        scale: what float16's gradients are multiplied by on their way.

    Raises:
        ConfigError: the micro-batches cannot be shared out.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss[Model, Batch],
        batches: Callable[[int, int], Batch],
        config: TrainConfig,
        group: mx.distributed.Group,
    ) -> None:
        share, rest = divmod(config.micro_batches, group.size())
        if rest:
            raise ConfigError(
                f"{config.micro_batches} micro-batches cannot be shared out among "
                f"{group.size()} processes"
            )
        self.model = model
        self.loss = loss
        self.batches = batches
        self.config = config
        self.shards = range(group.rank() * share, (group.rank() + 1) * share)
        self.parallel = 1
        if on_cpu := mx.default_device() == mx.cpu:
            # Processes of one run are most often on one machine.
            cores = (os.cpu_count() or 1) // group.size()
            self.parallel = max(1, min(share, cores))
        self.crowded = on_cpu and self.parallel * group.size() > 1
        self.scale = HALF_SCALE
        self._coming: dict[tuple[int, int], Future[Batch]] = {}
        self._tracing = threading.Lock()
        self._differentiate = mx.value_and_grad(self._weighted_loss)

    @property
    def half(self) -> bool:
        """Whether the loss is computed in float16."""
        return self.config.precision == "float16"

    @cached_property
    def _workers(self) -> list[Worker]:
        return [Worker() for _ in range(self.parallel)]

    @cached_property
    def _loader(self) -> Worker:
        return Worker()

    def first_batch(self) -> Batch:
        """This process's first batch of all, which is not made once more for its step."""
        place = (0, self.shards[0])
        self._coming[place] = Future()
        self._coming[place].set_result(self.batches(*place))
        return self._coming[place].result()

    def forget(self) -> None:
        """Leave out what was made of steps that will not come now."""
        self._coming.clear()

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """While the model holds its weights, and no tracers."""
        with self._tracing:
            yield

    def sum(self, step: int) -> tuple[Taught, Any]:
        """What this process's micro-batches of a step teach, added in their order.

        Their gradients stand beside it. However many workers there are, the
        sum is the same to the bit. The next batches are made meanwhile.
        """
        places = [(at, shard) for at in (step, step + 1) for shard in self.shards]
        loss = learned = tokens = 0.0
        parts: dict[str, float] = {}
        gradients: Any = None
        pending: deque[Future[Taught]] = deque()
        for i, shard in enumerate(self.shards):
            for place in places[i : i + 1 + AHEAD]:
                self._load(*place)
            worker = self._workers[i % len(self._workers)]
            pending.append(worker.submit(self._teach, step, shard))
            while len(pending) == len(self._workers) or (
                pending and shard == self.shards[-1]
            ):
                taught = pending.popleft().result()
                loss += taught.loss * taught.learned
                learned += taught.learned
                tokens += taught.tokens
                for name, part in taught.parts.items():
                    parts[name] = parts.get(name, 0.0) + part * taught.learned
                if gradients is None:
                    gradients = taught.gradients
                else:
                    gradients = tree_map(mx.add, gradients, taught.gradients)
                    # Else both would be in memory until the step is done.
                    mx.eval(gradients)
                del taught
        return Taught(loss, learned, tokens, parts, None), gradients

    def ahead(
        self, batches: Sequence[Batch], numbers: Iterable[int]
    ) -> Iterator[Batch]:
        """Some of the batches, each made while those before it are used."""
        coming: deque[Future[Batch]] = deque()
        for number in numbers:
            coming.append(self._loader.submit(batches.__getitem__, number))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def measure(self, batch: Batch) -> tuple[float, int]:
        """The mean loss of a batch without the gates' losses, and of how many tokens."""
        weights = self.model.trainable_parameters()
        with self._tracing:
            try:
                _, loss, count, parts = self._weighted_loss(weights, batch)
            finally:
                # The model computes in rounded ones.
                self.model.update(weights)
        loss = parts.get("cross_entropy", loss)
        mx.eval(loss, count)
        return cast(float, loss.item()), cast(int, count.item())

    def _load(self, step: int, shard: int) -> None:
        """Begin to make a batch, unless that is done or under way."""
        if step < self.config.steps and (step, shard) not in self._coming:
            batch = self._loader.submit(self.batches, step, shard)
            self._coming[step, shard] = batch

    def _teach(self, step: int, shard: int) -> Taught:
        """What one micro-batch teaches, evaluated.

        Runs on a worker thread, whose stream is its own: on a CPU, micro-batches run
        side by side. Only tracing, which puts tracers into the shared model, must not:
        nor does a decoder with experts, which reads its routes while it is traced.
        """
        batch = self._coming.pop((step, shard)).result()
        with self._tracing:
            place = (self.config.seed, step, shard)
            mx.random.seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
            weights = self.model.trainable_parameters()
            try:
                (_, loss, count, parts), gradients = self._differentiate(weights, batch)
            finally:
                self.model.update(weights)
        if self.half:
            scale = self.scale
            gradients = tree_map(lambda g: g * (count / scale), gradients)
        mx.eval(loss, count, parts, gradients)
        learned = cast(float, count.item())
        return Taught(
            loss=cast(float, loss.item()),
            learned=learned,
            tokens=sum(batch.lengths) if isinstance(batch, Rows) else learned,
            parts={name: cast(float, part.item()) for name, part in parts.items()},
            gradients=gradients,
        )

    def _weighted_loss(
        self, weights: Any, batch: Batch
    ) -> tuple[mx.array, mx.array, mx.array, Parts]:
        """What is differentiated, and mean, number and parts of the loss."""
        if self.config.precision != "float32":
            kind = getattr(mx, self.config.precision)
            weights = tree_map(lambda x: x.astype(kind), weights)
        self.model.update(weights)
        loss, count, *rest = self.loss(self.model, batch)
        parts: Parts = rest[0] if rest else {}
        return loss * (self.scale if self.half else count), loss, count, parts
