"""Which of a model's weights are trained: parts, single tensors, adapters beside layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, cast

import mlx.nn as nn
from mlx.utils import tree_flatten

from mm1_mlx.adapters import AdapterConfig, attach
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.train.config import PARTS, TrainConfig


def make_trainable(model: MM1, config: TrainConfig) -> None:
    """Freeze a model but for what the config trains, its adapters attached.

    Raises:
        ConfigError: a part is not the model's, or a pattern matches none of its tensors;
            what is to be trained in full is packed, or gets an adapter too; or nothing
            is to be trained.
    """
    model.freeze()
    full = list(_named(model, config.trained))
    packed = sorted(
        {name.rpartition(".")[0] for name in full if _is_packed(model, name)}
    )
    if packed:
        raise ConfigError(
            f"{len(packed)} of the modules to train in full are packed, e.g. "
            f"{packed[:3]}; train adapters beside them (--adapter lora), or the model "
            "that was quantized"
        )
    modules = {name.rpartition(".")[0] for name in full}
    for module in modules:
        keys = [name.rpartition(".")[2] for name in full if _holds(module, name)]
        _module(model, module).unfreeze(recurse=False, keys=keys)
    if config.adapter != "none":
        # They freeze the layers that they stand beside.
        twice = sorted(modules & {*attach(model, adapter_config(config), config.seed)})
        if twice:
            raise ConfigError(
                f"{len(twice)} of the layers to train in full would get adapters too, "
                f"e.g. {twice[:3]}; train them in full (--adapter none), or name other "
                "parts to train in full (--trained) or other layers for adapters "
                "(--adapter-targets)"
            )
    if not tree_flatten(model.trainable_parameters()):
        raise ConfigError(
            "nothing is to be trained; name parts (--trained connector) or adapters "
            "(--adapter lora)"
        )


def check_rates(model: MM1, given: Mapping[str, Any]) -> None:
    """Pass only if every part that is given a learning rate of its own is trained.

    Raises:
        ConfigError: nothing of one is.
    """
    trained = {part for part, (learned, _) in counts(model).items() if learned}
    for part in PARTS:
        rate = given.get(f"{part}_learning_rate")
        if rate is not None and part not in trained:
            raise ConfigError(
                f"TrainConfig.{part}_learning_rate: nothing of the part {part} is "
                f"trained, only of {sorted(trained)}; leave out its rate, or train it "
                f"(--trained {part})"
            )


def adapter_config(config: TrainConfig) -> AdapterConfig:
    """Of the adapters that a run trains."""
    assert config.adapter != "none"
    return AdapterConfig(
        kind=config.adapter,
        rank=config.adapter_rank,
        scale=config.adapter_scale,
        dropout=config.adapter_dropout,
        layers=config.adapter_layers,
        where=config.adapter_targets,
    )


def counts(model: MM1) -> dict[str, tuple[int, int]]:
    """By part: how many numbers are trained, and how many it has with them.

    Of packed weights those that they stand for.
    """
    trained: Counter[str] = Counter()
    for name, x in cast(Any, tree_flatten(model.trainable_parameters())):
        trained[name.partition(".")[0]] += x.size
    total: Counter[str] = Counter()
    for path, module in model.named_modules():
        own = {k: x for k, x in module.items() if hasattr(x, "size")}
        if "scales" in own:
            layer = cast(Any, module)
            own["weight"] = layer.scales.size * layer.group_size
            own = {k: x for k, x in own.items() if k not in ("scales", "biases")}
        part = path.partition(".")[0]
        total[part] += sum(x if isinstance(x, int) else x.size for x in own.values())
    return {part: (trained[part], total[part]) for part in total if total[part]}


def _named(model: MM1, wanted: Iterable[str]) -> Iterable[str]:
    """The tensors that parts and patterns name, in the model's order.

    Raises:
        ConfigError: one of them names none.
    """
    names = list(model.tensors())
    chosen: set[str] = set()
    for word in wanted:
        if word in PARTS:
            found = {name for name in names if name.startswith(f"{word}.")}
        else:
            found = {name for name in names if re.fullmatch(word, name)}
        if not found:
            parts = [part for part in PARTS if part in model]
            raise ConfigError(
                f"{word!r} names nothing of the model that can be trained; name a part "
                f"of {parts} or a regular expression of whole names, such as "
                f"{names[0]!r}"
            )
        chosen |= found
    return (name for name in names if name in chosen)


def _is_packed(model: MM1, name: str) -> bool:
    return "scales" in _module(model, name.rpartition(".")[0])


def _holds(module: str, name: str) -> bool:
    return name.rpartition(".")[0] == module


def _module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, the model itself at none."""
    held: Any = model
    for key in path.split(".") if path else ():
        held = held[int(key)] if isinstance(held, list) else held[key]
    return cast(nn.Module, held)
