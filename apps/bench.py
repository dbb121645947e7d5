"""``mm1 bench``: how fast a model is here, and how near to what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Annotated, Any

import typer

from .common import AsJson, Model, Resolution, Yes, human_bytes, note, print_json
from .macs import RECIPES
from .packing import RecipeName

DTYPES = ("float32", "float16", "bfloat16")


def bench(
    model: Model = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="random weights of this size instead, e.g. mm1-3b: no download",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="of the preset's weights: 4, 8 or 16 (default: 4)", show_default=False
        ),
    ] = None,
    recipe: RecipeName = None,
    prompt: Annotated[
        int, typer.Option("-p", "--n-prompt", help="tokens of the prompt", min=0)
    ] = 512,
    generate: Annotated[
        int, typer.Option("-n", "--n-gen", help="tokens that are decoded", min=0)
    ] = 128,
    depth: Annotated[
        int,
        typer.Option("-d", "--n-depth", help="decode behind so many, too", min=0),
    ] = 0,
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", help="runs of each", min=1)
    ] = 5,
    images: Annotated[
        int | None,
        typer.Option(
            help="pictures at once, 0 for none (default: 1)", min=0, show_default=False
        ),
    ] = None,
    resolution: Resolution = None,
    kv_bits: Annotated[
        int | None,
        typer.Option(
            help="pack keys and values to 8 or 4 bits, from the first on",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16 (default: what the device is quick at)",
            show_default=False,
        ),
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="only which attention runs, and why")
    ] = False,
    as_json: AsJson = False,
    as_markdown: Annotated[
        bool, typer.Option("--md", help="print Markdown tables")
    ] = False,
    yes: Yes = False,
) -> None:
    """Measure encoding, prompts, decoding and the first token, beside their limits."""
    _check_options(model, preset, bits, recipe, kv_bits, dtype, as_json, as_markdown)
    from mm1_mlx.blas import preload_blas

    blas = preload_blas()
    if kernels:
        show_kernels(dtype, as_json, as_markdown)
        return
    import mlx.core as mx

    from mm1_mlx import bench as benchmark
    from mm1_mlx.checkpoint import device_dtypes

    def plan_for(config: Any) -> Any:
        plan = benchmark.Plan(
            prompt=prompt,
            generate=generate,
            depth=depth,
            images=int(config.sees) if images is None else images,
            high_resolution=resolution is None,
            repetitions=repetitions,
            kv_bits=kv_bits,
        )
        plan.check(config)
        return plan

    kind = getattr(mx, dtype) if dtype else None
    # What is wrong is told before the minutes that weights and measuring may take.
    if preset is not None:
        config = _find_preset(preset, resolution)
        plan = plan_for(config)
        note(f"random weights of {preset}")
        way = recipe or RECIPES[bits or 4]
        runtime = _random_weights(preset, config, way, kind or device_dtypes()[0])
        seconds = None
    else:
        from mm1_mlx.runtime import config_of, find_model, load

        from .cached import resolve

        path = find_model(resolve(model, yes))
        plan = plan_for(config_of(path, resolution))
        start = time.perf_counter()
        runtime = load(path, kind, resolution=resolution)
        seconds = time.perf_counter() - start
    with closing(runtime):
        benchmark.check(runtime, plan)
        machine = benchmark.describe(blas)
        loaded = mx.get_peak_memory()
        note("speed of memory and products")
        chips = {"measured": benchmark.measure_speed(kind or device_dtypes()[0])}
        chip = benchmark.nominal(machine["chip"], machine["gpu_cores"])
        chips |= {"nominal": chip} if chip else {}
        # Not the model's.
        mx.reset_peak_memory()
        measuring = benchmark.measure(runtime, plan, chips, note)
        rows = [row.to_dict() for row in measuring]
        facts = {
            "model": _describe(runtime, preset),
            "kv": _describe_kv(runtime, plan),
            "rows": rows,
            "load_seconds": seconds,
            "peak_bytes": max(loaded, mx.get_peak_memory()),
            "speed": {
                name: {"bytes_per_second": chip.bandwidth, "flops": chip.flops}
                for name, chip in chips.items()
            },
            "repetitions": repetitions,
            "machine": machine,
        }
    if as_json:
        print_json(facts)
    elif as_markdown:
        _print_markdown(facts)
    else:
        _print_table(facts)


def _check_options(
    model: str | None,
    preset: str | None,
    bits: int | None,
    recipe: str | None,
    kv_bits: int | None,
    dtype: str | None,
    as_json: bool,
    as_markdown: bool,
) -> None:
    """Pass only if the options make sense together."""
    from mm1_mlx.answer import KV_BITS

    for wrong, message in (
        (model and preset, "--model and --preset both name a model; give one"),
        (bits and recipe, "--bits and --recipe both say how to pack; give one"),
        ((bits or recipe) and not preset,
         "--bits and --recipe are a --preset's; other models are as 'mm1 quantize' "
         "made them"),
        (bits is not None and bits not in RECIPES,
         f"--bits is {bits}, expected one of {list(RECIPES)}"),
        (kv_bits is not None and kv_bits not in KV_BITS,
         f"--kv-bits is {kv_bits}, expected one of {KV_BITS}"),
        (dtype and dtype not in DTYPES,
         f"--dtype is {dtype!r}, expected one of {list(DTYPES)}"),
        (as_json and as_markdown, "--json and --md are two forms; give one"),
    ):  # fmt: skip
        if wrong:
            raise typer.BadParameter(message)


def _find_preset(name: str, resolution: str | None) -> Any:
    """The preset's config.

    Raises:
        ConfigError: there is none of the name, or it has not the resolution.
    """
    from mm1_mlx.errors import ConfigError
    from mm1_mlx.presets import PRESETS
    from mm1_mlx.resolution import with_resolution

    # The paper's own spelling is MM1-3B.
    config = PRESETS.get(name.lower())
    if config is None:
        raise ConfigError(f"preset {name!r} is not one of {list(PRESETS)}")
    return with_resolution(config, resolution) if resolution else config


def _random_weights(preset: str, config: Any, recipe: str | None, dtype: Any) -> Any:
    """The runtime of a preset."""
    from mm1_mlx.bench import open_synthetic
    from mm1_mlx.recipe import find_recipe, plan

    packed = plan(find_recipe(recipe), config).packed if recipe else {}
    return open_synthetic(preset, config, packed, dtype)


def _describe(runtime: Any, preset: str | None) -> dict[str, Any]:
    """The model, as JSON values."""
    from mm1_mlx.models import MM1
    from mm1_mlx.resolution import name_mode
    from mm1_mlx.runtime import TINY

    config = runtime.config
    plain = MM1(replace(config, quantization=None)).tensors().values()
    parameters = sum(x.size for x in plain)
    size = sum(x.nbytes for x in runtime.model.tensors().values())
    dtype = str(runtime.model.decoder.norm.weight.dtype)
    return {
        # The path is the machine's, not the model's.
        "name": preset or ("mm1-tiny" if runtime.path == TINY else runtime.path.name),
        "random_weights": preset is not None,
        "parameters": parameters,
        "bytes": size,
        "bits": round(size * 8 / parameters, 2),
        "dtype": dtype.removeprefix("mlx.core."),
        "resolution": name_mode(config.image) if config.sees else None,
    }


def _describe_kv(runtime: Any, plan: Any) -> dict[str, int | None]:
    """How keys and values are held, as JSON values; without groups they are not packed."""
    from mm1_mlx.answer import Settings

    kv = runtime.engine.precision(Settings(**plan.options))
    if kv.bits is None:
        size = runtime.model.decoder.norm.weight.dtype.size
        return {"bits": 8 * size, "group_size": None}
    return {"bits": kv.bits, "group_size": kv.group_size}


def show_kernels(dtype: str | None, as_json: bool, as_markdown: bool) -> None:
    """Which attention runs here, by kind of keys."""
    import mlx.core as mx

    from mm1_mlx.checkpoint import device_dtypes
    from mm1_mlx.kernels import kernel_report

    rows = kernel_report(getattr(mx, dtype) if dtype else device_dtypes()[0])
    facts = [
        {
            "kernel": row.kernel,
            "device": row.device,
            "check": row.check,
            "seconds": row.seconds,
            "other_seconds": row.other_seconds,
            "chosen": row.chosen,
            "why": row.why,
        }
        for row in rows
    ]
    if as_json:
        print_json(facts)
        return
    names = ("kernel", "time", "else", "runs")
    cells = [
        (row.kernel, _micro(row.seconds), _micro(row.other_seconds),
         "kernel" if row.chosen else "plain")
        for row in rows
    ]  # fmt: skip
    if as_markdown:
        whole = [
            (*cell, row.device, row.check, row.why)
            for cell, row in zip(cells, rows, strict=True)
        ]
        _print_markdown_table((*names, "device", "check", "why"), whole, "lrrllll")
        return
    _print_rich_table(names, cells, "lrrl")
    # Below the table, whose columns leave reasons no room on a narrow terminal.
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(f"{row.why} (check: {row.check})", []).append(row.kernel)
    print(f"Device: {rows[0].device}")
    for reason, kernels in reasons.items():
        who = "all" if len(kernels) == len(rows) else "; ".join(kernels)
        print(f"{who}: {reason}")


def _micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.0f} us"


def _print_table(facts: dict[str, Any]) -> None:
    """For people: the rows below the model, what the machine is below them."""
    from rich.console import Console

    console = Console()
    console.print(_title(facts), highlight=False, markup=False)
    _print_rich_table(*_cells(facts))
    for line in _footer(facts):
        console.print(line, style="dim", highlight=False, markup=False)


def _print_rich_table(
    names: tuple[str, ...], rows: Sequence[tuple[str, ...]], sides: str
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name, side in zip(names, sides, strict=True):
        # A number cut in two is another one.
        table.add_column(name, justify="right" if side == "r" else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _print_markdown(facts: dict[str, Any]) -> None:
    """As llama-bench has it: the model in every row, so that tables can be joined."""
    model = facts["model"]
    names, rows, sides = _cells(facts)
    own = (
        model["name"],
        human_bytes(model["bytes"]),
        _count(model["parameters"]),
        facts["machine"]["device"],
        _kv(facts),
    )
    _print_markdown_table(
        ("model", "size", "params", "backend", "keys", *names),
        [(*own, *row) for row in rows],
        "lrrll" + sides,
    )
    print()
    print("\n".join(f"{line}  " for line in _footer(facts)))


def _print_markdown_table(
    names: tuple[str, ...], rows: Sequence[tuple[str, ...]], sides: str
) -> None:
    print(f"| {' | '.join(names)} |")
    print(f"|{'|'.join({'l': '---', 'r': '--:'}[side] for side in sides)}|")
    for row in rows:
        print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")


def _cells(
    facts: dict[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """Names of the columns, the rows, and the columns' sides."""
    titles = {"measured": "limit here", "nominal": "limit of the chip"}
    chips = {name: title for name, title in titles.items() if name in facts["speed"]}
    rows = []
    for row in facts["rows"]:
        limits = (row["limits"][name] for name in chips)
        rows.append(
            (
                row["name"],
                f"{_number(row['median'])} {row['unit']}",
                f"{_number(row['min'])}..{_number(row['max'])}",
                *(f"{x['share']:.0%} of {_number(x['value'])}" for x in limits),
            )
        )
    names = ("test", "median", "min..max", *chips.values())
    return names, rows, "l" + "r" * (len(names) - 1)


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _count(parameters: int) -> str:
    if parameters < 1e9:
        return f"{parameters / 1e6:.2f} M"
    return f"{parameters / 1e9:.2f} B"


