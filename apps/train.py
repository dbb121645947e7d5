"""``mm1 train connector | sft | pretrain``: pictures and text into better weights.

The flags are the fields of ``TrainConfig``, with the defaults of ``stages.py``.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
)
from uuid import uuid4

import typer

from mm1_mlx.errors import ConfigError
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.stages import DEFAULTS, DERIVED, FULL, Stage, merged

from .common import human_bytes, note, print_answer, print_json, processes

if TYPE_CHECKING:
    from mm1_mlx.train.pace import Moment

# What Weights & Biases calls the run of a folder.
WANDB = "wandb-id"

train = typer.Typer(
    name="train",
    help="Train a model on pictures and text, in whole or in part.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _parameters(stage: Stage) -> Iterator[inspect.Parameter]:
    """What the command of a stage takes: the fields of ``TrainConfig`` and a few more."""

    def parameter(name: str, kind: Any, info: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=default,
            annotation=Annotated[kind, info],
        )

    model = typer.Argument(help="model folder or hub repository")
    out = typer.Argument(help="the run's folder; the same command goes on in it")
    yield parameter("model", str, model, inspect.Parameter.empty)
    yield parameter("out", Path, out, inspect.Parameter.empty)
    file = typer.Option(
        help="a run's record, or its config; flags win", show_default=False
    )
    yield parameter("config", Path | None, file, None)
    if stage == "sft":
        text = "everything as the paper does, instead of adapters and the connector"
        yield parameter("full", bool, typer.Option("--full", help=text), False)
    text = "say what would be trained and what it takes, and do nothing"
    yield parameter("dry_run", bool, typer.Option("--dry-run", help=text), False)
    as_json = typer.Option("--json", help="print one JSON object")
    yield parameter("as_json", bool, as_json, False)
    hints = get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        if not field.metadata:
            continue
        text = field.metadata["help"]
        if get_origin(hints[field.name]) is tuple:
            text += ", several times"
        text += _default(stage, field.name, field.default)
        kind = _flag_type(hints[field.name])
        more: dict[str, Any] = {}
        if field.name == "adapter":
            kinds = get_args(hints[field.name])
            more = {"metavar": f"<{'|'.join(kinds)}>", "callback": _check_kind}
            kind = str | None
        info = typer.Option(
            help=text,
            rich_help_panel=field.metadata["panel"],
            show_default=False,
            **more,
        )
        yield parameter(field.name, kind, info, None)


def _default(stage: Stage, name: str, otherwise: Any) -> str:
    """What the help says of a field that is left to a default."""
    default = DEFAULTS[stage].get(name, DERIVED.get(name, otherwise))
    # By identity: a default of 0 equals False.
    if default is None or default is MISSING or default is False or default == ():
        return ""
    words = _words(default)
    if stage == "sft" and name in FULL:
        whole = FULL[name] if FULL[name] is not None else DERIVED[name]
        words += f"; of --full: {_words(whole)}"
    return f" (default: {words})"


def _words(default: Any) -> str:
    """A default as it stands in the help."""
    return " ".join(default) if isinstance(default, tuple) else str(default)


def _check_kind(kind: str | None) -> str | None:
    """Pass only a kind of adapter: elsewhere an adapter is what this flag takes."""
    kinds = get_args(get_type_hints(TrainConfig)["adapter"])
    if kind is None or kind in kinds:
        return kind
    raise typer.BadParameter(
        f"{kind!r} is not one of {', '.join(kinds)}: which kind of adapter to train; to "
        "go on from an adapter fuse it first ('mm1 fuse MODEL NEW --adapter "
        "PATH'), and train NEW"
    )


def _flag_type(hint: Any) -> Any:
    """A field's type as its flag has it, which may be left out."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if get_origin(hint) is tuple:
        return list[str] | None
    if get_origin(hint) is Literal or len(kinds) != 1:
        return hint | None
    return hint


def _command(stage: Stage, about: str) -> Callable[..., None]:
    """The function of a stage's command, with a signature that typer reads."""

    def command(**given: Any) -> None:
        _train(stage, **given)

    parameters = list(_parameters(stage))
    command.__name__ = stage
    command.__doc__ = about
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


STAGES: dict[Stage, str] = {
    "connector": "Train the connector alone, between a frozen encoder and decoder.",
    "sft": "Train on conversations: adapters on the decoder, and the connector in full.",
    "pretrain": "Train everything on captions, documents and text.",
}
for _stage, _about in STAGES.items():
    train.command(_stage)(_command(_stage, _about))


