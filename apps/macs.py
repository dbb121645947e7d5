"""The Macs that ``mm1 inspect --chips`` shows: what bounds a model on each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .common import human_bytes

# By bits, the recipe that packs to them; 16 are not packed.
RECIPES = {4: "4bit", 8: "8bit", 16: None}


def predict(values: dict[str, Any], packed: Mapping[str, Any]) -> dict[str, Any]:
    """What bounds the model on every Mac, as JSON values.

    Args:
        values: the model's config.
        packed: how its modules are packed, by path; then it is shown as it is alone.

    Raises:
        ConfigError: it has no decoder.
    """
    from mm1_mlx import limits
    from mm1_mlx.budget import CONTEXT, usual_answer, weight_bytes
    from mm1_mlx.chips import CHIPS, MOE_SHARES, gpu_memory
    from mm1_mlx.config import MM1Config
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.recipe import find_recipe, plan

    config = MM1Config.from_dict(values)
    if config.decoder is None:
        raise ConfigError("the model has no decoder, so it writes no tokens to predict")
    answer = usual_answer(config)
    positions, tiles = answer.positions, answer.tiles
    room = sum(answer.bytes(config).values())
    chips: list[dict[str, Any]] = [
        {
            "chip": chip.name,
            "gpu_cores": chip.gpu_cores,
            "bytes_per_second": chip.bandwidth,
            "flops": chip.flops,
            "projected": chip.projected,
            "memory": list(chip.memory),
            "prefill_share": chip.prefill_share,
            "bits": {},
        }
        for chip in CHIPS
    ]
    needs = {}
    columns: dict[int, Mapping[str, Any]]
    if config.quantization and packed:
        columns = {config.quantization.bits: packed}
    else:
        columns = {
            bits: plan(find_recipe(recipe), config).packed if recipe else {}
            for bits, recipe in RECIPES.items()
        }
    for bits, ways in columns.items():
        needs[bits] = sum(weight_bytes(config, ways).values()) + room
        for chip, facts in zip(CHIPS, chips, strict=True):
            moe = config.decoder.moe is not None
            facts["bits"][bits] = {
                "fits": [x for x in chip.memory if gpu_memory(x) >= needs[bits]],
                "tokens_per_second": {
                    context: limits.decode_rate(chip, config, ways, context)
                    for context in (0, CONTEXT)
                },
                "first_token_seconds": limits.first_token_seconds(
                    chip, config, positions, tiles, ways
                ),
                "decode_share": (
                    MOE_SHARES.get(bits) if moe else chip.decode_share(bits)
                ),
            }
    prompt = {"tokens": positions, "tiles": tiles, "context": CONTEXT}
    return {"chips": chips, "needs": needs, "prompt": prompt}


def print_macs(facts: dict[str, Any]) -> None:
    """The table of Macs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("Mac")
    fewest = min(facts["needs"])
    for bits, need in facts["needs"].items():
        table.add_column(f"{bits} bits\n{human_bytes(need)}", justify="right")
    table.add_column("first\ntoken", justify="right")
    for chip in facts["chips"]:
        cells = [_cell(limit) for limit in chip["bits"].values()]
        first = _first_token(chip["bits"][fewest], projected=chip["projected"])
        table.add_row(f"{chip['chip']} ({chip['gpu_cores']})", *cells, first)
    console = Console()
    console.print(table)
    prompt = facts["prompt"]
    tiles = prompt["tiles"]
    picture = f"a picture of {tiles} tile{'s' * (tiles > 1)}, " if tiles else ""
    moe = facts["config"]["decoder"].get("moe")
    peers = "mlx-lm with experts, on an M4 Max," if moe else "llama.cpp with a 7B model"
    console.print(
        f"Each: GB of memory it fits from; most tokens a second behind 0 and "
        f"{prompt['context']:,} positions; share of that which {peers} reached. First "
        f"token: at {fewest} bits, {picture}{prompt['tokens']:,} prompt tokens, at least. "
        "? not measured, * rests on a projection.",
        style="dim",
        highlight=False,
    )


def _first_token(limit: dict[str, Any], *, projected: bool) -> str:
    """Seconds to the first token, where the model fits."""
    if not limit["fits"]:
        return "no"
    return f"{limit['first_token_seconds']:.2f} s{'*' if projected else ''}"


def _cell(limit: dict[str, Any]) -> str:
    """One Mac's limits at one precision."""
    if not limit["fits"]:
        return "no"
    rates = (
        f"{rate:.0f}" if rate < 10_000 else f"{rate / 1000:.0f}k"
        for rate in limit["tokens_per_second"].values()
    )
    share = limit["decode_share"]
    reached = f"{share:4.0%}" if share else "   ?"
    return f"{limit['fits'][0]} {'/'.join(rates)}{reached}"
