"""What the machine has of memory, and still free, for this process.

On Metal the device says what it recommends at most. On Linux the system does, and the
control groups that a container is: both their versions are read.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#memory
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Group:
    """How a version of control groups calls a limit, what is used, and the file cache."""

    folder: str
    limit: str
    used: str
    # Counted as used, and given back when it is needed.
    cache: tuple[str, str]
    # Limit and use of swap, where it is told apart from memory.
    swap: tuple[str, str] | None


_V1 = _Group(
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    None,
)
_V2 = _Group(
    "",
    "memory.max",
    "memory.current",
    ("inactive_file", "active_file"),
    ("memory.swap.max", "memory.swap.current"),
)


def allowed() -> int | None:
    """Bytes that this process may still take on its device; None if nothing says so.

    On Metal what is left of the working set that the device recommends; on a CPU what
    system and container have, their swap included.
    """
    return _room(swap=True)


def unswapped() -> int | None:
    """Those of the ``allowed`` bytes that are memory, and no swap."""
    return _room(swap=False)


def _room(*, swap: bool) -> int | None:
    used, kept = mx.get_active_memory(), mx.get_cache_memory()
    info = mx.device_info()
    if mx.default_device() != mx.cpu:
        limit = info.get("max_recommended_working_set_size")
        return None if limit is None else int(limit) - used
    if (PROC / "meminfo").is_file():
        memory, swapped = _system()
        # What mlx keeps of freed arrays it takes first.
        return memory + kept + (swapped if swap else 0)
    size = info.get("memory_size")
    return None if size is None else int(size) - used


def _system() -> tuple[int, int]:
    """Bytes of memory, and of swap, that the system and every group have left."""
    lines = (x.split() for x in (PROC / "meminfo").read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines}
    memory, swap = sizes["MemAvailable:"], sizes.get("SwapFree:", 0)
    for group, folder in _folders():
        left = _left(folder, group)
        if left is None:
            continue
        memory = min(memory, left)
        # A group that does not say what it may swap is taken to swap nothing.
        swap = min(swap, _swap_left(folder, group, swap))
    return max(0, memory), max(0, swap)


def _folders() -> Iterator[tuple[_Group, Path]]:
    """The control groups that this process is in, each with those that hold it.

    In a container the path is often the host's, and only its last folder is there: the
    container's own, at the top.
    """
    path = PROC / "self/cgroup"
    for line in path.read_text().splitlines() if path.is_file() else ():
        number, controllers, name = line.split(":", 2)
        if number == "0":
            group = _V2
        elif "memory" in controllers.split(","):
            group = _V1
        else:
            continue
        own = GROUPS / group.folder / name.strip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(GROUPS / group.folder):
                break
            yield group, folder


def _left(folder: Path, group: _Group) -> int | None:
    """Bytes that the group may still take, None if it has no limit."""
    limit, used = _number(folder / group.limit), _number(folder / group.used)
    if limit is None or used is None:
        return None
    stat = (x.split() for x in (folder / "memory.stat").read_text().splitlines())
    cache = sum(int(size) for name, size in stat if name in group.cache)
    return limit - used + cache


def _swap_left(folder: Path, group: _Group, free: int) -> int:
    """Bytes that a limited group may still swap, of so many that are free."""
    if group.swap is None:
        return 0
    limit, used = (_number(folder / name) for name in group.swap)
    return free if limit is None or used is None else limit - used


def _number(path: Path) -> int | None:
    """What the file says; None if it is not there, or says that there is no limit."""
    text = path.read_text().strip() if path.is_file() else "max"
    number = None if text == "max" else int(text)
    # Version 1 says so with the largest number of pages.
    return None if number is None or number >= 1 << 60 else number