def _train(
    stage: Stage,
    *,
    model: str,
    out: Path,
    config: Path | None,
    dry_run: bool,
    as_json: bool,
    full: bool = False,
    **flags: Any,
) -> None:
    from mm1_mlx.blas import preload_blas

    preload_blas()
    from mm1_mlx.folders import user_path
    from mm1_mlx.runtime import find_model
    from mm1_mlx.train.job import Job

    out = user_path(str(out))

    # Before the loop asks for it: a process that finds no others would train alone.
    processes()
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in flags.items()
        if value is not None and value != []
    }
    if config:
        given = merged(_recorded(user_path(str(config)), stage), given)
    with _by_flags():
        job = Job(find_model(model), out, stage, given, full=full, say=note)
        outlook = job.outlook() if dry_run else None
    project = job.config.wandb
    wandb = _wandb() if project and not dry_run else None
    if outlook:
        _show(outlook, as_json)
        return
    follow: Any = None
    made: Path | None = None
    with _by_flags(), _bar(job.config) as bar:

        def told(line: dict[str, Any]) -> None:
            nonlocal follow
            bar.report(line)
            if follow:
                try:
                    follow.log(line, step=line["step"])
                except Exception as error:
                    # The run is worth more than its being watched.
                    note(f"Weights & Biases is told nothing more ({error})")
                    follow = None

        reached = []

        def begun(trainer: Any) -> None:
            nonlocal follow
            reached.append(trainer)
            _stop_on_interrupt(trainer)
            note(_length(job.config, job.passes))
            if job.held_out:
                note(_held_out(job.held_out, job.config))
            # Now: what cannot be trained must not begin a run there.
            if wandb:
                follow = _follower(wandb, out, job.config)

        try:
            made = job.run(told, bar.expect, begun, bar.watch)
        finally:
            if follow:
                follow.finish(exit_code=0 if made else 1)
    if made is None:
        at = f"stopped at step {reached[0].step:,} of {job.config.steps:,}"
        note(f"{at}; the same command goes on from there")
        raise SystemExit(128 + signal.SIGINT)
    if reached[0].group.rank() == 0:
        for line in _next(stage, model, out, made):
            note(line)
        if as_json:
            print_json({"out": str(made), "steps": job.config.steps})
        else:
            print(made)


# Fields of adapters whose flags have other names.
_FLAGS = {"where": "adapter-targets", "kind": "adapter"} | {
    name: f"adapter-{name}" for name in ("rank", "scale", "dropout", "layers")
}


@contextmanager
def _by_flags() -> Iterator[None]:
    """What is wrong with a setting is said of its flag."""

    def flag(found: re.Match[str]) -> str:
        name = _FLAGS.get(found[2], found[2]) if found[1] == "Adapter" else found[2]
        return f"--{name.replace('_', '-')}"

    try:
        yield
    except ConfigError as error:
        said = re.sub(r"\b(Adapter|Train)Config\.(\w+)", flag, str(error))
        raise type(error)(said) from None


def _next(stage: Stage, model: str, out: Path, made: Path) -> Iterator[str]:
    """What can be done with what a run has made, and where its curve is."""
    from mm1_mlx.train.job import ADAPTER, CURVE

    if (out / CURVE).is_file():
        yield f"the curve is {out / CURVE}"
    place = shlex.quote(str(made))
    whole = made.name != ADAPTER
    named = f"-m {place}" if whole else f"-m {shlex.quote(model)} --adapter {place}"
    yield f'ask it:      mm1 generate {named} -i PICTURE -p "..."'
    yield f"measure it:  mm1 eval TASK DATA {named}"
    if not whole:
        yield f"one model:   mm1 fuse {shlex.quote(model)} NEW --adapter {place}"
    elif stage == "connector":
        yield f"go on:       mm1 train sft {place} RUN --data DATA"


def _recorded(path: Path, stage: str) -> dict[str, Any]:
    """The settings in a file: a run's record, or its config alone.

    Raises:
        ConfigError: it is neither, or of another stage.
    """
    from mm1_mlx.train.record import read_settings

    found = read_settings(path)
    if found.stage not in (None, stage):
        raise ConfigError(
            f"{path} is of 'mm1 train {found.stage}', not of 'mm1 train {stage}'"
        )
    return found.given


def _wandb() -> Any:
    """Weights & Biases' package, None where another process uses it.

    Raises:
        ConfigError: the package is not installed.
    """
    if os.environ.get("MLX_RANK", "0") != "0":
        return None
    try:
        return import_module("wandb")
    except ImportError:
        raise ConfigError(
            "the package wandb is not installed; pip install wandb, or leave out --wandb"
        ) from None


