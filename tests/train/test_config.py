"""A run's settings: what cannot be is refused, and a record reads back as itself."""

import json
from dataclasses import replace

import pytest

from mm1_mlx.errors import ConfigError
from mm1_mlx.train.config import TrainConfig

CONFIG = TrainConfig(steps=8, learning_rate=3e-3, warmup_steps=2, decay_steps=4)


def test_a_schedule_longer_than_the_run_is_refused():
    with pytest.raises(
        ConfigError, match="warmup_steps 2 and decay_steps 7 are more than the 8 steps"
    ):
        replace(CONFIG, decay_steps=7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "TrainConfig.steps: 0 is not above 0"),
        ({"micro_batches": 0}, "TrainConfig.micro_batches: 0 is not above 0"),
        ({"save_every": 0}, "TrainConfig.save_every: 0 is not above 0"),
        ({"log_every": -1}, "TrainConfig.log_every: -1 is not above 0"),
        ({"warmup_steps": -1}, "TrainConfig.warmup_steps: -1 is below 0"),
        ({"learning_rate": 0.0}, "TrainConfig.learning_rate: 0.0 is not above 0"),
        ({"vision_learning_rate": 0.0}, "vision_learning_rate: 0.0 is not above 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not above 0"),
        ({"adapter_dropout": 1.0}, r"adapter_dropout: 1.0 is not in \[0, 1\)"),
        ({"final_fraction": 5.0}, r"final_fraction: 5.0 is not in \[0, 1\]"),
        ({"final_fraction": -0.1}, r"final_fraction: -0.1 is not in \[0, 1\]"),
        ({"final_fraction": float("nan")}, r"final_fraction: nan is not in \[0, 1\]"),
        ({"trained": ("de(",)}, r"trained: 'de\(' is neither one of \['vision', 'conn"),
        ({"epochs": 0.0}, "TrainConfig.epochs: 0.0 is not above 0"),
        ({"matrix_decay": -0.1}, "matrix_decay: -0.1 is below 0"),
        ({"matrix_decay": 0.1}, "matrix_decay are muon's, not adamw's; give"),
        ({"trained": ("none", "connector")}, r"'connector'\] is 'none' and more; give"),
        ({"seed": -1}, "TrainConfig.seed: -1 is below 0"),
        ({"seed": 2**32}, "TrainConfig.seed: 4294967296 is above 4,294,967,295"),
        ({"epochs": 1e308}, r"TrainConfig.epochs: 1e\+308 is above 1,000,000"),
        ({"steps": 2**31}, "TrainConfig.steps: 2147483648 is above 2,147,483,647"),
        ({"adapter_rank": 16}, "adapter_rank: 16 is of adapters, and none are trained"),
        (
            {"adapter_targets": ("head",)},
            r"adapter_targets: \('head',\) is of adapters",
        ),
        (
            {"valid": ("v.jsonl",), "valid_share": 0.5},
            r"valid names others, \['v.jsonl'\]",
        ),
        ({"decay_steps": -1}, "TrainConfig.decay_steps: -1 is below 0"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **fields)


def test_a_record_reads_back_as_itself():
    config = replace(CONFIG, data=("a.jsonl", "b.tar"), vision_learning_rate=1e-5)
    record = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(record) == config
    with pytest.raises(ConfigError, match=r"unknown field\(s\) \['learning_rat'\]"):
        TrainConfig.from_dict(record | {"learning_rat": 1e-3})


def test_nothing_in_full_has_a_word():
    assert replace(CONFIG, trained=("none",)).trained == ()


def test_every_field_has_help_for_its_flag():
    from dataclasses import fields

    for field in fields(TrainConfig):
        assert field.name == "stage" or field.metadata["help"], field.name


@pytest.mark.parametrize("eval_every", [0, 1, 4, 7, 99])
@pytest.mark.parametrize("save_every", [1, 3, 10, 99])
def test_measurements_to_come_are_those_that_are_made(eval_every, save_every):
    config = TrainConfig(
        steps=10,
        learning_rate=1.0,
        warmup_steps=0,
        decay_steps=0,
        eval_every=eval_every,
        save_every=save_every,
    )
    for step in range(11):
        made = [x for x in range(step + 1, 11) if config.measures(x)]
        assert config.measurements_after(step) == len(made)
