"""A source's tensors matched with a format's rules and the model's tensors, by shape."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mm1_mlx.errors import CheckpointError

from .rules import Op, Rules

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """Some source tensors, and what becomes of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    function: Callable[..., tuple[mx.array, ...]]

    def __call__(
        self, read: Callable[[str], mx.array]
    ) -> Iterable[tuple[str, mx.array]]:
        """The target tensors by name; ``read`` gives a source tensor."""
        tensors = self.function(*(read(name) for name in self.sources))
        return zip(self.targets, tensors, strict=True)


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
    for step in _steps(rules, found):
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
    return Plan(tuple(steps), tuple(sorted(dropped)))


def _steps(rules: Rules, found: Shapes) -> list[Step]:
    """One step per rule match, gathered where the op gathers; drops have no targets."""
    patterns = [(_compile(source), target) for source, target in rules.items()]
    steps: list[Step] = []
    gathered: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    functions: dict[tuple[str, ...], Callable[..., tuple[mx.array, ...]]] = {}
    orphans = []
    for name in sorted(found):
        matches = [(m, rule) for p, rule in patterns if (m := p.fullmatch(name))]
        if len(matches) != 1:
            orphans.append(name)
            continue
        match, rule = matches[0]
        numbers = [int(n) for n in match.groups()]
        op = _as_op(rule)
        targets = tuple(_fill(t, numbers) for t in op.targets)
        if op.gather:
            gathered.setdefault(targets, []).append((numbers[-1], name))
            functions[targets] = op.function
        else:
            steps.append(Step((name,), targets, op.function))
    if orphans:
        raise CheckpointError(
            f"{len(orphans)} source tensors have no rule, e.g. {orphans[:5]}; the "
            "source is not laid out as its config.json says"
        )
    for targets, numbered in gathered.items():
        names = tuple(name for _, name in sorted(numbered))
        steps.append(Step(names, targets, functions[targets]))
    return steps


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(re.escape(part) for part in pattern.split("{}")))


def _as_op(rule: str | Op | None) -> Op:
    if isinstance(rule, Op):
        return rule
    return Op((rule,) if rule else (), lambda x: (x,))


def _fill(target: str, numbers: list[int]) -> str:
    remaining = iter(numbers)
    return re.sub(r"\{(-1)?\}", lambda m: str(next(remaining) + int(m[1] or 0)), target)


def _check_shapes(step: Step, found: Shapes, wanted: Shapes) -> None:
    expected = [wanted.get(target) for target in step.targets]
    try:
        made = [tuple(x.shape) for _, x in step(lambda name: mx.zeros(found[name]))]
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
