"""A conversion that was checked by name and shape: what it writes, tensor by tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import mlx.core as mx

from mm1_mlx.checkpoint import cast_overflowing, model_shapes
from mm1_mlx.config import MM1Config, Packing, QuantizationConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.partial import fingerprint, stamps
from mm1_mlx.quantize import Recipe
from mm1_mlx.quantize.pack import pack_deferred
from mm1_mlx.recipe import plan as plan_packing
from mm1_mlx.shard import Deferred

from .expected import check_tied, possible_shapes
from .initialise import SEED, initialise
from .lineage import Lineage
from .origins import PARTS, Origin, Origins
from .packed import Packed
from .plan import Plan, plan
from .shared.text import tokenizer_files
from .step import Find
from .upcycle import ROUTER, Tensors, Upcycle


@dataclass
class Job:
    """A conversion that was checked by name and shape, and not begun."""

    # What the origins make together, before it is upcycled.
    config: MM1Config
    origins: Origins
    upcycle: Upcycle | None = None
    # How weights that are not packed yet become so.
    recipe: Recipe | None = None
    # The config of what is written.
    made: MM1Config = field(init=False)
    # The parts with weights, and those without.
    sourced: dict[str, Origin] = field(init=False)
    initialised: tuple[str, ...] = field(init=False)
    plans: dict[str, tuple[Find, Plan]] = field(init=False)
    lineage: Lineage = field(init=False)
    # The modules that are packed, and how.
    packed: dict[str, Packing] = field(init=False)
    # Those of them that are rounded here.
    rounded: dict[str, Packing] = field(init=False)
    # Those that are not, because no group size divides their width.
    uneven: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.made = self.upcycle.config(self.config) if self.upcycle else self.config
        self.sourced = {
            part: origin
            for part, origin in self.origins.items()
            if isinstance(origin, Origin)
        }
        self.initialised = tuple(
            part
            for part in PARTS
            if getattr(self.config, part) and part not in self.sourced
        )
        routers = (ROUTER,) if self.upcycle else ()
        self.lineage = Lineage.of(self.sourced, (*self.initialised, *routers))
        by_name = {origin.name: origin for origin in self.sourced.values()}
        self.packed = {}
        self.plans = {name: self._plan(origin) for name, origin in by_name.items()}
        if self.upcycle:
            self.upcycle.check_packed(self.packed)
        self.rounded, self.uneven = {}, ()
        if self.recipe:
            chosen = plan_packing(self.recipe, self.made)
            ways = chosen.packed.items()
            self.rounded = {k: way for k, way in ways if k not in self.packed}
            self.uneven = chosen.uneven
        self.packed |= self.rounded
        if self.packed:
            packing = QuantizationConfig.of_modules(self.packed)
            self.made = replace(self.made, quantization=packing)

    def _plan(self, origin: Origin) -> tuple[Find, Plan]:
        """What the origin's tensors become, for the parts that it gives; and its reader."""
        parts = [part for part, other in self.sourced.items() if other is origin]
        packed = Packed.of(origin.source)
        found = packed.shapes(origin.source.tensors)
        wanted = {
            name: shape
            for name, shape in model_shapes(self.config).items()
            if name.partition(".")[0] in parts
        }
        result = plan(
            origin.format.rules(origin.source),
            found,
            wanted,
            possible_shapes(origin.config),
        )
        if "decoder" in parts:
            check_tied(origin.source, packed, result)
        result = packed.plan(result)
        self.packed |= packed.ways(result)
        return packed.unpacking(origin.source.tensor), result

    def tensors(self, dtype: mx.Dtype | None = None) -> Tensors:
        """Every tensor of the model by name, cast where there is a dtype; none is read.

        Raises:
            CheckpointError: a source's tensor is of a type that cannot be converted.
        """
        tensors: Tensors = self._dense_tensors()
        if dtype is not None:
            tensors = ((k, x.map(partial(_cast, k, dtype))) for k, x in tensors)
        if self.upcycle:
            assert self.made.decoder is not None
            tensors = self.upcycle.tensors(tensors, self.made.decoder, SEED)
        return pack_deferred(tensors, self.rounded)

    def _dense_tensors(self) -> Iterator[tuple[str, Deferred]]:
        """From their sources, or initialised."""
        for find, result in self.plans.values():
            for step in result.steps:
                yield from step.tensors(find)
        if self.initialised:
            yield from initialise(self.config, self.initialised)

    def fingerprint(self, tensors: Mapping[str, Deferred]) -> str:
        """A digest of all that decides what is written; no weight is read for it.

        A source's files are told apart by their names, sizes and times.
        """
        by_name = {origin.name: origin for origin in self.sourced.values()}
        facts = {
            "config": self.made.to_dict(),
            "lineage": self.lineage.to_dict(),
            # Sources may be alike in all but their weights: which of them gives a tensor
            # decides as much as what they are.
            "origins": [
                {
                    "files": stamps(by_name[name].source.files()),
                    "steps": [(x.sources, x.targets, x.row) for x in result.steps],
                }
                for name, (_, result) in self.plans.items()
            ],
            "tensors": {k: (x.shape, str(x.dtype)) for k, x in tensors.items()},
        }
        return fingerprint(facts)

    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer files by name, of the decoder or else of the text tower."""
        reader = self.sourced.get("decoder") or self.sourced.get("text")
        return tokenizer_files(reader.source) if reader else {}


def _cast(name: str, dtype: mx.Dtype, piece: mx.array) -> mx.array:
    """A piece of a tensor in ``dtype``.

    Raises:
        CheckpointError: a number is too large for it.
    """
    cast, overflows = cast_overflowing(dtype, piece)
    if overflows.item():
        raise CheckpointError(
            f"{name} holds numbers too large for {dtype}; pass --dtype bfloat16, or keep "
            "the type that they have"
        )
    return cast
