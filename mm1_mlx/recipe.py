"""Which module of a model is packed, and how: a way for each of its components.

``4bit`` packs the decoder's layers with 4 bits in groups of 64 and its embeddings and
head with 6; image encoder and connector, which are small and lose most, stay as they are,
and so do the routers. The mixed recipes are mlx-lm's: layers that lose more get more bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mm1_mlx.config import MM1Config, Packing
from mm1_mlx.config.quantization import MODES
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import named_leaves

Component = Literal[
    "vision", "connector", "attention", "mlp", "experts", "router", "head"
]
COMPONENTS: tuple[Component, ...] = (
    *("vision", "connector", "attention", "mlp", "experts", "router", "head"),
)
# What --bits, --group-size and --mode are about.
LAYERS: tuple[Component, ...] = ("attention", "mlp", "experts")
KEEP = "keep"
# The recipe of who names none.
DEFAULT = "4bit"


@dataclass(frozen=True)
class Recipe:
    """How every component is packed; one that has no way stays as it is.

    Attributes:
        ways: by component.
        rules: the mixed recipe of mlx-lm that says which layers of a component have more
            bits, and how many.
        name: what it is called.
    """

    ways: Mapping[Component, Packing]
    rules: Mapping[Component, str] = field(default_factory=dict)
    name: str = ""

    def with_ways(self, changes: Mapping[Component, Packing | None]) -> Recipe:
        """The recipe with other ways for some components, None to keep one."""
        ways = {**self.ways, **changes}
        return Recipe(
            {component: way for component, way in ways.items() if way},
            {c: rule for c, rule in self.rules.items() if c not in changes},
            self.name,
        )


def _affine(bits: int) -> Packing:
    return Packing(group_size=64, bits=bits)


def _layers(way: Packing, head: Packing, rule: str | None = None) -> Recipe:
    ways: dict[Component, Packing] = dict.fromkeys(LAYERS, way)
    rules: dict[Component, str] = dict.fromkeys(LAYERS, rule) if rule else {}
    return Recipe(ways | {"head": head}, rules)


RECIPES = {
    "4bit": _layers(_affine(4), _affine(6)),
    "8bit": _layers(_affine(8), _affine(8)),
    "mixed_2_6": _layers(_affine(2), _affine(6), "mixed_2_6"),
    "mixed_3_4": _layers(_affine(3), _affine(4), "mixed_3_4"),
    "mixed_3_6": _layers(_affine(3), _affine(6), "mixed_3_6"),
    "mixed_4_6": _layers(_affine(4), _affine(6), "mixed_4_6"),
    "mxfp4": _layers(Packing(group_size=32, bits=4, mode="mxfp4"), _affine(8)),
    "mxfp8": _layers(Packing(group_size=32, bits=8, mode="mxfp8"), _affine(8)),
    "nvfp4": _layers(Packing(group_size=16, bits=4, mode="nvfp4"), _affine(8)),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is not one of {list(RECIPES)}")
    return replace(RECIPES[name], name=name)


def parse_way(text: str, where: str) -> Packing | None:
    """``keep``, ``4`` or ``4/32`` (bits, group size), or a mode such as ``mxfp4``.

    Raises:
        ConfigError: it is none of them; ``where`` says what it was for.
    """
    if text == KEEP:
        return None
    if text in MODES and text != "affine":
        return way_of(where, mode=text)
    found = re.fullmatch(r"(\d{1,9})(?:/(\d{1,9}))?", text, re.ASCII)
    if not found:
        modes = [mode for mode in MODES if mode != "affine"]
        raise ConfigError(
            f"{where} {text!r} is not {KEEP!r}, bits such as '4' or '4/32', or one of "
            f"{modes}"
        )
    return way_of(where, int(found[1]), int(found[2] or 64))


def way_of(
    where: str, bits: int | None = None, group: int | None = None, mode: str = "affine"
) -> Packing:
    """The way of so many bits in groups of ``group``, by default as the mode has them.

    Raises:
        ConfigError: mlx has no such way; ``where`` says what it was for.
    """
    if mode not in MODES:
        raise ConfigError(f"{where}: mode {mode!r} is not one of {list(MODES)}")
    groups, widths = MODES[mode]
    usual = (64, 4) if mode == "affine" else (groups[0], widths[0])
    group, bits = (
        given if given is not None else default
        for given, default in zip((group, bits), usual, strict=True)
    )
    try:
        return Packing.from_dict({"group_size": group, "bits": bits, "mode": mode})
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('Packing.')}") from None


def component_of(path: str) -> Component:
    """The component that the module of this path belongs to."""
    part, _, rest = path.partition(".")
    if rest.endswith((".mlp.gate", ".mlp.router")):
        return "router"
    if part in ("vision", "text"):
        return "vision"
    if part != "decoder":
        return "connector"
    if not rest.startswith("layers."):
        return "head"
    if ".switch_mlp." in rest:
        return "experts"
    return "mlp" if ".mlp." in rest else "attention"


@dataclass(frozen=True)
class Plan:
    """What becomes of the modules of a model.

    Attributes:
        packed: how, by path.
        uneven: paths that stay as they are because no group size divides their width.
    """

    packed: dict[str, Packing]
    uneven: tuple[str, ...]


def plan(recipe: Recipe, config: MM1Config) -> Plan:
    """What the recipe makes of a model; nothing is computed.

    Where a group does not divide a module's width, a smaller one of the same mode does
    its work, or else the module stays as it is.

    Raises:
        ConfigError: the recipe packs nothing of the model.
    """
    model = MM1(replace(config, quantization=None))
    rules: dict[str, Any] = {}
    packed: dict[str, Packing] = {}
    uneven: list[str] = []
    for path, module in named_leaves(model):
        component = component_of(path)
        way = recipe.ways.get(component)
        if way is None or not hasattr(module, "to_quantized"):
            continue
        if name := recipe.rules.get(component):
            rule = rules[name] = rules.get(name) or _mixed(name, model)
            way = Packing.from_dict(rule(path, module))
        fitting = fit(way, module.weight.shape[-1])
        if fitting is None:
            uneven.append(path)
        else:
            packed[path] = fitting
    if not packed:
        raise ConfigError(
            f"the model has nothing that recipe {recipe.name!r} packs; name a component "
            "and its bits for 'mm1 quantize', e.g. --vision 8"
        )
    return Plan(packed, tuple(uneven))


def _mixed(name: str, model: MM1) -> Any:
    """mlx-lm's rule of this name: a module's way from its path and itself."""
    # Here: it takes a second, and whoever loads a model asks for plans.
    from mlx_lm.convert import mixed_quant_predicate_builder

    return mixed_quant_predicate_builder(name, model)


def fit(way: Packing, width: int) -> Packing | None:
    """The way with the largest group, its own or smaller, that divides a width."""
    for group in sorted(MODES[way.mode][0], reverse=True):
        if group <= way.group_size and width % group == 0:
            return replace(way, group_size=group)
    return None
