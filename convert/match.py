"""A source's tensors matched with a format's rules: a step for each, nothing checked."""

import re
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mm1_mlx.errors import CheckpointError

from .rules import Op, Rules
from .step import Shapes, Step


def steps_of(rules: Rules, found: Shapes, shapes: Shapes) -> list[Step]:
    """One step per rule match, gathered where the op gathers; drops have no targets.

    Args:
        rules: the format's table.
        found: the source's tensors.
        shapes: every tensor that the model may have.

    Raises:
        CheckpointError: a source tensor has no rule, or two.
    """
    patterns = [(_compile(source), target) for source, target in rules.items()]
    steps: list[Step] = []
    gathered: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    functions: dict[tuple[str, ...], Callable[..., tuple[mx.array, ...]]] = {}
    orphans = []
    joined = {n for rule in rules.values() if isinstance(rule, Op) for n in rule.others}
    for name in sorted(set(found) - joined):
        matches = [(m, rule) for p, rule in patterns if (m := p.fullmatch(name))]
        if len(matches) != 1:
            orphans.append(name)
            continue
        match, rule = matches[0]
        numbers = [int(n) for n in match.groups()]
        op = _as_op(rule)
        if op.scatter:
            steps += _scatter(op, name, numbers, found[name], shapes)
            continue
        targets = tuple(_fill(t, numbers) for t in op.targets)
        function = _sized(op, targets, shapes)
        if op.gather:
            gathered.setdefault(targets, []).append((numbers[-1], name))
            functions[targets] = function
        elif missing := [x for x in op.others if x not in found]:
            raise CheckpointError(
                f"source tensor {name!r} belongs with {missing[0]!r}, which is missing; "
                "the source is incomplete, get it again"
            )
        else:
            plain, sources = isinstance(rule, str), (name, *op.others)
            steps.append(Step(sources, targets, function, each=op.each, plain=plain))
    if orphans:
        raise CheckpointError(
            f"{len(orphans)} source tensors have no rule, e.g. "
            f"{[name[:80] for name in orphans[:5]]}; the "
            "source is not laid out as its config.json says"
        )
    for targets, numbered in gathered.items():
        numbers = sorted(number for number, _ in numbered)
        if numbers != list(range(len(numbers))):
            raise CheckpointError(
                f"{targets[0]!r} is made of tensors numbered {numbers[:8]}, expected "
                f"0 to {len(numbers) - 1}; the source is incomplete, get it again"
            )
        names = tuple(name for _, name in sorted(numbered))
        steps.append(Step(names, targets, functions[targets], gather=True))
    return steps


def _scatter(
    op: Op, name: str, numbers: list[int], shape: tuple[int, ...], shapes: Shapes
) -> list[Step]:
    """A step for every place along the source's first axis."""
    steps = []
    for i in range(shape[0] if shape else 0):
        targets = tuple(_fill(t, [*numbers, i]) for t in op.targets)
        steps.append(Step((name,), targets, _sized(op, targets, shapes), row=i))
    return steps


def _sized(
    op: Op, targets: tuple[str, ...], shapes: Shapes
) -> Callable[..., tuple[mx.array, ...]]:
    """The op's function, with its targets' shapes where it asks for them."""
    if not op.sized:
        return op.function
    # A target without a shape is unknown, which is an error before this is called.
    return partial(op.function, shapes=[shapes.get(target, ()) for target in targets])


def _compile(pattern: str) -> re.Pattern[str]:
    # No number that Python would not read, and no other alphabet's digits.
    return re.compile(
        "([0-9]{1,6})".join(re.escape(part) for part in pattern.split("{}"))
    )


def _as_op(rule: str | Op | None) -> Op:
    if isinstance(rule, Op):
        return rule
    return Op((rule,) if rule else (), lambda x: (x,))


def _fill(target: str, numbers: list[int]) -> str:
    remaining = iter(numbers)
    return re.sub(r"\{(-1)?\}", lambda m: str(next(remaining) + int(m[1] or 0)), target)
