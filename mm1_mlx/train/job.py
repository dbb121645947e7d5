"""``mm1 train``: a model folder and data into an adapter or a better model.

What a run leaves in its folder:

    run.json        what it is made of
    log.jsonl       a line every few steps
    loss.png        the log, drawn
    step-000200/    where it stands, the last two
    adapter/        in the end what was trained, if adapters were; else
    model/          the whole model
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mm1_mlx import adapters
from mm1_mlx.checkpoint import (
    CONFIG,
    INDEX,
    MANIFEST,
    device_dtypes,
    load_config,
    load_manifest,
    load_model,
    packed_on_disk,
)
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import ConfigError
from mm1_mlx.files import safe_join
from mm1_mlx.hold import Hold
from mm1_mlx.models import MM1
from mm1_mlx.pieces import tensors_of
from mm1_mlx.resolution import with_resolution
from mm1_mlx.shard import Deferred
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.train.config import PARTS, TrainConfig
from mm1_mlx.train.curve import draw_curve
from mm1_mlx.train.data.batches import Batches
from mm1_mlx.train.data.mixture import Mixture, open_mixture
from mm1_mlx.train.data.preview import Preview, preview
from mm1_mlx.train.loss import next_token_loss, sparse_loss
from mm1_mlx.train.sample import Batch
from mm1_mlx.train.stages import Stage, check_given, plan
from mm1_mlx.train.trainable import adapter_config, counts, make_trainable
from mm1_mlx.train.trainer import Loss, Trainer, read_log
from mm1_mlx.writer import CheckpointWriter, check_place, check_space

ADAPTER, MODEL, CURVE = "adapter", "model", "loss.png"
# What is said of the model as it was.
LEFT = (CONFIG, INDEX, MANIFEST, "parity.json")
# Told in a line what was passed over or mended.
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outlook:
    """What a run would do.

    Attributes:
        config: its settings, defaults filled in.
        parts: by part how many numbers are trained, and how many there are.
        preview: of the data.
        forecast: of a step: ``tokens``, ``bytes``, ``least_seconds``.
    """

    config: TrainConfig
    parts: Mapping[str, tuple[int, int]]
    preview: Preview
    forecast: Mapping[str, Any]


class Job:
    """A run of a stage on a model folder.

    Args:
        path: the model's folder.
        out: the run's.
        stage: which command it is of.
        given: fields of ``TrainConfig``; the rest is as the stage has it.
        full: whether the supervised stage trains everything.
        say: told what was passed over or mended.

    Raises:
        MM1Error: the model, the data or the settings cannot be used.
    """

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
        check_given(given)
        base = load_config(path)
        mixture = self._open(given, "train")
        self._packed = packed_on_disk(path, base)
        self.config = plan(
            stage,
            given,
            full=full,
            rows=len(mixture),
            parts=[part for part in PARTS if getattr(base, part)],
            packed={name.partition(".")[0] for name in self._packed},
            parameters=law_parameters(base),
            precision=str(device_dtypes()[0]).rpartition(".")[2],
        )
        self.model_config = _trainable_config(base, self.config)
        self._mixture = mixture
        self._made = self._batches(mixture, self.config)

    def _open(self, given: Mapping[str, Any], part: Any) -> Mixture:
        """The data to learn from, or to measure by."""

        def of(name: str, default: Any = None) -> Any:
            return given.get(name, default)

        places = {
            name: Path(of(name)) if of(name) else None
            for name in ("data_root", "image_folder")
        }
        names = of("data", ())
        if part == "valid" and of("valid"):
            names, part = of("valid"), "train"
        return open_mixture(
            names,
            root=places["data_root"],
            image_folder=places["image_folder"],
            outside=of("outside", False),
            seed=of("seed", 0),
            held_out=0.0 if of("valid") else of("valid_share", 0.0),
            part=part,
        )

    def _batches(self, mixture: Mixture, config: TrainConfig) -> Batches:
        return Batches(
            mixture,
            self.model_config,
            self._tokenizer,
            config,
            truncate=config.truncate,
            report=lambda error: self._say(f"passed over: {error}"),
        )

    @property
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
        model.decoder.recompute = config.checkpointing
        if "vision" in model:
            model.vision.recompute = config.checkpointing
        record = {
            "model": adapters.base_of(self.path).to_dict(),
            "data": {"rows": len(self._mixture), "digest": self._mixture.identity()},
        }
        return Trainer(
            model,
            self._loss,
            self._made,
            config,
            self.out,
            valid=self._held_out(),
            record=record,
            warn=self._say,
        )

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
        config = self.config
        if not config.valid and not config.valid_share:
            return ()
        mixture = self._open(config.to_dict(), "valid")
        size = min(config.batch_size, len(mixture))
        alone = replace(config, batch_size=size, micro_batches=1)
        count = min(config.valid_examples, len(mixture)) // size
        return HeldOut(self._batches(mixture, alone), max(1, count))

    def outlook(self) -> Outlook:
        """What the run would do; nothing is trained or written."""
        trainer = self._trainer()
        return Outlook(
            self.config,
            counts(trainer.model),
            preview(self._made, self._tokenizer),
            trainer.forecast(),
        )

    def run(
        self,
        report: Callable[[dict[str, Any]], None],
        expect: Callable[[dict[str, Any]], None] | None = None,
        begun: Callable[[Trainer[MM1, Batch]], None] = lambda _: None,
    ) -> Path | None:
        """Train, and write what was made; None where the run was stopped before its end.

        Args:
            report: receives every log line.
            expect: receives the forecast before the first step.
            begun: receives the trainer, whose ``stop`` ends the run.

        Raises:
            MM1Error: what ``Trainer`` raises; another run is at work in the folder.
        """
        maybe_set_recommended_wired_limit()
        with self._held():
            trainer = self._trainer()
            first = trainer.group.rank() == 0
            if first:
                self._check_room()
            begun(trainer)
            whole = trainer.run(report, expect)
            if first:
                draw_curve(read_log(self.out), self.out / CURVE)
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

    def _check_room(self) -> None:
        """Pass only if what the run leaves can be written, before it takes hours."""
        if self.config.adapter == "none":
            check_place(self.out / MODEL, overwrite=True)
            check_space(self.out / MODEL, sum(x.nbytes for _, x in self._stored()))

    def _stored(self) -> Iterator[tuple[str, Deferred]]:
        """The tensors of the model as it was; none is read."""
        for name in sorted(load_manifest(self.path)["files"]):
            if name.endswith(".safetensors"):
                for found, tensor in tensors_of(safe_join(self.path, name)).items():
                    yield found, tensor.deferred()

    def _write(self, model: MM1, made: Path) -> None:
        """Write what was trained: the adapter, or the model with it."""
        training = {
            "stage": self.config.stage,
            "steps": self.config.steps,
            "learning_rate": self.config.learning_rate,
            "data": list(self.config.data),
        }
        if self.config.adapter != "none":
            adapter = adapters.Adapter.of(
                model,
                adapter_config(self.config),
                adapters.base_of(self.path),
                training,
            )
            adapters.save(made, adapter, overwrite=True)
            return
        manifest = load_manifest(self.path)
        known = manifest.get("source")
        source = dict(known) if isinstance(known, dict) else {}
        # That was checked of other weights.
        source.pop("parity_checked", None)
        trained = adapters.tensors_of(model)
        tensors = dict(self._stored())
        with CheckpointWriter(
            made,
            self.model_config,
            source | {"trained": training},
            packed=self._packed,
            overwrite=True,
            size=sum(x.nbytes for x in tensors.values()),
        ) as writer:
            for name in list(tensors):
                tensor = tensors.pop(name)
                if name in trained:
                    tensor = Deferred.of(trained[name].astype(tensor.dtype))
                writer.add(name, tensor)
            for name in manifest["files"]:
                if name not in LEFT and not name.endswith(".safetensors"):
                    writer.add_file(name, safe_join(self.path, name))


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


class HeldOut(Sequence[Batch]):
    """Batches that are made when they are asked for."""

    def __init__(self, batches: Batches, count: int) -> None:
        self._made, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._made(index, 0)


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