def _follower(wandb: Any, out: Path, config: TrainConfig) -> Any:
    """A run of Weights & Biases, the same one as long as the folder stands.

    Raises:
        ConfigError: it cannot be begun, as where nobody is logged in.
    """
    known = out / WANDB
    if not known.is_file():
        known.write_text(f"{uuid4().hex[:16]}\n")
    name = known.read_text().strip()
    try:
        return wandb.init(
            project=config.wandb, id=name, resume="allow", config=config.to_dict()
        )
    except Exception as error:
        # Its own, and those of whatever it connects with.
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"Weights & Biases cannot be logged to ({said}); log in with 'wandb login', "
            "or leave out --wandb"
        ) from None


def _stop_on_interrupt(trainer: Any) -> None:
    """The first Ctrl-C ends the run behind its step, the second at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        note("stopping behind this step, with a checkpoint; again to stop at once")
        trainer.stop()

    signal.signal(signal.SIGINT, stop)


class _Bar(NamedTuple):
    """What is told of a run: its log lines, its forecast, and where it is."""

    report: Callable[[dict[str, Any]], None]
    expect: Callable[[dict[str, Any]], None]
    watch: Callable[[Moment], None]


@contextmanager
def _bar(config: TrainConfig) -> Iterator[_Bar]:
    """A bar that moves with every step and held-out batch, or log lines, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
    )
    terminal = sys.stderr.isatty() and os.environ.get("MLX_RANK", "0") == "0"
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not terminal) as progress:
        task = progress.add_task("", total=config.steps, said="")
        learned, left = "", ""

        def watch(moment: Moment) -> None:
            nonlocal left
            if moment.seconds_left is not None:
                left = f"  {_duration(moment.seconds_left)} left"
            said = learned
            if moment.of:
                said = f"held-out batch {moment.measured:,} of {moment.of:,}"
            progress.update(task, completed=moment.step, said=said + left)

        def report(line: dict[str, Any]) -> None:
            nonlocal learned
            said = _said(line)
            if "loss" in line:
                learned = said
                said += left
                progress.update(task, completed=line["step"], said=said)
            if not terminal or "loss" not in line:
                note(f"step {line['step']:,}  {said}")

        def expect(forecast: dict[str, Any]) -> None:
            note(_forecast(forecast))

        yield _Bar(report, expect, watch)


def _said(line: Mapping[str, Any]) -> str:
    """A log line for people."""
    if "loss" not in line:
        loss = line["valid_loss"]
        said = "is no finite number" if loss is None else f"{loss:.4f}"
        return f"held out loss {said}"
    return (
        f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s  "
        f"{human_bytes(line['peak_bytes'])}"
    )


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"


def _length(config: TrainConfig, passes: float) -> str:
    """How long a run is, in a line."""
    examples = config.batch_size * config.micro_batches
    return (
        f"{config.steps:,} steps of {examples:,} examples, {passes:.3g} passes over the "
        "data"
    )


def _held_out(rows: int, config: TrainConfig) -> str:
    """How many rows are not learned, in a line."""
    measured = min(rows, config.valid_examples)
    said = f"{rows:,} rows are held out"
    if measured < rows:
        said += f", {measured:,} of them measured (--valid-examples)"
    if not config.valid:
        said += (
            "; for rows that 'mm1 eval' can take too, split the data and give --valid"
        )
    return said


def _forecast(forecast: Mapping[str, Any]) -> str:
    """What a step takes, in a line."""
    said = f"a step of {forecast['tokens']:,} tokens takes {human_bytes(forecast['bytes'])}"
    if free := forecast.get("free_bytes"):
        said += f" of the {human_bytes(free)} that are free"
    if seconds := forecast.get("least_seconds"):
        said += f", and {seconds:g} s at the least"
    return said


def _show(outlook: Any, as_json: bool) -> None:
    """What a run would do."""
    parts = outlook.parts
    if as_json:
        print_json(
            {
                "config": outlook.config.to_dict(),
                "passes": outlook.passes,
                "held_out": outlook.held_out,
                "parameters": {
                    part: {"trained": trained, "all": total}
                    for part, (trained, total) in parts.items()
                },
                "step": dict(outlook.forecast),
            }
        )
        return
    config = outlook.config
    for part, (trained, total) in parts.items():
        print(f"{part:10} {trained:>15,} of {total:>15,} parameters are trained")
    print(_length(config, outlook.passes))
    if outlook.held_out:
        print(_held_out(outlook.held_out, config))
    print(
        f"{config.optimizer}, learning rate {config.learning_rate:.3g}, "
        f"{config.precision}"
    )
    if outlook.forecast:
        print(_forecast(outlook.forecast))
    print_answer(f"{outlook.preview}\n")
