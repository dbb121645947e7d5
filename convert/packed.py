"""Weights that mlx-lm or mlx-vlm quantized: packed integers, which stay as they are.

https://github.com/ml-explore/mlx/blob/v0.32.0/python/mlx/nn/layers/quantized.py
https://github.com/Blaizzy/mlx-vlm/blob/9b13f52/mlx_vlm/utils.py

Beside ``X.weight``, whose integers hold several numbers each, lie ``X.scales`` and, in the
affine mode, ``X.biases``. A rule that renames the weight carries them along. The rules are
matched by the shape that the weight has unpacked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mm1_mlx.config import Packing, QuantizationConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.pieces import ALL, Readable, TensorInfo

from .plan import Plan
from .quantization import check_module, leaves_of, quantization
from .source import Source
from .step import Find, Step


@dataclass(frozen=True)
class Packed:
    """The packed modules of a source, by their names there."""

    # None where the source's config has none, and so no names.
    packing: QuantizationConfig | None
    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, source: Source) -> "Packed":
        """Those of the source; none unless its config says how they are packed.

        Raises:
            CheckpointError: a module's tensors are not complete, or not packed so.
        """
        packing, found = quantization(source), source.tensors
        names = {
            n.removesuffix(".weight") for n, x in found.items() if _is_packed(n, x)
        }
        if packing is None:
            if names:
                raise CheckpointError(
                    f"{source.name}: {min(names)!r} is packed, but config.json does not "
                    "say how; get it again, or convert the unquantized checkpoint"
                )
            return cls(None)
        names |= {n.removesuffix(".scales") for n in found if n.endswith(".scales")}
        for name in sorted(names):
            check_module(name, found, packing.way(name))
        return cls(packing, frozenset(names))

    def way(self, module: str) -> Packing:
        """How the module is packed."""
        assert self.packing is not None
        return self.packing.way(module)

    def ways(self, plan: Plan) -> dict[str, Packing]:
        """How every module is packed that the plan keeps so, by its name there."""
        return {
            target.removesuffix(".scales"): self.way(source.removesuffix(".scales"))
            for step in plan.steps
            for source, target in zip(step.sources, step.targets, strict=False)
            if target.endswith(".scales")
        }

    def stored(self, weight: str) -> list[str]:
        """The tensors that hold this weight, it alone where it is not packed."""
        module = weight.removesuffix(".weight")
        if module not in self.names:
            return [weight]
        return [module + leaf for leaf in leaves_of(self.way(module))]

    def shapes(self, found: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, a packed weight's as it is unpacked, no scales."""
        shapes = {name: info.shape for name, info in found.items()}
        for name in self.names:
            *rows, width = shapes[f"{name}.weight"]
            for leaf in leaves_of(self.way(name)):
                del shapes[f"{name}{leaf}"]
            shapes[f"{name}.weight"] = (*rows, width * 32 // self.way(name).bits)
        return shapes

    def plan(self, plan: Plan) -> Plan:
        """The plan with what lies beside packed weights.

        A weight that is a bare array here, as position embeddings are, is unpacked.

        Raises:
            CheckpointError: a step would tear a packed weight apart.
        """
        dropped = [stored for x in plan.dropped for stored in self.stored(x)]
        steps = (made for step in plan.steps for made in self._steps(step))
        return Plan(tuple(steps), tuple(sorted(dropped)))

    def _steps(self, step: Step) -> list[Step]:
        packed = [x for x in step.sources if x.removesuffix(".weight") in self.names]
        if not packed:
            return [step]
        source, target = packed[0].removesuffix(".weight"), step.targets[0]
        if not step.plain:
            raise CheckpointError(
                f"{packed[0]!r} is packed and cannot be made into {target!r}, which is "
                "laid out in another way; convert the unquantized checkpoint"
            )
        if not target.endswith(".weight"):
            return [Step((source,), (target,), step.function)]
        module = target.removesuffix(".weight")
        return [
            Step((source + leaf,), (module + leaf,), step.function, plain=True)
            for leaf in leaves_of(self.way(source))
        ]

    def unpacking(self, find: Find) -> Find:
        """``find``, which for a module's name gives its weight unpacked."""

        def unpacked(name: str) -> Readable:
            if name not in self.names:
                return find(name)
            return Unpacked(self.way(name), [find(x) for x in self.stored(name)])

        return unpacked


@dataclass(frozen=True)
class Unpacked:
    """A packed module's weight as numbers, a bare array here as position embeddings are."""

    way: Packing
    # As they are stored: the integers, the scales, and biases where there are any.
    stored: list[Readable]

    @property
    def shape(self) -> tuple[int, ...]:
        """As many numbers wide as the integers hold."""
        *rows, width = self.stored[0].shape
        return (*rows, width * 32 // self.way.bits)

    @property
    def dtype(self) -> mx.Dtype:
        """That of the scales, or what integer scales unpack to."""
        kind = self.stored[1].dtype
        return kind if mx.issubdtype(kind, mx.floating) else mx.bfloat16

    def read(self, rows: slice = ALL) -> mx.array:
        """Its values, or those of some places along the first axis."""
        weight, scales, *rest = (x.read(rows) for x in self.stored)
        options: dict[str, Any] = self.way.to_dict()
        return mx.dequantize(weight, scales, rest[0] if rest else None, **options)


def _is_packed(name: str, info: TensorInfo) -> bool:
    return name.endswith(".weight") and info.dtype == mx.uint32
