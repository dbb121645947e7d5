"""``mm1 train``: a model folder and data into an adapter or a better model.

What a run leaves in its folder:

    run.json        what it is made of
    log.jsonl       a line every few steps
    loss.png        the log, drawn at each checkpoint
    step-000200/    where it stands, the last two
    adapter/        in the end what was trained, if adapters were; else
    model/          the whole model
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mm1_mlx import adapters
from mm1_mlx.checkpoint import (
    cast_overflowing,
    device_dtypes,
    load_config,
    load_model,
    packed_on_disk,
)
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError
from mm1_mlx.folders import MADE_ADAPTER, MADE_MODEL, user_path
from mm1_mlx.hold import Hold
from mm1_mlx.models import MM1
from mm1_mlx.original import Original
from mm1_mlx.resolution import with_resolution
from mm1_mlx.shard import Deferred
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.train.config import PARTS, PLACES, TrainConfig
from mm1_mlx.train.curve import draw_curve
from mm1_mlx.train.data.batches import Batches
from mm1_mlx.train.data.mixture import Mixture, open_mixture
from mm1_mlx.train.data.parquet import RowGroups
from mm1_mlx.train.data.preview import Preview, preview
from mm1_mlx.train.gradients import Loss
from mm1_mlx.train.loss import next_token_loss, sparse_loss
from mm1_mlx.train.pace import Moment
from mm1_mlx.train.processes import agree, all_texts, among_processes, first_text
from mm1_mlx.train.record import LOG, RECORD, is_record, read_log, read_settings
from mm1_mlx.train.sample import Batch
from mm1_mlx.train.stages import FULL, Stage, check_given, merged, plan
from mm1_mlx.train.state import check_room, saved_steps
from mm1_mlx.train.trainable import (
    adapter_config,
    check_rates,
    counts,
    make_trainable,
)
from mm1_mlx.train.trainer import Trainer
from mm1_mlx.writer import CheckpointWriter, check_apart, check_place

ADAPTER, MODEL, CURVE = MADE_ADAPTER, MADE_MODEL, "loss.png"
# Told in a line what was passed over or mended.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outlook:
    """What a run would do.

    Attributes:
        config: its settings, defaults filled in.
        passes: over the data.
        held_out: rows that the loss is measured on, or the first of them.
        parts: by part how many numbers are trained, and how many there are.
        preview: of the data.
        forecast: of a step on the batch with the longest row that was looked at:
            ``tokens``, ``bytes``, ``least_seconds``.
    """

    config: TrainConfig
    passes: float
    held_out: int
    parts: Mapping[str, tuple[int, int]]
    preview: Preview
    forecast: Mapping[str, Any]


class Job:
    """A run of a stage on a model folder.

    Args:
        path: the model's folder.
        out: the run's.
        stage: which command it is of.
        given: fields of ``TrainConfig``; the rest is as the run was begun, or else as
            the stage has it.
        full: whether the supervised stage trains everything.
        say: told what was passed over or mended.

    Raises:
        MM1Error: the model, the data or the settings cannot be used, or another process
            of the run has ended.
    """

    @among_processes()
    def __init__(
        self,
        path: Path,
        out: Path,
        stage: Stage,
        given: Mapping[str, Any],
        *,
        full: bool = False,
        say: Say = lambda _: None,
    ) -> None:
        self.path, self.out, self._say = path, out, say
        check_apart(out, [path])
        check_given(given)
        given, begun = _continued(out, given)
        base = load_config(path)
        # Of what is learned and what is measured by together.
        self._groups = RowGroups(0)
        mixture = self._open(given, "train")
        self._original = Original(path)
        self._packed = packed_on_disk(path, base)
        self.config = plan(
            stage,
            given,
            full=full,
            rows=len(mixture),
            parts=[part for part in PARTS if getattr(base, part)],
            packed={name.partition(".")[0] for name in self._packed},
            parameters=law_parameters(base),
            precision=_precision(),
            begun=begun,
        )
        settings = self.config.to_dict()
        # Where it is told elsewhere a run need not be again.
        named = {*given, *(FULL if full else ())} - {"wandb"}
        self._given = {name: x for name, x in settings.items() if name in named}
        self.model_config = _trainable_config(base, self.config)
        self._mixture = mixture
        if begun is None:
            self._begin_today()
        if self.config.date is not None:
            self._tokenizer.today = date.fromisoformat(self.config.date)
        self._made = self._batches(mixture, self.config)

    def _begin_today(self) -> None:
        """Have a run go on with the day that it began with, where its prompts say one."""
        if (
            self.config.date is None
            and self.model_config.prompt
            and self._tokenizer.dated
        ):
            today = first_text(date.today().isoformat())
            self.config = replace(self.config, date=today)

    def _open(self, given: Mapping[str, Any], part: Any) -> Mixture:
        """The data to learn from, or to measure by."""

        def of(name: str, default: Any = None) -> Any:
            return given.get(name, default)

        places = {
            name: user_path(of(name)) if of(name) else None
            for name in ("data_root", "image_folder")
        }
        names = of("data", ())
        measured = part == "valid" and bool(of("valid"))
        if measured:
            names, part = of("valid"), "train"
        return open_mixture(
            [str(user_path(name)) if name.startswith("~") else name for name in names],
            root=places["data_root"],
            image_folder=places["image_folder"],
            outside=of("outside", False),
            seed=of("seed", 0),
            held_out=0.0 if of("valid") else of("valid_share", 0.0),
            part=part,
            measured=measured,
            groups=self._groups,
        )

    def _batches(self, mixture: Mixture, config: TrainConfig) -> Batches:
        return Batches(
            mixture,
            self.model_config,
            self._tokenizer,
            config,
            report=lambda error: self._say(f"passed over: {error}"),
        )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        assert self.model_config.prompt is not None
        regions = self.model_config.region is not None
        return load_tokenizer(self.path, self.model_config.prompt, regions=regions)

    def _trainer(self) -> Trainer[MM1, Batch]:
        """The model, loaded, and its trainer."""
        config = self.config
        model = load_model(self.path, getattr(mx, config.precision))
        model.config = self.model_config
        make_trainable(model, config)
        check_rates(model, self._given)
        self._restore_bits(model)
        model.decoder.recompute = config.checkpointing
        if "vision" in model:
            model.vision.recompute = config.checkpointing
        record = {
            "model": adapters.base_of(self.path).to_dict(),
            "data": {"rows": len(self._mixture), "digest": self._mixture.identity()},
        }
        self._agree(record)
        valid = self._held_out()
        return Trainer(
            model,
            self._loss,
            self._made,
            config,
            self.out,
            valid=valid,
            data_bytes=self._groups.expected,
            record=record,
            given=self._given,
            warn=self._say,
            saved=self._draw,
        )

    def _agree(self, record: Mapping[str, Mapping[str, Any]]) -> None:
        """Pass only if all processes make the same run of the same.

        One that has other rows, weights or settings would train in silence what is
        averaged with the others'.

        Raises:
            ConfigError: they do not.
        """
        if mx.distributed.init().size() == 1:
            return
        facts = {"versions": " ".join(f"{x} {version(x)}" for x in ("mm1-mlx", "mlx"))}
        # Not by its name, which may be its folder's.
        facts["the model"] = record["model"]["digest"]
        facts["the data"] = json.dumps(record["data"])
        if self._measured is not None:
            facts["the held-out data"] = self._measured.identity()
        settings = self.config.to_dict().items()
        # Paths may be others on another machine.
        facts |= {name: json.dumps(x) for name, x in settings if name not in PLACES}
        agree(facts)

    def _restore_bits(self, model: MM1) -> None:
        """Give trained weights back what rounding to the run's precision took."""
        if self.config.precision == "float32":
            return
        stored = self._original.tensors()
        trained = cast(Any, tree_flatten(model.trainable_parameters()))
        # In one order; beside low-rank matrices the names in the model are others.
        names = zip(trained, adapters.tensors_of(model), strict=True)
        whole = [(own, stored[k].whole()) for (own, _), k in names if k in stored]
        model.load_weights(whole, strict=False)

    @property
    def _loss(self) -> Loss[MM1, Batch]:
        decoder = self.model_config.decoder
        if decoder is None or decoder.moe is None:
            return next_token_loss
        return partial(
            sparse_loss,
            balance_weight=self.config.balance_weight,
            z_weight=self.config.z_weight,
        )

    def _held_out(self) -> Sequence[Batch]:
        """The batches to measure the loss on, none where no data are."""
        config, mixture = self.config, self._measured
        if mixture is None:
            return ()

        def of(size: int) -> Batches:
            alone = replace(config, batch_size=size, micro_batches=1)
            return self._batches(mixture, alone)

        count = min(config.valid_examples, len(mixture))
        return HeldOut(of, config.batch_size, count)

    @cached_property
    def _measured(self) -> Mixture | None:
        """The rows to measure the loss on, None where there are none."""
        config = self.config
        if not config.valid and not config.valid_share:
            return None
        mixture = self._open(config.to_dict(), "valid")
        if config.valid and mixture.identity() == self._mixture.identity():
            self._say(
                "what is held out is what is learned: --valid names the same rows as "
                "--data, so that its loss says nothing of others"
            )
        return mixture

    @property
    def held_out(self) -> int:
        """How many rows the loss is measured on, or on the first of."""
        return 0 if self._measured is None else len(self._measured)

    @property
    def passes(self) -> float:
        """How often the run goes through the data."""
        examples = self.config.batch_size * self.config.micro_batches
        return self.config.steps * examples / len(self._mixture)

    @among_processes()
    def outlook(self) -> Outlook:
        """What the run would do; nothing is trained or written."""
        trainer = self._trainer()
        for _ in trainer.valid:
            # Made, so that a row that cannot be used is met now.
            pass
        shown = preview(self._made, self._tokenizer)
        batch = shown.longest // self.config.batch_size
        trainer.judge(self._made(*divmod(batch, self.config.micro_batches)))
        return Outlook(
            self.config,
            self.passes,
            self.held_out,
            counts(trainer.model),
            shown,
            trainer.forecast(),
        )

    @among_processes()
    def run(
        self,
        report: Callable[[dict[str, Any]], None],
        expect: Callable[[dict[str, Any]], None] | None = None,
        begun: Callable[[Trainer[MM1, Batch]], None] = lambda _: None,
        watch: Callable[[Moment], None] = lambda _: None,
    ) -> Path | None:
        """Train, and write what was made; None where the run was stopped before its end.

        Args:
            report: receives every log line.
            expect: receives the forecast before the first step.
            begun: receives the trainer, whose ``stop`` ends the run.
            watch: receives where the run is, at every step and held-out batch.

        Raises:
            MM1Error: what ``Trainer`` raises; another run is at work in the folder;
                another process of the run has ended.
        """
        maybe_set_recommended_wired_limit()
        with self._held():
            trainer = self._trainer()
            first = trainer.group.rank() == 0
            if first:
                self._check_room(trainer)
            begun(trainer)
            try:
                whole = trainer.run(report, expect, watch)
            finally:
                if first:
                    self._draw()
            made = self.out / (MODEL if self.config.adapter == "none" else ADAPTER)
            if whole and first:
                self._write(trainer.model, made)
            return made if whole else None

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The run's folder, which no other run works in meanwhile."""
        if mx.distributed.init().rank():
            yield
            return
        hold = Hold(self.out)
        try:
            yield
        finally:
            hold.release()

    def _draw(self) -> None:
        """Draw the log as it is, where the disk takes it: a run has no need of it."""
        with suppress(OSError):
            draw_curve(read_log(self.out), self.out / CURVE)

    def _check_room(self, trainer: Trainer[MM1, Batch]) -> None:
        """Pass only if what the run leaves can be written, before it takes hours.

        Raises:
            CheckpointError: it cannot, or something else stands in the model's place.
        """
        whole = self.config.adapter == "none"
        if whole:
            check_place(self.out / MODEL, overwrite=True)
            tensors = self._original.tensors().values()
            made = sum(x.nbytes for x in tensors)
        else:
            weights: Any = tree_flatten(trainer.model.trainable_parameters())
            made = sum(x.nbytes for _, x in weights)
        check_room(
            self.out,
            trainer.checkpoint_bytes,
            made,
            f"the {'model' if whole else 'adapter'} itself",
        )

    def _write(self, model: MM1, made: Path) -> None:
        """Write what was trained: the adapter, or the model with it."""
        training: dict[str, Any] = {
            "stage": self.config.stage,
            "steps": self.config.steps,
            "learning_rate": self.config.learning_rate,
            "data": list(self.config.data),
        }
        if self.config.resolution:
            training[adapters.RESOLUTION] = self.config.resolution
        if self.config.adapter != "none":
            adapter = adapters.Adapter.of(
                model,
                adapter_config(self.config),
                adapters.base_of(self.path),
                training,
            )
            adapters.save(made, adapter, overwrite=True)
            return
        trained = adapters.tensors_of(model)
        tensors = self._original.tensors()
        with CheckpointWriter(
            made,
            self.model_config,
            self._original.source(trained) | {"trained": training},
            packed=self._packed,
            overwrite=True,
            size=sum(x.nbytes for x in tensors.values()),
        ) as writer:
            for name in list(tensors):
                tensor = tensors.pop(name)
                if name in trained:
                    tensor = Deferred.of(
                        self._stored(name, trained[name], tensor.dtype)
                    )
                writer.add(name, tensor)
            for name, path in self._original.kept.items():
                writer.add_file(name, path)

    def _stored(self, name: str, tensor: mx.array, dtype: mx.Dtype) -> mx.array:
        """What was trained, in the type that the model had it in if that can hold it."""
        cast, overflows = cast_overflowing(dtype, tensor)
        if not overflows.item():
            return cast
        self._say(
            f"{name} holds numbers too large for {dtype}; it stays {tensor.dtype}"
        )
        return tensor


