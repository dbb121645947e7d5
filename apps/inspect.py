"""``mm1 inspect``: what a model is, from its config alone."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, human_bytes, print_json
from .macs import predict, print_macs

# The smallest pictures that the paper's encoders take, in pixels.
PAPER_SIZE = 224
# What the weights may become: bytes of a number and the recipe that packs others.
PRECISIONS = {
    "float32": (4, None),
    "float16": (2, None),
    "8-bit": (2, "8bit"),
    "4-bit": (2, "4bit"),
}


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="model folder, hub repository or preset (default: $MM1_MODEL, "
            "else mm1-tiny)"
        ),
    ] = None,
    chips: Annotated[
        bool, typer.Option("--chips", help="predict what each Mac can do with it")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's parts, parameters, image tokens and bytes."""
    facts = describe(model)
    if chips:
        facts |= predict(facts["config"], _packed_ways(model))
    if as_json:
        print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As Text: square brackets in a path are no markup.
    table = Table(title=Text(facts["name"]), show_header=False, title_justify="left")
    for label, value in _rows(facts):
        table.add_row(label, Text(value))
    Console().print(table)
    if chips:
        print_macs(facts)


def describe(model: str | None) -> dict[str, Any]:
    """Everything the command shows, as JSON values."""
    from mm1_mlx.budget import idle
    from mm1_mlx.checkpoint import load_config, read_manifest
    from mm1_mlx.models import MM1
    from mm1_mlx.presets import PRESETS

    source: Any
    # The paper's own spelling is MM1-3B-MoE.
    preset = (model or "").lower()
    if preset in PRESETS:
        config, source, name = PRESETS[preset], {"preset": preset}, preset
        files = {}
    else:
        path = _find(model)
        config, manifest = load_config(path), read_manifest(path)
        source, files, name = manifest.get("source"), manifest["files"], str(path)
    sizes: dict[str, int] = {}
    inactive = 0
    # Built lazily: no weight is allocated.
    for key, tensor in MM1(config).tensors().items():
        part = key.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + tensor.size
        inactive += idle(key, tensor.size, config)
    total = sum(sizes.values())
    return {
        "name": name,
        "config": config.to_dict(),
        "parameters": sizes | {"total": total, "active": total - inactive},
        "image_tokens": config.num_image_tokens if config.connector else None,
        "modes": _modes(config),
        "context": config.decoder.max_position_embeddings if config.decoder else None,
        "bytes": _bytes(config, files),
        "source": source,
    }


def _bytes(config: Any, files: dict[str, Any]) -> dict[str, int]:
    """Bytes of the weights by precision; of a packed model, as its files hold them."""
    from mm1_mlx.budget import weight_bytes
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.recipe import find_recipe, plan

    if config.quantization:
        weights = (x for name, x in files.items() if name.endswith(".safetensors"))
        return {f"{config.quantization.bits}-bit": sum(x["bytes"] for x in weights)}
    sizes = {}
    for name, (itemsize, recipe) in PRECISIONS.items():
        # Not every model has what a recipe packs.
        with suppress(ConfigError):
            ways = plan(find_recipe(recipe), config).packed if recipe else {}
            sizes[name] = sum(weight_bytes(config, ways, itemsize).values())
    return sizes


def _packed_ways(model: str | None) -> dict[str, Any]:
    """How the modules of a model are packed, where its weights are here."""
    from mm1_mlx.checkpoint import load_config, packed_on_disk
    from mm1_mlx.presets import PRESETS

    if (model or "").lower() in PRESETS:
        return {}
    path = _find(model)
    here = any(path.glob("*.safetensors"))
    return packed_on_disk(path, load_config(path)) if here else {}


def _find(model: str | None) -> Path:
    """The model's folder; of a hub repository its small files are enough."""
    from mm1_mlx.errors import CheckpointError
    from mm1_mlx.folders import user_path
    from mm1_mlx.presets import PRESETS

    from .cached import find, repository_of

    try:
        return find(model, weights=False)
    except CheckpointError as error:
        if repository_of(model) or not model or user_path(model).exists():
            raise
        raise CheckpointError(f"{error}; presets: {', '.join(PRESETS)}") from None


def _modes(config: Any) -> dict[str, int]:
    """Most image tokens of a picture, by resolution mode; the model's own comes first."""
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.layout import most_picture_tokens
    from mm1_mlx.resolution import PAPER_MODES, name_mode, parse_mode, with_resolution

    if not config.sees:
        return {}
    size = config.vision.image_size
    modes = {name_mode(config.image): most_picture_tokens(config)}
    # The paper's sizes are for its encoders; any encoder's tiles may be several.
    fits = all(
        parse_mode(mode, config.image).size % config.vision.patch_size == 0
        for mode in PAPER_MODES
    )
    known = PAPER_MODES if fits and size >= PAPER_SIZE else ()
    for mode in (*known, str(size), f"2x{size}", f"4-9x{size}"):
        # Not every encoder's pictures can be cut into tiles.
        with suppress(ConfigError):
            changed = with_resolution(config, mode)
            modes.setdefault(mode, most_picture_tokens(changed))
    return modes


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    config, counts = facts["config"], facts["parameters"]
    rows = [
        (part, _part(part, config[part], counts[part]))
        for part in counts
        if part in config
    ]
    total = f"{counts['total']:,}"
    if counts["active"] != counts["total"]:
        total += f", {counts['active']:,} active per token"
    rows.append(("parameters", total))
    if facts["image_tokens"]:
        image = config["image"]
        how = f", {image['size']} px, {image['resize']}" if image else ""
        rows.append(("image tokens", f"{facts['image_tokens']} per tile{how}"))
    if facts["modes"]:
        own, *others = (f"{mode}: {n:,}" for mode, n in facts["modes"].items())
        rows.append(("by resolution", ", ".join([f"{own} (its own)", *others])))
    if facts["context"]:
        rows.append(("context", f"{facts['context']:,} tokens"))
    sizes = (f"{human_bytes(n)} {name}" for name, n in facts["bytes"].items())
    rows.append(("weights", ", ".join(sizes)))
    source = facts["source"]
    untrained = source.get("needs_training") if isinstance(source, dict) else None
    if untrained:
        rows.append(("needs training", ", ".join(map(str, untrained))))
    return rows


def _part(part: str, section: dict[str, Any], count: int) -> str:
    kind = section.get("kind") or _kind(part, section)
    layers = section.get("num_hidden_layers", section.get("depth"))
    width = section.get("hidden_size", section.get("input_size"))
    shape = f"{layers} x {width}, " if layers else ""
    return f"{kind.replace('_', '-')}, {shape}{count:,} parameters"


def _kind(part: str, section: dict[str, Any]) -> str:
    """What a part is that has no alternatives by name."""
    moe = section.get("moe")
    if part == "vision":
        experts = f" with {moe['num_experts']} experts" if moe else ""
        return f"ViT/{section['patch_size']} at {section['image_size']} px{experts}"
    if part == "decoder" and moe:
        return (
            f"{moe['num_experts']} experts, top {moe['experts_per_token']}, in every"
            f"{_ordinal(moe['every'])} layer"
        )
    return {"decoder": "dense", "text": "CLIP text tower"}.get(part, "region sampler")


def _ordinal(number: int) -> str:
    return {1: "", 2: " 2nd", 3: " 3rd"}.get(number, f" {number}th")
