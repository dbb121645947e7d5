"""Bars on a terminal, and what an end before the end leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .common import note


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (task, done, total), shown as a bar for each task on a terminal.

    What an error carries besides its message is said when it passes.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    try:
        with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as p:

            def tell(task: str, done: int, total: int) -> None:
                if task not in tasks:
                    tasks[task] = p.add_task(task, total=total)
                p.update(tasks[task], completed=done)

            yield tell
    except BaseException as error:
        for line in getattr(error, "__notes__", ()):
            note(line)
        raise
