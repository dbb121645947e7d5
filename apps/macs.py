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
    from mm1_mlx.chips import CHIPS, MOE_SHARES, PREFILL_SHARE, gpu_memory
    from mm1_mlx.config import MM1Config
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.recipe import find_recipe, plan
    from mm1_mlx.resolution import high_resolution

    config = MM1Config.from_dict(values)
    if config.decoder is None:
        raise ConfigError("the model has no decoder, so it writes no tokens to predict")
    answer = usual_answer(config)
    room = sum(answer.bytes(config).values())
    sharper = high_resolution(config)
    # By resolution: the config, and a question about a picture.
    seen = {"first_token": (config, answer)}
    if sharper:
        seen["high_resolution"] = (sharper, usual_answer(sharper))
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
        weights = sum(weight_bytes(config, ways).values())
        needs[bits] = weights + room
        # Once for all chips: sizes are those of a model that is built for it.
        decoding = {n: limits.decode_work(config, ways, n) for n in (0, CONTEXT)}
        reading = {
            name: (
                weights + sum(asked.bytes(at).values()),
                limits.encode_work(at, asked.tiles, ways),
                limits.prefill_work(at, asked.positions, ways),
            )
            for name, (at, asked) in seen.items()
        }
        for chip, facts in zip(CHIPS, chips, strict=True):
            moe = config.decoder.moe is not None
            facts["bits"][bits] = {
                "fits": [x for x in chip.memory if gpu_memory(x) >= needs[bits]],
                "tokens_per_second": {
                    context: 1 / chip.seconds(*work)
                    for context, work in decoding.items()
                },
                "decode_share": (
                    MOE_SHARES.get(bits) if moe else chip.decode_share(bits)
                ),
            }
            for name, (need, *works) in reading.items():
                seconds = sum(chip.seconds(*work) for work in works)
                facts["bits"][bits] |= {
                    f"{name}_fits": [x for x in chip.memory if gpu_memory(x) >= need],
                    f"{name}_seconds": seconds,
                    f"{name}_seconds_at_share": seconds / PREFILL_SHARE,
                }
    prompts = {
        name: {"tokens": asked.positions, "tiles": asked.tiles}
        for name, (_, asked) in seen.items()
    }
    prompt = prompts.pop("first_token") | {"context": CONTEXT, "share": PREFILL_SHARE}
    return {"chips": chips, "needs": needs, "prompt": prompt | prompts}


def print_macs(facts: dict[str, Any]) -> None:
    """The table of Macs; on a narrow terminal the first token has one of its own."""
    from rich.console import Console

    rates = {
        f"{bits} bits\n{human_bytes(need)}": [
            _cell(chip["bits"][bits], sold=bool(chip["memory"]))
            for chip in facts["chips"]
        ]
        for bits, need in facts["needs"].items()
    }
    fewest = min(facts["needs"])
    times = {"first\ntoken, s": [_first_token(x, fewest) for x in facts["chips"]]}
    if high := facts["prompt"].get("high_resolution"):
        times[f"{high['tiles']} tiles,\ns"] = [
            _high_resolution(chip, fewest) for chip in facts["chips"]
        ]
    console = Console()
    whole = _table(facts, rates | times)
    unbounded = console.options.update(max_width=10**6)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        console.print(whole)
    else:
        console.print(_table(facts, rates), _table(facts, times))
    console.print(_legend(facts, fewest), style="dim", highlight=False, markup=False)


def _table(facts: dict[str, Any], columns: dict[str, list[str]]) -> Any:
    """A row for every Mac, with these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("Mac", no_wrap=True)
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for chip, *cells in zip(facts["chips"], *columns.values(), strict=True):
        star = "" if chip["memory"] else "*"
        table.add_row(f"{chip['chip']} ({chip['gpu_cores']}){star}", *cells)
    return table


def _legend(facts: dict[str, Any], fewest: int) -> str:
    """What the cells say."""
    prompt = facts["prompt"]
    tiles, high = prompt["tiles"], prompt.get("high_resolution")
    picture = f"a picture of {tiles} tile{'s' * (tiles > 1)}, " if tiles else ""
    moe = facts["config"]["decoder"].get("moe")
    peers = "mlx-lm with experts, on an M4 Max," if moe else "llama.cpp with a 7B model"
    sharper = (
        f" {high['tiles']} tiles: at high resolution, {high['tokens']} prompt tokens, at "
        "that share."
        if high
        else ""
    )
    return (
        f"Each: GB of memory it fits from; most tokens a second behind 0 and "
        f"{prompt['context']:,} positions; share of that which {peers} reached. First "
        f"token: seconds at {fewest} bits, {picture}{prompt['tokens']:,} prompt tokens, at "
        f"least / at the {prompt['share']:.0%} of the operations that others reach."
        f"{sharper} ? not known, * rests on a projection."
    )


def _first_token(chip: dict[str, Any], bits: int) -> str:
    """The least seconds to the first token, and those that others would take."""
    limit = chip["bits"][bits]
    if chip["memory"] and not limit["first_token_fits"]:
        return "no"
    least = _seconds(limit["first_token_seconds"])
    reached = _seconds(limit["first_token_seconds_at_share"])
    return f"{least}/{reached}{'*' * chip['projected']}"


def _high_resolution(chip: dict[str, Any], bits: int) -> str:
    """The seconds to the first token that others would take at high resolution."""
    limit = chip["bits"][bits]
    if chip["memory"] and not limit["high_resolution_fits"]:
        return "no"
    reached = _seconds(limit["high_resolution_seconds_at_share"])
    return f"{reached}{'*' * chip['projected']}"


def _seconds(value: float) -> str:
    if value < 0.01:
        return "<0.01"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _rate(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.1f}M"
    return f"{value:.0f}" if value < 10_000 else f"{value / 1e3:.0f}k"


def _cell(limit: dict[str, Any], *, sold: bool) -> str:
    """One Mac's limits at one precision."""
    if sold and not limit["fits"]:
        return "no"
    rates = "/".join(map(_rate, limit["tokens_per_second"].values()))
    share = limit["decode_share"]
    reached = f"{share:4.0%}" if share else "   ?"
    return f"{limit['fits'][0] if sold else '?'} {rates}{reached}"
