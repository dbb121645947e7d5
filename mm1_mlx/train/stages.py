"""What each ``mm1 train`` command leaves to a default: the paper's, where it says it.

    connector   encoder and decoder frozen
    sft         adapters on the decoder, the connector in full: what a Mac has room for
    sft, full   everything, as the paper
    pretrain    everything, by the paper's laws

Sizes of batches are a Mac's, not the paper's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import ceil
from typing import Any, Literal

from mm1_mlx.errors import ConfigError
from mm1_mlx.train import paper
from mm1_mlx.train.config import MAY_CHANGE, PARTS, TrainConfig

Stage = Literal["connector", "sft", "pretrain"]

# Honeybee's for its C-Abstractor between a frozen encoder and decoder (arXiv 2312.06742).
CONNECTOR_LEARNING_RATE = 3e-4
# For all sizes of decoders, as MM1's is remembered; the paper's text was not checked for it.
PRETRAINING_CONNECTOR_RATE = 8e-5
# Low-rank matrices learn best at about ten times a full fine-tuning's rate.
ADAPTER_LEARNING_RATE = 10 * paper.SFT_LEARNING_RATE
WARMUP_SHARE = 0.05
# A dozen steps, once through 200 pictures, teach nothing at these rates.
LEAST_STEPS = 100
# What measuring the held-out loss takes at most of a run, and on how many rows at most
# and at least: on fewer it says little.
MEASURED_SHARE, MOST_MEASURED, LEAST_MEASURED = 0.1, 256, 16
# A step on a row takes at least so many times what measuring it does.
STEP_COST = 2
# At most so many steps from one to the next; of a short run a twentieth and a tenth.
LOG_EVERY, SAVE_EVERY = 10, 200

_COMMON = {"batch_size": 4, "micro_batches": 4, "weight_decay": 0.0}
_JOINTS = ("connector", "region")
DEFAULTS: dict[Stage, dict[str, Any]] = {
    "connector": _COMMON
    | {"trained": _JOINTS, "learning_rate": CONNECTOR_LEARNING_RATE},
    "sft": _COMMON
    | {
        "trained": _JOINTS,
        "adapter": "lora",
        "learning_rate": ADAPTER_LEARNING_RATE,
        "connector_learning_rate": paper.SFT_LEARNING_RATE,
        "region_learning_rate": paper.SFT_LEARNING_RATE,
        "final_fraction": paper.SFT_FINAL_FRACTION,
    },
    "pretrain": _COMMON
    | {
        "trained": PARTS,
        "connector_learning_rate": PRETRAINING_CONNECTOR_RATE,
        "weight_decay": paper.DECAY_SHARE,
        "final_fraction": paper.FINAL_FRACTION,
    },
}
# In their places where the supervised stage trains everything.
FULL: dict[str, Any] = {
    "trained": PARTS,
    "adapter": "none",
    "optimizer": "adafactor",
    "learning_rate": paper.SFT_LEARNING_RATE,
    "connector_learning_rate": None,
    "region_learning_rate": None,
    "warmup_steps": 0,
}
# What depends on the model, the data or the machine, in words.
DERIVED = {
    "steps": f"as many as take all rows once, at least {LEAST_STEPS}",
    "learning_rate": "by the paper's law",
    "warmup_steps": f"{WARMUP_SHARE:.0%} of the steps, at most {paper.WARMUP_STEPS:,}",
    "decay_steps": "all behind the warmup",
    "valid_examples": f"what takes {MEASURED_SHARE:.0%} of the run, {LEAST_MEASURED} to "
    f"{MOST_MEASURED}",
    "precision": "what the device computes best",
    "adapter_layers": "all",
    **{f"{part}_learning_rate": "--learning-rate" for part in PARTS},
    "log_every": f"a twentieth of the steps, at most {LOG_EVERY}",
    "save_every": f"a tenth of the steps, at most {SAVE_EVERY}",
}


def merged(then: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were given before, and those that are now, which win.

    Steps and passes are one setting, how long to train: the last that was given counts.
    """
    lengths = ("steps", "epochs")
    longer = any(given.get(name) is not None for name in lengths)
    kept = {k: x for k, x in then.items() if not (longer and k in lengths)}
    return {**kept, **given}


def check_given(given: Mapping[str, Any]) -> None:
    """Pass only if settings can be, whatever the rest will be.

    Raises:
        ConfigError: a field is unknown or cannot be.
    """
    if given.get("steps") is not None and given.get("epochs") is not None:
        raise ConfigError(
            f"steps {given['steps']} and epochs {given['epochs']:g} both say how long to "
            "train; give one of them"
        )
    rest = {"steps": 1, "learning_rate": 1.0, "adapter": "lora", **given}
    # How they fit together depends on the rest.
    TrainConfig.from_dict({**rest, "warmup_steps": 0, "decay_steps": 0})


def plan(
    stage: Stage,
    given: Mapping[str, Any],
    *,
    full: bool = False,
    rows: int,
    parts: Collection[str],
    packed: Collection[str],
    parameters: int,
    precision: str,
    begun: TrainConfig | None = None,
) -> TrainConfig:
    """The run of a stage: what is ``given``, and the stage's defaults for the rest.

    Args:
        stage: which.
        given: fields of ``TrainConfig`` by name.
        full: whether the supervised stage trains everything.
        rows: that there are to learn from.
        parts: that the model has.
        packed: parts that are packed, at least in part, so not trained in full beside
            adapters.
        parameters: the decoder's, as the paper's law counts them.
        precision: what the device computes best.
        begun: the run that is continued, whose settings stand where none is given.

    Raises:
        ConfigError: a field is unknown or cannot be.
    """
    values = DEFAULTS[stage] | {"precision": precision}
    if full:
        values |= FULL
    adapted = given.get("adapter", values.get("adapter", "none")) != "none"
    values["trained"] = tuple(
        part
        for part in values["trained"]
        if part in parts and not (part in packed and adapted)
    )
    values.setdefault("learning_rate", paper.peak_learning_rate(parameters))
    if begun:
        stands = begun.to_dict()
        values |= {k: v for k, v in stands.items() if k not in MAY_CHANGE}
        if full:
            values |= FULL | {"trained": values["trained"]}
    values |= {**given, "stage": stage}
    size = values["batch_size"] * values["micro_batches"]
    passes = values.get("epochs")
    steps = max(1, ceil((passes or 1) * rows / max(size, 1)))
    steps = values.setdefault("steps", steps if passes else max(steps, LEAST_STEPS))
    warmup = min(paper.WARMUP_STEPS, int(WARMUP_SHARE * steps))
    warmup = values.setdefault("warmup_steps", warmup)
    values.setdefault("decay_steps", max(0, steps - warmup))
    values.setdefault("log_every", min(LOG_EVERY, max(1, steps // 20)))
    values.setdefault("save_every", min(SAVE_EVERY, max(1, steps // 10)))
    if begun:
        # Else its curve would be of other rows from here on.
        values.setdefault("valid_examples", begun.valid_examples)
    config = TrainConfig.from_dict(values)
    if "valid_examples" in values:
        return config
    return replace(config, valid_examples=_measured(config))


def _measured(config: TrainConfig) -> int:
    """How many rows to measure the held-out loss on."""
    examples = config.steps * config.batch_size * config.micro_batches
    rows = MEASURED_SHARE * STEP_COST * examples / (1 + config.measurements_after(0))
    return min(MOST_MEASURED, max(LEAST_MEASURED, int(rows)))
