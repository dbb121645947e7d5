"""What a training run is made of: its flags, its config file and its record are one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from functools import partial
from typing import Any, Literal

from mm1_mlx.errors import ConfigError
from mm1_mlx.section import Section

# The parts of a model that can be trained, in the order of the line.
PARTS = ("vision", "connector", "region", "decoder")
# In their place: nothing in full, adapters alone.
NOTHING = "none"
# Where files lie: the data are known by their digest.
PLACES = frozenset({"data", "valid", "data_root", "image_folder", "outside"})
# What a run may change when it is continued: that, its length, what it leaves behind,
# what it is measured by, and what becomes of rows that cannot be used.
MAY_CHANGE = frozenset(
    {
        *PLACES,
        *("steps", "epochs", "decay_steps", "final_fraction", "save_every"),
        *("log_every", "eval_every", "checkpointing", "wandb"),
        *("valid_examples", "skip_bad"),
    }
)
MATRIX_LEARNING_RATE = 0.02
# Steps and seeds are counted in 32 bits; more passes nobody lives to see.
MOST = {"steps": 2**31 - 1, "epochs": 1_000_000, "seed": 2**32 - 1}


def _flag(panel: str, default: Any, text: str) -> Any:
    """A field whose flag has this help, under this title."""
    return field(default=default, metadata={"help": text, "panel": panel})


_data = partial(_flag, "Data")
_what = partial(_flag, "What is trained")
_how = partial(_flag, "How")
_rate = partial(_flag, "Learning rates by part")
_left = partial(_flag, "What is left behind")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """What a run is made of: its flags and its record."""

    # Of which command; what it leaves to a default depends on it.
    stage: Literal["connector", "sft", "pretrain"] | None = None

    # The data
    data: tuple[str, ...] = _data((), "files, folders or mixtures to learn from")
    data_root: str | None = _data(None, "where the paths of a mixture begin")
    image_folder: str | None = _data(None, "where relative pictures lie")
    outside: bool = _data(False, "let pictures lie outside the data's folder")
    valid: tuple[str, ...] = _data((), "files to measure the loss on")
    valid_share: float = _data(0.0, "share of the rows kept to measure the loss on")
    valid_examples: int = _data(256, "most examples to measure the loss on")
    skip_bad: bool = _data(False, "leave out rows that cannot be used")
    max_length: int = _data(2048, "longest example, in tokens")
    truncate: bool = _data(False, "cut longer text, never pictures")
    resolution: str | None = _data(None, "how pictures become tiles, e.g. 2x672")
    date: str | None = _data(
        None,
        "day that a chat template writes, as 2026-01-31 (default: the run's first)",
    )
    packing: bool = _data(False, "examples behind one another, without padding")
    batch_size: int = _data(1, "examples of a micro-batch")
    micro_batches: int = _data(1, "batches of a step, shared out among processes")

    # What is trained
    trained: tuple[str, ...] = _what(
        PARTS,
        f"parts trained in full ({', '.join(PARTS)}), regular expressions of tensors' "
        f"names, or {NOTHING}",
    )
    adapter: Literal["none", "lora", "dora"] = _what("none", "low-rank adapters")
    adapter_rank: int = _what(8, "rank of adapters")
    adapter_scale: float = _what(2.0, "factor of an adapter's matrices, alpha / rank")
    adapter_dropout: float = _what(0.0, "share of an adapter's inputs left out")
    adapter_layers: int | None = _what(None, "last blocks that have adapters")
    adapter_targets: tuple[str, ...] = _what(
        ("decoder",),
        "where adapters stand: decoder, vision, of either .attention or .mlp, "
        "decoder.experts, connector, head, or regular expressions of layers' paths",
    )

    # How
    steps: int = _how(MISSING, "optimizer steps")
    epochs: float | None = _how(None, "passes over the data, instead of steps")
    optimizer: Literal["adamw", "adafactor", "muon"] = _how(
        "adamw", "muon: AdamW for embeddings and vectors"
    )
    learning_rate: float = _how(MISSING, "peak of the schedule")
    vision_learning_rate: float | None = _rate(None, "peak of the encoder's")
    connector_learning_rate: float | None = _rate(None, "peak of the connector's")
    region_learning_rate: float | None = _rate(None, "peak of the region sampler's")
    decoder_learning_rate: float | None = _rate(None, "peak of the decoder's")
    matrix_learning_rate: float = _rate(
        MATRIX_LEARNING_RATE,
        "peak of muon's matrices, of a part in the proportion of its own",
    )
    warmup_steps: int = _how(200, "linear warmup, in steps")
    decay_steps: int = _how(1000, "cosine decay at the end, in steps")
    final_fraction: float = _how(0.1, "last learning rate, as a share of the peak")
    weight_decay: float = _how(
        0.01,
        "what weights lose a step, as a share of the learning rate; not muon's matrices",
    )
    matrix_decay: float = _how(
        0.0, "what muon's matrices lose a step, as a share of their learning rate"
    )
    clip_norm: float = _how(1.0, "largest gradient norm")
    balance_weight: float = _how(0.01, "weight of the load-balance loss of experts")
    z_weight: float = _how(0.001, "weight of the router z-loss of experts")
    precision: Literal["float16", "bfloat16", "float32"] = _how(
        "float32", "to compute in; trained weights stay float32"
    )
    checkpointing: bool = _how(
        False, "compute blocks again for their gradients, to save memory"
    )
    seed: int = _how(0, "of initialisation, order and dropout")

    # What is left behind
    save_every: int = _left(200, "steps per checkpoint")
    log_every: int = _left(20, "steps per log line")
    eval_every: int = _left(0, "steps per validation, 0 for one at each checkpoint")
    wandb: str | None = _left(None, "project of Weights & Biases to log to")

    def __post_init__(self) -> None:
        if NOTHING in self.trained:
            if len(self.trained) > 1:
                raise ConfigError(
                    f"TrainConfig.trained: {list(self.trained)} is {NOTHING!r} and more; "
                    f"give {NOTHING} alone, or leave it out"
                )
            object.__setattr__(self, "trained", ())
        for name in (
            *("steps", "epochs", "batch_size", "micro_batches", "max_length"),
            *("adapter_rank", "valid_examples"),
            *("save_every", "log_every", "learning_rate", "matrix_learning_rate"),
            *(f"{part}_learning_rate" for part in PARTS),
            *("clip_norm", "adapter_scale"),
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"TrainConfig.{name}: {value} is not above 0")
        for name in (
            *("warmup_steps", "decay_steps", "weight_decay", "matrix_decay"),
            *("balance_weight", "z_weight", "eval_every", "seed"),
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"TrainConfig.{name}: {getattr(self, name)} is below 0"
                )
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise ConfigError(f"TrainConfig.{name}: {value} is above {most:,}")
        for name in ("valid_share", "adapter_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"TrainConfig.{name}: {getattr(self, name)} is not in [0, 1)"
                )
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(
                f"TrainConfig.final_fraction: {self.final_fraction} is not in [0, 1]"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f"TrainConfig: warmup_steps {self.warmup_steps} and decay_steps "
                f"{self.decay_steps} are more than the {self.steps} steps"
            )
        muons = (self.matrix_learning_rate, self.matrix_decay)
        if self.optimizer != "muon" and muons != (MATRIX_LEARNING_RATE, 0.0):
            raise ConfigError(
                "TrainConfig: matrix_learning_rate and matrix_decay are muon's, "
                f"not {self.optimizer}'s; give learning_rate and weight_decay, or "
                "optimizer muon"
            )
        for each in fields(self):
            value = getattr(self, each.name)
            of_adapters = each.name.startswith("adapter_") and value != each.default
            if of_adapters and self.adapter == "none":
                raise ConfigError(
                    f"TrainConfig.{each.name}: {value!r} is of adapters, and none are "
                    "trained; leave it out, or train some (adapter lora)"
                )
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ConfigError(
                    f"TrainConfig.date: {self.date!r} is no day, expected one like "
                    "2026-01-31"
                ) from None
        if self.valid and self.valid_share:
            raise ConfigError(
                f"TrainConfig.valid_share: {self.valid_share:g} keeps rows of the data to "
                f"measure the loss on, and valid names others, {list(self.valid)}; give "
                "one of the two"
            )
        for pattern in self.trained:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"TrainConfig.trained: {pattern!r} is neither one of {list(PARTS)} "
                    f"nor a regular expression ({error})"
                ) from None

    def rate(self, part: str) -> float:
        """The peak learning rate of a part."""
        own: float | None = getattr(self, f"{part}_learning_rate")
        return self.learning_rate if own is None else own

    def measures(self, step: int) -> bool:
        """Whether the held-out loss is measured behind a step, where rows are held out."""
        if self.eval_every:
            return step % self.eval_every == 0
        return step % self.save_every == 0 or step == self.steps

    def measurements_after(self, step: int) -> int:
        """How many of them come behind those of a step."""
        every = self.eval_every or self.save_every
        last = not self.eval_every and step < self.steps and self.steps % every > 0
        return self.steps // every - step // every + last

    def differences(self, then: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
        """What another run has differently that may not change: name, its, ours."""
        for each in fields(self):
            its, ours = getattr(then, each.name), getattr(self, each.name)
            if each.name not in MAY_CHANGE and its != ours:
                yield each.name, its, ours
