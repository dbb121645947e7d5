"""Optimizers: which weights each one is for, its schedule, and what it keeps of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Literal, get_args

import mlx.core as mx
import mlx.optimizers as optim

from mm1_mlx.errors import ConfigError
from mm1_mlx.train.config import PARTS, TrainConfig

Name = Literal["adamw", "muon", "adafactor"]
# axlearn's of its language models.
BETAS = [0.9, 0.95]


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """The config's optimizer, with a schedule of its own for every part's rate.

    Weights lose ``weight_decay`` times the scheduled rate, a share of themselves, every
    step. What axlearn calls decoupled decay, lambda, is that times the peak: MM1's
    lambda = 0.1 eta is a ``weight_decay`` of 0.1.

    AdaFactor is mlx's, its rate absolute as axlearn advises: neither relative to the
    step nor to the weight. It factors every matrix, axlearn's only those of 128 rows
    and columns, and it has no first moment.

    Muon's matrices have a rate and a decay of their own; of a part with a peak of its
    own, their rate is in the proportion of that to ``learning_rate``.

    Source: ``adamw_decoupled_optimizer`` and ``adafactor_optimizer`` of
    https://github.com/apple/axlearn/blob/064ecb6f84d50a5ecb2e4aedf469c9b0436865b9/
    axlearn/common/optimizers.py
    """
    decay = config.weight_decay

    def at(rate: float) -> optim.Optimizer:
        if config.optimizer == "adafactor":
            return optim.Adafactor(
                learning_rate=schedule(config, rate),
                weight_decay=decay,
                relative_step=False,
                scale_parameter=False,
            )
        return optim.AdamW(
            learning_rate=schedule(config, rate),
            betas=BETAS,
            weight_decay=decay,
            bias_correction=True,
        )

    optimizers: list[optim.Optimizer] = []
    filters: list[Callable[[str, mx.array], bool]] = []
    own = [part for part in PARTS if config.rate(part) != config.learning_rate]
    if config.optimizer == "muon":
        for part in own:
            optimizers.append(_muon(config, config.rate(part) / config.learning_rate))
            filters.append(partial(_is_matrix_of, part))
        optimizers.append(_muon(config, 1.0))
        filters.append(is_matrix)
    for part in own:
        optimizers.append(at(config.rate(part)))
        filters.append(partial(_is_of, part))
    rest = at(config.learning_rate)
    return optim.MultiOptimizer([*optimizers, rest], filters) if optimizers else rest


class DecoupledMuon(optim.Muon):
    """Muon whose decay is a share of the weight, and to which every expert is a matrix.

    mlx adds the decay to the gradient, where orthogonalisation takes its size away, and
    makes one matrix of stacked ones, [E, out, in], of which each then moves by less.
    """

    def __init__(
        self, learning_rate: Callable[[mx.array], mx.array], weight_decay: float
    ) -> None:
        super().__init__(learning_rate=learning_rate, weight_decay=0.0)
        self.decay = weight_decay

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """The weight behind a step; what is decayed is the weight before it."""
        if parameter.ndim == 3:
            stepped = self._step_each(gradient, parameter, state)
        else:
            stepped = super().apply_single(gradient, parameter, state)
        if not self.decay:
            return stepped
        return stepped - self.learning_rate * self.decay * parameter

    def _step_each(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        stepped, kept = [], []
        for i in range(len(parameter)):
            own = {"v": state["v"][i]}
            stepped.append(super().apply_single(gradient[i], parameter[i], own))
            kept.append(own["v"])
        state["v"] = mx.stack(kept)
        return mx.stack(stepped)


def _muon(config: TrainConfig, share: float) -> optim.Optimizer:
    """Of matrices whose rate is this share of ``matrix_learning_rate``."""
    rate = schedule(config, share * config.matrix_learning_rate)
    return DecoupledMuon(rate, config.matrix_decay)


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


def _is_of(part: str, path: str, _: mx.array) -> bool:
    return path.startswith(f"{part}.")


def _is_matrix_of(part: str, path: str, tensor: mx.array) -> bool:
    return _is_of(part, path, tensor) and is_matrix(path, tensor)


def is_matrix(path: str, tensor: mx.array) -> bool:
    """Whether a weight maps vectors to vectors, which an embedding table does not."""
    return _is_matrix(path, tuple(tensor.shape))


def kept_numbers(optimizer: str, path: str, shape: tuple[int, ...]) -> int:
    """How many numbers an optimizer keeps of a weight, from step to step.

    AdamW two of every number; Muon one of a matrix's, and AdamW what is none; AdaFactor
    the sums of rows and columns.

    Raises:
        ConfigError: there is no such optimizer.
    """
    match optimizer:
        case "adamw":
            return 2 * prod(shape)
        case "muon":
            return (1 if _is_matrix(path, shape) else 2) * prod(shape)
        case "adafactor" if len(shape) < 2:
            return prod(shape)
        case "adafactor":
            return prod(shape[:-1]) + prod((*shape[:-2], shape[-1]))
    raise ConfigError(f"optimizer {optimizer!r} is not one of {list(get_args(Name))}")


def _is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and "embed_tokens" not in path and "position" not in path
