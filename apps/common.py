"""What the commands share: options, the place where errors end, printing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mm1_mlx.sizes import human_bytes

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="model folder or hub repository (default: $MM1_MODEL, else mm1-tiny)",
        show_default=False,
    ),
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        "-i",
        help="a picture, several times; - reads stdin",
        show_default=False,
    ),
]


def _above_zero(value: float) -> float:
    if value == 0:
        raise typer.BadParameter(
            "0 leaves nothing to choose; --temperature 0 is greedy"
        )
    return value


MaxTokens = Annotated[int, typer.Option(help="longest answer, in tokens", min=1)]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "-t", help="0 takes the likeliest token", min=0, max=2
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        help="sample from this share of probability, more than 0",
        min=0,
        max=1,
        callback=_above_zero,
    ),
]
Seed = Annotated[int | None, typer.Option(help="of the sampling", show_default=False)]
System = Annotated[str | None, typer.Option(help="system message", show_default=False)]
Resolution = Annotated[
    str | None,
    typer.Option(
        help="how pictures become tiles: 672 for one, 2x672 for an overview and 2 x 2, "
        "4-9x672 by the picture's shape (default: the model's)",
        show_default=False,
    ),
]
AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="PATH[:SCALE], a folder or hub repository that changes the model, several "
        "times",
        show_default=False,
    ),
]
VisionBackend = Annotated[
    str,
    typer.Option(
        help="what sees pictures: mlx; on macOS coreml, by Encoder.mlpackage in the "
        "model's folder, or coreml:PACKAGE"
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="download and convert without asking")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


# A picture's text, or a name in somebody's data, could write an escape sequence.
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def guarded(command: Callable[[], None]) -> None:
    """Run a command; a user's error is one line on stderr and exit status 1."""
    from mm1_mlx.errors import MM1Error

    try:
        command()
    except MM1Error as error:
        stop(str(error))
    except BrokenPipeError:
        # The reader went away; nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        stop(f"{name}{error.strerror or error}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def stop(message: str) -> None:
    """Print ``error: message`` and exit with status 1."""
    _tell(f"error: {' '.join(message.split())}")
    raise SystemExit(1)


def note(message: str) -> None:
    """A line for people, on stderr; of processes that answer together the first's."""
    if _rank() == 0:
        _tell(message)


def _tell(message: str) -> None:
    """A message on stderr, without its control characters."""
    print(message.translate(CONTROLS), file=sys.stderr, flush=True)


def _rank() -> int:
    rank = os.environ.get("MLX_RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def print_answer(text: str) -> None:
    """A piece of an answer on stdout; to a terminal without its control characters."""
    if sys.stdout.isatty():
        text = text.translate(CONTROLS)
    print(text, end="", flush=True)


def print_json(value: Any, indent: int | None = 2) -> None:
    """One JSON object on stdout; without an indent on one line."""
    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun, of one thing or several."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def picture(source: str) -> str | bytes:
    """A picture named on the command line; ``-`` is read from stdin."""
    from mm1_mlx.folders import user_path
    from mm1_mlx.image import DEFAULT_LIMITS

    if source == "-":
        # One byte more, so that too long a picture is refused as such.
        return sys.stdin.buffer.read(DEFAULT_LIMITS.max_bytes + 1)
    # A Path would take the second slash out of a URL or a data URI.
    return str(user_path(source)) if source.startswith("~") else source


def open_runtime(
    model: str | None,
    yes: bool,
    resolution: str | None = None,
    adapters: list[str] | None = None,
    vision_backend: str = "mlx",
) -> Any:
    """The runtime of ``--model``, converted first if need be, on the fastest BLAS."""
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.runtime import load

    from .cached import resolve

    return load(
        resolve(model, yes),
        resolution=resolution,
        group=processes(),
        adapters=named_adapters(adapters),
        vision_backend=vision_backend,
    )


def named_adapters(names: list[str] | None) -> list[Any]:
    """The names of ``--adapter`` and their scales."""
    if not names:
        return []
    from mm1_mlx.adapters import parse

    return [parse(name) for name in names]


def processes() -> Any:
    """The processes of ``mlx.launch`` that this one belongs to, else None.

    They answer or train together; the first of them prints.

    Raises:
        ConfigError: they cannot find each other.
    """
    if "MLX_RANK" not in os.environ:
        return None
    import mlx.core as mx

    from mm1_mlx.errors import ConfigError

    try:
        # mlx takes what is no number for 0, and waits.
        int(os.environ["MLX_RANK"])
        group = mx.distributed.init(strict=True)
    # What the file of hosts and the rank do wrong is told by either.
    except (RuntimeError, ValueError) as error:
        said = {
            name: os.environ.get(name, "not set")
            for name in ("MLX_RANK", "MLX_HOSTFILE")
        }
        settings = ", ".join(f"{name} {value!r:.80}" for name, value in said.items())
        raise ConfigError(
            f"this process finds no others to run with ({settings}): {error}; start all "
            "of them with 'mlx.launch -n 2 -- mm1 ...', or unset MLX_RANK to run alone"
        ) from None
    if group.rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return group if group.size() > 1 else None


def source_line(info: Any) -> str:
    """What a user should know of a source before it is fetched, from its SourceInfo."""
    if info.bytes is None:
        return f"{info.name}: size and licence unknown, the hub cannot be asked"
    size = human_bytes(info.bytes)
    return f"{info.name}: {size}, licence {info.licence or 'not stated'}"
