"""``mm1 caption``: a folder of pictures into captions, line by line or beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import (
    AdapterNames,
    MaxTokens,
    Model,
    Resolution,
    Seed,
    System,
    Temperature,
    TopP,
    Yes,
    counted,
    note,
    open_runtime,
)
from .schema import SchemaFile, read_schema

# In the folder, where no --out says otherwise.
OUT = "captions.jsonl"


def caption(
    folder: Annotated[
        Path, typer.Argument(help="where the pictures are, in folders too")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="what is asked about each picture")
    ] = "Describe the picture.",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o",
            help=f"the file of JSON lines (default: {OUT} in the folder)",
            show_default=False,
        ),
    ] = None,
    sidecar: Annotated[
        Literal["txt", "json"] | None,
        typer.Option(
            help="write a file beside each picture instead", show_default=False
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="only pictures whose name or path matches, several times: '2024/*'",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="none that match, several times", show_default=False),
    ] = None,
    schema: SchemaFile = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="begin again, whatever is there")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="captions under way at once", min=1, max=256)
    ] = 8,
    model: Model = None,
    adapter: AdapterNames = None,
    resolution: Resolution = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    yes: Yes = False,
) -> None:  # fmt: skip
    """Caption a folder of pictures.

    A run that was stopped goes on when it is given again. A picture that cannot be read
    gets a line with its error, and the others go on; the exit status is 1 then.
    """
    if sidecar and out:
        raise typer.BadParameter(
            "--sidecar writes beside the pictures; leave out --out"
        )
    from mm1_mlx.captions.folder import find_pictures
    from mm1_mlx.folders import user_path

    pictures = find_pictures(user_path(str(folder)), include or (), exclude or ())
    for line in pictures.unread:
        note(f"passed over: {line}")
    held = read_schema(schema)
    with ExitStack() as stack:
        runtime = stack.enter_context(open_runtime(model, yes, resolution, adapter))
        from mm1_mlx.captions.run import Asked, record
        from mm1_mlx.captions.run import caption as run
        from mm1_mlx.captions.store import Lines, Sidecars

        asked = Asked(
            prompt=prompt,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            schema=held,
        )
        store: Any
        if sidecar:
            store = Sidecars(pictures, f".{sidecar}", overwrite=overwrite)
        else:
            path = user_path(str(out)) if out else pictures.folder / OUT
            lines = Lines(path, record(runtime, asked), overwrite=overwrite)
            store = stack.enter_context(lines)
        known = store.done()
        before = [known[name] for name in pictures.names if name in known]
        tell = stack.enter_context(_bar(len(before), len(pictures.names)))
        captions, errors = before.count(True), before.count(False)
        for name, row in run(runtime, pictures, asked, store, size=batch_size):
            if "error" not in row:
                captions += 1
            else:
                errors += 1
                if sidecar:
                    note(f"{name}: {row['error']}")
            tell(captions + errors)
    had = f" ({len(before):,} from before)" if before else ""
    where = f".{sidecar} files beside the pictures" if sidecar else str(path)
    note(f"{counted(captions, 'caption')}, {counted(errors, 'error')}{had}: {where}")
    if errors:
        raise typer.Exit(1)


@contextmanager
def _bar(done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Called with pictures done: a bar on a terminal, with their pace and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("captions"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", completed=done, total=total, pace="")

        def tell(count: int) -> None:
            speed = bar.tasks[task].speed
            pace = f"{speed:.3g} pictures/s" if speed else ""
            bar.update(task, completed=count, pace=pace)

        yield tell
