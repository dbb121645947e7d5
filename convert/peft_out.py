"""Adapters of ours as PEFT's, for the checkpoint that the model was converted from.

The rules are read backwards: what a rule makes of a module says whose matrices those of
our layers are. Where it parts the module's rows, layers that share their first matrix
become one pair again; others stand in a wider pair, each in its own columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.adapters import Adapter, Adapters
from mm1_mlx.adapters.attach import Form
from mm1_mlx.adapters.folder import write
from mm1_mlx.checkpoint import build_model, load_config, packed_on_disk
from mm1_mlx.errors import CheckpointError

from .detect import detect_format
from .expected import possible_shapes
from .peft import EMBEDDING, HEAD, PREFIX, TYING, WEIGHTS, origin_of, parts_elsewhere
from .rules import Op, Rules
from .source import Source
from .step import Shapes

_NUMBER = re.compile(r"\{(-1)?\}")


@dataclass(frozen=True)
class Home:
    """Where a tensor of ours comes from.

    Attributes:
        tensor: the checkpoint's, with a ``{}`` left where experts are numbered.
        op: what it becomes, None where it is only renamed.
        targets: our tensors that it becomes, in order.
    """

    tensor: str
    op: Op | None
    targets: tuple[str, ...]


def export_peft(
    adapter: Adapter, out: Path, model: Path, source: str | None = None
) -> tuple[str, ...]:
    """Write an adapter as a PEFT folder; what is left out of it.

    That is of parts that are no part of the checkpoint, in a model that was put
    together: a new connector, or an encoder from elsewhere.

    Args:
        adapter: ours.
        out: the folder to write.
        model: the folder that the checkpoint was converted to.
        source: that checkpoint; by default what the model's manifest names.

    Raises:
        CheckpointError: the adapter does not fit the model, ``out`` is taken, a weight
            cannot be laid out as the checkpoint has it, or no matrices are left.
    """
    if out.exists():
        raise CheckpointError(f"{str(out)!r} already exists; choose another name")
    config = load_config(model)
    built = build_model(config, packed_on_disk(model, config))
    forms = Adapters(((adapter, 1.0),)).check(built)
    origin = origin_of(model, source)
    with Source(origin) as opened:
        rules = detect_format(opened).rules(opened)
    elsewhere = parts_elsewhere(model, origin)
    tied = HEAD not in built.tensors()
    made = _Export(adapter, rules, possible_shapes(config), forms, elsewhere, tied)
    made.pairs()
    made.full()
    if not made.ranks:
        raise CheckpointError(
            f"{adapter.name} has no matrices for {origin}, only what belongs to "
            f"{sorted({_part(name) for name in made.left})}; name another checkpoint that "
            "the model was put together from by --source, or fuse it with 'mm1 fuse'"
        )
    write(out, WEIGHTS, "pt", made.tensors, lambda _: made.config(origin))
    return tuple(made.left)


def _part(name: str) -> str:
    return name.partition(".")[0]


@dataclass
class _Export:
    """An adapter that is being laid out as PEFT has it."""

    adapter: Adapter
    rules: Rules
    # Every tensor that the checkpoint's model may have, by our name.
    possible: Shapes
    # How the adapter's matrices are laid out, by path.
    forms: dict[str, Form]
    # Parts of the model that are none of the checkpoint's.
    elsewhere: set[str]
    # Whether the head is the embedding.
    tied: bool
    # The names of what is of these.
    left: list[str] = field(default_factory=list)
    tensors: dict[str, mx.array] = field(default_factory=dict)
    # By the checkpoint's module.
    ranks: dict[str, int] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    # PEFT's word for which biases were trained.
    bias: str = "none"

    def pairs(self) -> None:
        """Lay out all low-rank matrices."""
        homes: dict[str, Home] = {}
        for path in self._here(self.adapter.layers):
            home = self._home(f"{path}.weight")
            homes[home.tensor] = home
        for home in homes.values():
            module = home.tensor.removesuffix(".weight")
            paths = [target.removesuffix(".weight") for target in home.targets]
            if home.op is not None and home.op.gather:
                self._add_experts(module, paths[0])
                continue
            self._add_parts(module, paths)
            if home.op is not None:
                self._check_parts(module, home)

    def _add_experts(self, module: str, path: str) -> None:
        """Each expert's matrices by themselves."""
        a, b = self._pair(path)
        scale = self.adapter.scale(path)
        for i in range(a.shape[0]):
            self._put(module.replace("{}", str(i)), a[i], b[i], scale, "linear")

    def _add_parts(self, module: str, paths: list[str]) -> None:
        """The matrices of one module whose rows are those of our layers, in order."""
        here = [path for path in paths if path in self.adapter.layers]
        scale = self.adapter.scale(here[0])
        firsts: list[mx.array] = []
        blocks: list[tuple[int, mx.array]] = []
        for path in paths:
            if path not in here:
                height = self.possible[f"{path}.weight"][0]
                blocks.append((0, mx.zeros((height, 0))))
                continue
            a, b = self._pair(path)
            A, B = a.T, b.T
            if self.adapter.scale(path) != scale:
                B = B * (self.adapter.scale(path) / scale)
            known = [i for i, x in enumerate(firsts) if mx.array_equal(x, A)]
            if not known:
                firsts.append(A)
            blocks.append((known[0] if known else len(firsts) - 1, B))
        widths = [A.shape[0] for A in firsts]
        rows = []
        for which, B in blocks:
            before, after = sum(widths[:which]), sum(widths) - sum(widths[:which])
            after -= B.shape[1]
            rows.append(mx.pad(B, [(0, 0), (before, after)]))
        kind = firsts[0].dtype
        B = mx.concatenate(rows).astype(kind)
        self._put(module, mx.concatenate(firsts), B, scale, self.forms[here[0]])
        if self.adapter.config.kind == "dora":
            if len(here) != len(paths):
                raise CheckpointError(
                    f"{module!r} is one module in the checkpoint, and DoRA has changed "
                    f"only {here} of it; merge the adapter with 'mm1 fuse' instead"
                )
            m = mx.concatenate([self.adapter.tensors[f"{path}.m"] for path in paths])
            self.tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = m

    def _check_parts(self, module: str, home: Home) -> None:
        """Pass only if the rule makes of the pair what it was made from."""
        assert home.op is not None
        A, B = (
            self.tensors[f"{PREFIX}{module}.lora_{leaf}.weight"].astype(mx.float32)
            for leaf in "AB"
        )
        shapes = [self.possible[target] for target in home.targets]
        sized: dict[str, Any] = {"shapes": shapes} if home.op.sized else {}
        made: tuple[mx.array, ...] = ()
        if not (home.op.each or home.op.scatter or home.op.others):
            try:
                made = home.op.function(B, **sized)
            except (ValueError, CheckpointError):
                made = ()
        same = len(made) == len(home.targets)
        for target, part in zip(home.targets, made, strict=False):
            path = target.removesuffix(".weight")
            expected = mx.zeros((1, 1))
            if path in self.adapter.layers:
                a, b = self._pair(path)
                share = self.adapter.scale(path) / self.scales[module]
                expected = share * (a.astype(mx.float32) @ b.astype(mx.float32)).T
            same = same and part.ndim == 2 and part.shape[1] == A.shape[0]
            # Widths that are zero elsewhere change no sum, but its order.
            same = same and bool(mx.allclose(part @ A, expected, 1e-4, 1e-5).item())
        if not same:
            raise self._impassable(module)

    def _put(
        self, module: str, A: mx.array, B: mx.array, scale: float, form: Form
    ) -> None:
        for leaf, matrix in (("A", A), ("B", B)):
            # An embedding's are parameters of their own, without a weight.
            ending = f"embedding_{leaf}" if form == "embedding" else f"{leaf}.weight"
            self.tensors[f"{PREFIX}{module}.lora_{ending}"] = mx.contiguous(matrix)
        self.ranks[module], self.scales[module] = A.shape[0], scale

    def _pair(self, path: str) -> tuple[mx.array, mx.array]:
        tensors = self.adapter.tensors
        return tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]

    def full(self) -> None:
        """Lay out the weights that were trained in full."""
        for name in self._here(self.adapter.full):
            home = self._home(name)
            module, _, leaf = home.tensor.rpartition(".")
            key = home.tensor
            if module not in self.ranks:
                self.whole.add(module)
            elif leaf == "bias":
                key, self.bias = f"{module}.base_layer.bias", "lora_only"
            if home.op is not None or (module in self.ranks and leaf != "bias"):
                raise self._impassable(home.tensor)
            self.tensors[PREFIX + key] = self.adapter.tensors[name]

    def _here(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are of the checkpoint's parts."""
        self.left += [name for name in names if _part(name) in self.elsewhere]
        return [name for name in names if _part(name) not in self.elsewhere]

    def _impassable(self, module: str) -> CheckpointError:
        return CheckpointError(
            f"{module!r}, which was trained, is laid out in another way in the "
            "checkpoint, or in part; PEFT cannot hold it, fuse it with 'mm1 fuse'"
        )

    def _home(self, name: str) -> Home:
        """The tensor of the checkpoint that one of ours comes from.

        Of several layouts that which the adapter came in, or else the newest, which
        stands last.

        Raises:
            CheckpointError: there is none.
        """
        found = []
        for source, rule in self.rules.items():
            op = rule if isinstance(rule, Op) else None
            targets = op.targets if op else (rule,) if isinstance(rule, str) else ()
            for target in targets:
                if (numbers := _match(target, name)) is not None:
                    filled = tuple(_fill_target(x, numbers) for x in targets)
                    found.append(Home(_fill(source, numbers), op, filled))
        if not found:
            raise CheckpointError(
                f"{name!r} comes from nothing in the checkpoint; give the one that the "
                "model was converted from by --source"
            )
        names = self.adapter.training.get("names")
        before = names.get(name) if isinstance(names, dict) else None
        known = [str(x) for x in before] if isinstance(before, list) else []
        # Of experts the last number is that which is left open.
        known += [re.sub(r"(.*)\.\d+\.", r"\1.{}.", x) for x in known]
        return next((home for home in found if home.tensor in known), found[-1])

    def config(self, origin: str) -> dict[str, Any]:
        """The content of adapter_config.json."""
        rank = Counter(self.ranks.values()).most_common(1)[0][0]
        alphas = {m: _plain(self.scales[m] * r) for m, r in self.ranks.items()}
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": origin,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.adapter.config.dropout,
            "target_modules": sorted(self.ranks),
            "rank_pattern": {m: r for m, r in self.ranks.items() if r != rank},
            "alpha_pattern": {m: x for m, x in alphas.items() if x != alpha},
            "modules_to_save": sorted(self.whole) or None,
            "use_dora": self.adapter.config.kind == "dora",
            "use_rslora": False,
            # Else PEFT would leave the head as it was.
            TYING: self.tied and self._embeds,
            "bias": self.bias,
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
        }

    @property
    def _embeds(self) -> bool:
        """Whether the embedding is changed, by matrices or as a whole."""
        changed = {f"{path}.weight" for path in self.adapter.layers}
        return EMBEDDING in changed | {*self.adapter.full}


def _plain(number: float) -> float | int:
    """The number without what rounding has left behind a whole one."""
    nearest = round(number)
    return nearest if abs(number - nearest) < 1e-9 * max(1, abs(number)) else number


def _match(target: str, name: str) -> list[int] | None:
    """The source's numbers, if the target's pattern is this name's."""
    texts = _NUMBER.split(target)
    pattern = r"(\d{1,6})".join(map(re.escape, texts[::2]))
    if (found := re.fullmatch(pattern, name)) is None:
        return None
    pairs = zip(found.groups(), texts[1::2], strict=True)
    return [int(number) + bool(less) for number, less in pairs]


def _fill(source: str, numbers: list[int]) -> str:
    """The source's name; a last ``{}`` that no number is for stays."""
    for number in numbers:
        source = source.replace("{}", str(number), 1)
    return source


def _fill_target(target: str, numbers: list[int]) -> str:
    remaining = iter(numbers)
    return _NUMBER.sub(lambda m: str(next(remaining) + int(m[1] or 0)), target)