def _title(facts: dict[str, Any]) -> str:
    model = facts["model"]
    random = ", random weights" if model["random_weights"] else ""
    return (
        f"{model['name']}{random}: {_count(model['parameters'])} parameters, "
        f"{human_bytes(model['bytes'])}, {_number(model['bits'])} bits each; "
        f"keys and values {_kv(facts)}"
    )


def _kv(facts: dict[str, Any]) -> str:
    """How keys and values are held."""
    bits, group = facts["kv"]["bits"], facts["kv"]["group_size"]
    return f"{bits} bits in {group}s" if group else f"{bits} bits"


def _footer(facts: dict[str, Any]) -> list[str]:
    model, machine, speed = facts["model"], facts["machine"], facts["speed"]
    here = speed["measured"]
    reads = f"reads {here['bytes_per_second'] / 1e9:,.1f} GB/s"
    products = f"multiplies {here['flops'] / 1e12:,.2f} TFLOP/s"
    if chip := speed.get("nominal"):
        reads += f" of {chip['bytes_per_second'] / 1e9:,.0f}"
        products += f" of {chip['flops'] / 1e12:,.1f}"
    load = facts["load_seconds"]
    cores = machine["gpu_cores"]
    versions = (f"{name} {version}" for name, version in machine["versions"].items())
    first = [
        *([f"load {load:.2f} s"] if load is not None else []),
        f"peak memory {human_bytes(facts['peak_bytes'])}",
        f"{reads}, {products}, measured",
    ]
    second = [
        machine["chip"],
        machine["device"],
        *([f"{cores} GPU cores"] if cores else []),
        f"{machine['cpu_cores']} CPU cores",
        human_bytes(machine["memory_bytes"]),
        machine["system"],
        *([f"BLAS {machine['blas']}"] if machine["blas"] else []),
    ]
    third = [
        *versions,
        *([f"commit {machine['commit']}"] if machine["commit"] else []),
        model["dtype"],
        f"{_number(model['bits'])} bits",
        f"{facts['repetitions']} runs",
    ]
    return ["; ".join(first), ", ".join(second), ", ".join(third)]