def _precision() -> str:
    """The type that all processes' devices compute quickly and the first one prefers."""
    own = [str(kind).rpartition(".")[2] for kind in device_dtypes()]
    first, *others = map(json.loads, all_texts(json.dumps(own)))
    common = (kind for kind in first if all(kind in x for x in others))
    return next(common, "float32")


def law_parameters(config: MM1Config) -> int:
    """A decoder's parameters as the paper's law counts them.

    Without embeddings, and of experts one: the paper trains its sparse models as the
    dense ones that they were made from.
    """
    if config.decoder is None:
        return 1
    count = 0
    for name, x in MM1(MM1Config(decoder=config.decoder)).tensors().items():
        if "embed_tokens" in name or "lm_head" in name or name.endswith("gate.weight"):
            continue
        count += x.size // (x.shape[0] if ".switch_mlp." in name else 1)
    return count


def _continued(
    out: Path, given: Mapping[str, Any]
) -> tuple[dict[str, Any], TrainConfig | None]:
    """What is given, now or when a run was begun in the folder, and that run's config.

    The config is None where no run can be continued. Of several processes the first
    one looks.

    Raises:
        ConfigError, CheckpointError: the folder's record cannot be used, or what a run
            has made stands there and no checkpoint to go on from.
    """
    settings: dict[str, Any] = {}
    first = mx.distributed.init().rank() == 0
    if first and not saved_steps(out):
        for made in (out / ADAPTER, out / MODEL):
            if made.exists():
                raise ConfigError(
                    f"{made} stands, and no checkpoint to go on from: a new run would "
                    f"overwrite it; choose another folder than {out}, or move it away"
                )
        if not is_record(out / RECORD):
            for other in (out / RECORD, out / LOG, out / CURVE):
                if other.exists():
                    raise ConfigError(
                        f"{other} stands, and is of no training run: one would overwrite "
                        f"it; choose another folder than {out}"
                    )
    elif first:
        then = read_settings(out / RECORD)
        if then.config:
            settings = {"given": then.given, "config": then.config.to_dict()}
    settings = json.loads(first_text(json.dumps(settings)))
    if not settings:
        return dict(given), None
    given = merged(settings["given"], given)
    check_given(given)
    return given, TrainConfig.from_dict(settings["config"])


class HeldOut(Sequence[Batch]):
    """Batches of the first examples, made when they are asked for.

    Args:
        of: makes batches of so many examples.
        size: examples of a batch; the rest, too few for one, come one by one.
        count: examples of all together.
    """

    def __init__(self, of: Callable[[int], Batches], size: int, count: int) -> None:
        self._whole, self._single = of(size), of(1)
        self._batches, rest = divmod(count, size)
        self._first, self._count = self._batches * size, self._batches + rest

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index < self._batches:
            return self._whole(index, 0)
        return self._single(self._first + index - self._batches, 0)


def _trainable_config(base: MM1Config, config: TrainConfig) -> MM1Config:
    """The model's config in the run's resolution.

    Raises:
        ConfigError: the model cannot be trained, or has not the resolution.
    """
    if base.decoder is None or base.prompt is None:
        lacking = "decoder" if base.decoder is None else "prompt format"
        raise ConfigError(
            f"the model has no {lacking}, so it cannot be trained; convert a model that "
            "answers"
        )
    return with_resolution(base, config.resolution) if config.resolution else base
