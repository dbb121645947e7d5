"""``mm1 eval``: figures of published tasks on local data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import (
    CONTROLS,
    AdapterNames,
    AsJson,
    Model,
    Resolution,
    Yes,
    note,
    open_runtime,
    print_json,
)
from .progress import bars


def evaluate(
    task: Annotated[
        str | None, typer.Argument(help="what is asked; --list names all", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="questions, or rows as trained on: JSONL, parquet or tar",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    adapter: AdapterNames = None,
    shots: Annotated[
        int, typer.Option(help="solved examples before each question", min=0, max=64)
    ] = 0,
    shots_from: Annotated[
        Path | None,
        typer.Option(help="training data to draw them from", show_default=False),
    ] = None,
    fresh_shots: Annotated[
        bool,
        typer.Option(
            "--fresh-shots", help="draw others for each question (slower: nothing is shared)"
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="of the drawing", min=0)] = 0,
    limit: Annotated[
        int | None,
        typer.Option(help="ask so many rows, the first ones", min=1, show_default=False),
    ] = None,
    style: Annotated[
        Literal["auto", "chat", "base"],
        typer.Option(help="ask in turns, or a base model in MM1's few-shot forms"),
    ] = "auto",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="ask so instead, of {question}, {hint} and {options}", show_default=False
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="end a base model's answer before this text, several times",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="longest answer, in tokens (default: the task's)", min=1,
            show_default=False,
        ),
    ] = None,
    resolution: Resolution = None,
    tiled: Annotated[
        int | None,
        typer.Option(
            help="split only this many of a prompt's last pictures into tiles", min=0,
            show_default=False,
        ),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(
            help="where paths of pictures begin (default: beside DATA)",
            show_default=False,
        ),
    ] = None,
    outside: Annotated[
        bool, typer.Option("--outside", help="let paths of pictures lead out of it")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="pass over rows that cannot be asked")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o",
            help="folder for answers and results; a killed run goes on there",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            help="a folder of results, several times: their figures in one table",
            show_default=False,
        ),
    ] = None,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="name the tasks and how each is counted")
    ] = False,
    as_json: AsJson = False,
    yes: Yes = False,
) -> None:  # fmt: skip
    """Ask a model questions with known answers, greedily, and count by published metrics.

    Of a conversation the last answer is asked for, behind the turns before it.
    Figures come with their 95% intervals; the accuracy of choices, and of yes or no, also
    with what guessing would give.
    """
    if (list_tasks or compare) and (task is not None or data is not None):
        raise typer.BadParameter(
            "--list and --compare ask nothing; leave task and data out"
        )
    if list_tasks:
        _list(as_json)
        return
    if compare:
        _compare(compare, as_json)
        return
    if task is None or data is None:
        raise typer.BadParameter("name a task and its data, or ask for --list")
    from mm1_mlx.errors import PromptError
    from mm1_mlx.eval.run import Options, altered
    from mm1_mlx.eval.run import evaluate as run
    from mm1_mlx.eval.tasks import TASKS
    from mm1_mlx.folders import user_path

    if task not in TASKS:
        raise typer.BadParameter(f"{task!r} is no task; --list names them all")

    def path(given: Path | None) -> Path | None:
        return None if given is None else user_path(str(given))

    options = Options(
        shots=shots,
        shots_from=path(shots_from),
        fresh_shots=fresh_shots,
        seed=seed,
        limit=limit,
        tiled=tiled,
        style=style,
        image_folder=path(image_folder),
        outside=outside,
        skip_bad=skip_bad,
    )
    try:
        asked = altered(TASKS[task], prompt=prompt, stop=stop, max_tokens=max_tokens)
    except PromptError as error:
        raise typer.BadParameter(str(error)) from None
    with bars() as progress, open_runtime(model, yes, resolution, adapter) as runtime:
        results = run(
            runtime,
            asked,
            user_path(str(data)),
            options,
            out=path(out),
            progress=progress,
        )
    for line in results["bad_rows"]:
        note(f"skipped: {line}")
    if (blind := results["without_picture"]) and asked.style != "text":
        note(f"{blind:,} of {results['n']:,} questions have no picture")
    if unended := results["unended"]:
        note(
            f"{unended:,} of {results['n']:,} answers had not ended after "
            f"{asked.max_tokens} tokens; --max-tokens lets them be longer"
        )
    if as_json:
        print_json(results)
    else:
        _show([(task, results)])


def _list(as_json: bool) -> None:
    from dataclasses import asdict

    from mm1_mlx.eval.metrics import METRICS
    from mm1_mlx.eval.tasks import TASKS

    if as_json:
        print_json([asdict(task) for task in TASKS.values()])
        return
    rows = []
    for name, task in TASKS.items():
        needs = METRICS[task.metric].needs | ({"images"} if task.pictured else set())
        has = ", ".join(sorted(needs)) + (f" ({task.note})" if task.note else "")
        rows.append((name, task.metric, has, task.prompt, _base_form(task)))
    _print_table(("task", "metric", "a row has", "asks", "a base model reads"), rows)


def _base_form(task: Any) -> str:
    """What a model that was only pre-trained reads behind a picture."""
    from mm1_mlx.shots import with_shots

    if task.style == "text":
        return str(task.plain)
    # Not opened: a caption's form is that of a picture without a question.
    (message,) = with_shots((), task.plain, [Path()], task.style)
    return "".join(part.get("text", "") for part in message["content"]).strip()


def _compare(folders: list[Path], as_json: bool) -> None:
    from mm1_mlx.eval.log import legible, read_results

    found = [(legible(folder), read_results(folder)) for folder in folders]
    if as_json:
        print_json([{"folder": name, **results} for name, results in found])
    else:
        _show(found)


def _show(found: list[tuple[str, Any]]) -> None:
    """The figures of several results, in percent but for perplexity and losses."""
    rows = []
    for name, results in found:
        parts = {"": results["figures"], **results["categories"]}
        settings = results.get("settings")
        known = settings.get("resolution") if isinstance(settings, dict) else None
        for category, figures in parts.items():
            for figure, held in figures.items():
                label = f"{name}: {category}" if category else name
                said = _written(figure, held)
                rows.append((label, str(known or ""), figure, *said))
    heads = (
        "task" if len(found) == 1 else "results",
        "pictures",
        "figure",
        "",
        "95%",
        "chance",
        "n",
    )
    _print_table(heads, rows)


def _written(name: str, held: dict[str, Any]) -> tuple[str, str, str, str]:
    scale = 1 if name in ("perplexity", "loss") else 100

    def said(key: str) -> str:
        return "" if held.get(key) is None else f"{scale * held[key]:.1f}"

    interval = f"{said('low')} to {said('high')}" if said("low") else ""
    return said("value"), interval, said("chance"), f"{held['n']:,}"


def _print_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in heads:
        right = head in ("", "95%", "chance", "n")
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for row in rows:
        # Not markup: a folder's name may hold brackets. Nor does a name steer a terminal.
        table.add_row(*(Text(cell.translate(CONTROLS)) for cell in row))
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        # A file has no width.
        console.width = 200
    console.print(table)
