"""Adapters put to use: several at once, each with a scale, in the model's own weights.

Where a layer is not packed the products of the matrices are added to its weight as it is
read, in float32 and rounded once, so that an answer costs what it costs without them.
A packed layer would lose them in its rounding: there the matrices stay beside it, those
of several adapters as one pair, which is as wide as all of them together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mm1_mlx.adapters.attach import Form, form_of, weight_shape, wrap
from mm1_mlx.adapters.config import MAX_SCALE
from mm1_mlx.adapters.folder import Adapter, Base, base_of, load
from mm1_mlx.checkpoint import Precision, load_model
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.folders import user_path
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import named_leaves
from mm1_mlx.pieces import ALL

# Without a handler Python prints a warning's text on stderr, and nothing else.
logger = logging.getLogger("mm1_mlx")
# A folder or hub repository, alone or with a scale.
Named = str | Path | tuple[str | Path, float]


def parse(text: str) -> tuple[str, float]:
    """A name and its scale from ``PATH[:SCALE]``; a folder of that whole name wins.

    Raises:
        ConfigError: the scale is not one.
    """
    name, colon, number = text.rpartition(":")
    if not colon or not name or user_path(text).is_dir():
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        return text, 1.0
    return name, _scale(name, scale)


def _scale(name: object, scale: float) -> float:
    if not 0 < abs(scale) <= MAX_SCALE:
        raise ConfigError(
            f"adapter {str(name)!r}: scale {scale} is 0 or beyond {MAX_SCALE:g}"
        )
    return float(scale)


@dataclass(frozen=True)
class Adapters:
    """Adapters of one model, and the share of each one's change that is taken."""

    given: tuple[tuple[Adapter, float], ...]

    @classmethod
    def load(cls, names: Sequence[Named]) -> Self:
        """Those of these folders or repositories.

        Raises:
            CheckpointError: one cannot be had, or two cannot be taken together.
            ConfigError: one does not describe itself, or a scale is none.
        """
        pairs = [x if isinstance(x, tuple) else (x, 1.0) for x in names]
        return cls(tuple((load(name), _scale(name, x)) for name, x in pairs))

    def __post_init__(self) -> None:
        seen: dict[str, Adapter] = {}
        for adapter, _ in self.given:
            if first := seen.get(adapter.digest):
                # Its matrices would count twice, its full weights once.
                raise CheckpointError(
                    f"{first.name} and {adapter.name} are the same adapter; name it once, "
                    f"with the scale that you want, as {first.name}:2"
                )
            seen[adapter.digest] = adapter
        for adapter, scale in self.given:
            if adapter.config.kind == "dora" and (scale != 1 or len(self.given) > 1):
                raise CheckpointError(
                    f"{adapter.name} is a DoRA adapter, which says how long the rows of "
                    "the weights are and so stands alone, at scale 1; fuse it first, "
                    "and take the others on the fused model"
                )

    @property
    def identity(self) -> list[tuple[str, float]]:
        """What tells their effect apart from that of others."""
        return [(adapter.digest, scale) for adapter, scale in self.given]

    def resolution(self, asked: str | None = None) -> str | None:
        """The mode for pictures: the one asked for, else the one that they learned from.

        None for the model's own. Says, through ``logging``, who learned from another.

        Raises:
            ConfigError: nothing is asked, and two learned from different ones.
        """
        learned = {a.resolution: a.name for a, _ in self.given if a.resolution}
        if asked is None and len(learned) > 1:
            said = " and ".join(f"{name} at {mode}" for mode, name in learned.items())
            raise ConfigError(
                f"the adapters were trained at different resolutions, {said}; take one "
                "of them, or say by --resolution at which to ask"
            )
        for mode, name in learned.items():
            if asked not in (None, mode):
                logger.warning(
                    f"adapter {name!r} was trained at resolution {mode}, not {asked}"
                )
        return asked or next(iter(learned), None)

    @cached_property
    def layers(self) -> frozenset[str]:
        """The paths of the layers that they change by low-rank matrices."""
        return frozenset(path for a, _ in self.given for path in a.layers)

    @cached_property
    def full(self) -> frozenset[str]:
        """The names of the weights that they change in full."""
        return frozenset(name for a, _ in self.given for name in a.full)

    @cached_property
    def _held(self) -> dict[str, list[tuple[mx.array, float]]]:
        """By name, what weights that were trained in full became, and the scale of each."""
        held: dict[str, list[tuple[mx.array, float]]] = {}
        for adapter, scale in self.given:
            for name in adapter.full:
                tensor, others = adapter.tensors[name], held.setdefault(name, [])
                if not any(
                    x == scale and mx.array_equal(tensor, other) for other, x in others
                ):
                    others.append((tensor, scale))
        return held

    def doubts(self, base: Base) -> list[str]:
        """A sentence for every adapter that was trained on another model."""
        return [
            f"adapter {adapter.name!r} was trained on {adapter.base.name!r} "
            f"({adapter.base.digest[:12]}), not on {base.name!r} ({base.digest[:12]}): "
            "its shapes fit, what it has learned may not"
            for adapter, _ in self.given
            if adapter.base.digest != base.digest
        ]

    def check(self, model: MM1) -> dict[str, Form]:
        """How the layers' matrices are laid out, by path.

        Args:
            model: of the config that they are for; its weights are not read.

        Raises:
            CheckpointError: the model has not such a layer or weight, or one of another
                shape; or a weight that was trained in full is packed.
        """
        layers, shapes = dict(named_leaves(model)), model.tensors()
        for adapter, _ in self.given:
            for path in adapter.layers:
                _check_layer(adapter, path, layers.get(path))
            for name in adapter.full:
                module = layers.get(name.rpartition(".")[0])
                if module is not None and "scales" in module:
                    raise CheckpointError(
                        f"{adapter.name}: {name!r:.120} was trained in full, but is "
                        "packed here; take the unpacked model, or quantize the fused one"
                    )
                expected = shapes.get(name)
                if expected is None:
                    raise _unfit(adapter, name, "the model has no such weight")
                if expected.shape != adapter.tensors[name].shape:
                    shape = list(adapter.tensors[name].shape)
                    raise _unfit(
                        adapter, name, f"shape {shape}, not {list(expected.shape)}"
                    )
        return {path: cast(Form, form_of(layers[path])) for path in self.layers}

    def changed(
        self, model: MM1, weights: Mapping[str, mx.array]
    ) -> dict[str, mx.array]:
        """The weights that are not packed and that they change, in float32, lazily.

        Raises:
            CheckpointError: they do not fit the model.
        """
        forms = self.check(model)
        changed = self.whole(model, weights)
        for path in self.layers:
            name = f"{path}.weight"
            if f"{path}.scales" not in weights:
                # One that was trained in full besides has its matrices on top.
                weight = changed.get(name, weights[name])
                changed[name] = self.fused(path, forms[path], weight)
        return changed

    def whole(self, model: MM1, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The weights that they change in full alone, in float32, lazily.

        Raises:
            CheckpointError: they do not fit the model.
        """
        self.check(model)
        return {name: self.replaced(name, weights[name]) for name in self.full}

    def replaced(self, name: str, weight: mx.array, rows: slice = ALL) -> mx.array:
        """A weight that was trained in full, or these rows of it, in float32.

        Where several adapters hold it, what each changed is added, as the products of
        matrices are; what they hold alike, at one scale, counts once.

        Source: arXiv 2212.04089, section 2.

        Args:
            name: the weight's.
            weight: what it was before, of these rows.
            rows: places along the first axis.
        """
        held = self._held[name]
        if len(held) == 1 and held[0][1] == 1:
            return _part(held[0][0], rows)
        before = changed = weight.astype(mx.float32)
        for tensor, scale in held:
            changed = changed + scale * (_part(tensor, rows) - before)
        return changed

    def fused(
        self, path: str, form: Form, weight: mx.array, rows: slice = ALL
    ) -> mx.array:
        """A layer's weight and the products of its matrices, in float32.

        Args:
            path: the layer's.
            form: how its matrices are laid out.
            weight: the layer's, of these rows.
            rows: places along the first axis: outputs, experts or embeddings.
        """
        weight = weight.astype(mx.float32)
        for adapter, scale in self.given:
            if path not in adapter.layers:
                continue
            a, b = _pair(adapter, path)
            # Of the matrices, not of their product: that is as large as the weight.
            b = (scale * adapter.scale(path)) * b
            weight = weight + PRODUCTS[form](a, b, rows)
            if adapter.config.kind == "dora":
                lengths = mx.linalg.norm(weight, axis=1)
                m = adapter.tensors[f"{path}.m"].astype(mx.float32)[rows]
                weight = (m / lengths)[:, None] * weight
        return weight

    def packed(self, model: MM1) -> list[str]:
        """The paths of those layers that are packed in a model."""
        layers = dict(named_leaves(model))
        return [path for path in sorted(self.layers) if "scales" in layers[path]]

    def attach(self, model: MM1, paths: Iterable[str]) -> None:
        """Put the matrices of these layers beside a model's.

        In the precision that the model computes in; they are not for training.
        """
        layers = dict(named_leaves(model))
        made = [(path, self._beside(path, layers[path])) for path in paths]
        if not made:
            return
        model.update_modules(cast(Any, tree_unflatten(made)))
        model.eval()
        dtype = model.decoder.norm.weight.dtype if "decoder" in model else mx.float32
        for _, layer in made:
            for leaf in ("lora_a", "lora_b"):
                layer[leaf] = layer[leaf].astype(dtype)
            mx.eval(layer.parameters())

    def _beside(self, path: str, layer: nn.Module) -> Any:
        """A layer with the matrices of all adapters as one pair."""
        pairs = []
        for adapter, scale in self.given:
            if path in adapter.layers:
                a, b = _pair(adapter, path)
                pairs.append((a, (scale * adapter.scale(path)) * b))
        form = form_of(layer)
        assert form is not None
        # The inner axis of each matrix: a's is 1 in every form.
        inner = {"linear": 0, "experts": 2, "embedding": 0}[form]
        a = mx.concatenate([a for a, _ in pairs], axis=1)
        b = mx.concatenate([b for _, b in pairs], axis=inner)
        kind = self.given[0][0].config.kind
        made = cast(Any, wrap(layer, kind, a.shape[1], 1.0))
        made.lora_a, made.lora_b = a, b
        if kind == "dora":
            made.m = self.given[0][0].tensors[f"{path}.m"].astype(mx.float32)
        return made


def _part(tensor: mx.array, rows: slice) -> mx.array:
    """Rows of a tensor in float32, all of one that has none."""
    tensor = tensor.astype(mx.float32)
    return tensor[rows] if tensor.ndim else tensor


def load_adapted(
    path: Path,
    adapters: Adapters,
    dtype: Precision = None,
    group: mx.distributed.Group | None = None,
    *,
    beside: bool = False,
) -> MM1:
    """The model of a folder, changed by adapters; arguments as for ``load_model``.

    Says, through ``logging``, which of them was trained on another model, but for
    ``beside``: then no weight is changed, and the matrices stay beside all of them, to
    measure what a change costs.

    Raises:
        CheckpointError: the model or an adapter is damaged, or they do not fit together.
        ConfigError: a packed model with adapters is to be shared by processes.
    """
    if not adapters.given:
        return load_model(path, dtype, group=group)
    changed = adapters.whole if beside else adapters.changed
    model = load_model(path, dtype, group=group, changed=changed)
    apart = sorted(adapters.layers) if beside else adapters.packed(model)
    if apart and group is not None and group.size() > 1:
        raise ConfigError(
            "processes cannot share a packed model that has adapters; fuse them first, "
            "with 'mm1 fuse'"
        )
    adapters.attach(model, apart)
    if beside:
        return model
    for doubt in adapters.doubts(base_of(path)):
        logger.warning(doubt)
    return model


# Some rows of the change that two matrices are.
PRODUCTS: dict[Form, Any] = {
    "linear": lambda a, b, rows: (a @ b[:, rows]).T,
    "experts": lambda a, b, rows: b[rows] @ a[rows],
    "embedding": lambda a, b, rows: a[rows] @ b,
}


def _pair(adapter: Adapter, path: str) -> tuple[mx.array, mx.array]:
    return (
        adapter.tensors[f"{path}.lora_a"].astype(mx.float32),
        adapter.tensors[f"{path}.lora_b"].astype(mx.float32),
    )


def _check_layer(adapter: Adapter, path: str, layer: nn.Module | None) -> None:
    """Pass only if the layer can have these matrices."""
    form = form_of(layer) if layer is not None else None
    if layer is None or form is None:
        raise _unfit(adapter, path, "the model has no such layer")
    r, (*rest, N, D) = adapter.rank(path), weight_shape(layer)
    shapes: dict[Form, dict[str, tuple[int, ...]]] = {
        "linear": {"lora_a": (D, r), "lora_b": (r, N)},
        "experts": {"lora_a": (*rest, r, D), "lora_b": (*rest, N, r)},
        "embedding": {"lora_a": (N, r), "lora_b": (r, D)},
    }
    expected = shapes[form]
    if adapter.config.kind == "dora":
        if form != "linear":
            raise _unfit(adapter, path, f"DoRA is for linear layers, not for {form}")
        expected["m"] = (N,)
    elif f"{path}.m" in adapter.tensors:
        raise _unfit(adapter, path, "it has DoRA's lengths, but is said to be LoRA")
    for leaf, shape in expected.items():
        tensor = adapter.tensors.get(f"{path}.{leaf}")
        if tensor is None or tensor.shape != shape:
            have = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise _unfit(adapter, f"{path}.{leaf}", f"{have}, not {list(shape)}")


def _unfit(adapter: Adapter, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter.name} does not fit the model: {name!r:.120}: {why}; it was trained on "
        f"{adapter.base.name!r:.120}"
    )
