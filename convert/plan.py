"""A source's tensors matched with a format's rules and the model's tensors, by shape."""

from collections.abc import Iterable
from dataclasses import dataclass

from mm1_mlx.errors import CheckpointError

from .match import steps_of
from .rules import Rules
from .step import Shapes, Step


@dataclass(frozen=True)
class Plan:
    """Every source tensor's fate."""

    steps: tuple[Step, ...]
    # Sources of tensors that this model does not have, or that a rule drops.
    dropped: tuple[str, ...]


def plan(rules: Rules, found: Shapes, wanted: Shapes, known: Shapes) -> Plan:
    """What fills the wanted tensors.

    Args:
        rules: the format's table.
        found: the source's tensors.
        wanted: the model's tensors that this source must fill, all of them.
        known: tensors that a source of this format may hold besides: blocks past the
            feature layer, parts that come from elsewhere. They are dropped.

    Raises:
        CheckpointError: a source has no rule, a target is unknown, missing, filled
            twice, or of another shape.
    """
    steps: list[Step] = []
    dropped: list[str] = []
    for step in steps_of(rules, found, {**known, **wanted}):
        unknown = [t for t in step.targets if t not in wanted and t not in known]
        if unknown:
            raise CheckpointError(
                f"source tensor {step.sources[0]!r} is {unknown[0]!r} here, which "
                "config.json says the model does not have"
            )
        if any(target in wanted for target in step.targets):
            _check_shapes(step, found, wanted)
            steps.append(step)
        else:
            dropped.extend(step.sources)
    _check_filled(steps, wanted)
    # Layers that are one tensor may be dropped in part.
    used = {name for step in steps for name in step.sources}
    return Plan(tuple(steps), tuple(sorted({*dropped} - used)))


def _check_shapes(step: Step, found: Shapes, wanted: Shapes) -> None:
    expected = [wanted.get(target) for target in step.targets]
    try:
        made = step.shapes(found)
    except CheckpointError:  # the op says itself what is wrong
        raise
    except ValueError:  # the op cannot take a tensor of this rank or size
        made = []
    if made != expected:
        name = step.sources[0]
        raise CheckpointError(
            f"source tensor {name!r} has shape {list(found[name])}, which does not make "
            f"{step.targets[0]!r} of shape {list(expected[0] or ())}; "
            "config.json and the weights do not belong together"
        )


def _check_filled(steps: Iterable[Step], wanted: Shapes) -> None:
    sources: dict[str, str] = {}
    for step in steps:
        for target in step.targets:
            if target in sources:
                raise CheckpointError(
                    f"{target!r} has two sources, {sources[target]!r} and "
                    f"{step.sources[0]!r}; the source mixes two layouts"
                )
            sources[target] = step.sources[0]
    missing = sorted(set(wanted) - set(sources))
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the model have no source, e.g. {missing[:5]}; "
            "the source is incomplete, get it again"
        )
