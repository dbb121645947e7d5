"""A model folder into one whose weights are packed, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.checkpoint import device_dtype, load_config, load_model
from mm1_mlx.config import MM1Config, QuantizationConfig
from mm1_mlx.errors import CheckpointError, ConfigError, MemoryLimitError
from mm1_mlx.models import MM1
from mm1_mlx.original import Original
from mm1_mlx.prompt import Prompt
from mm1_mlx.quantize import shapes
from mm1_mlx.quantize.calibration import Example, examples
from mm1_mlx.quantize.cost import Cost, Reference, ask, measure
from mm1_mlx.quantize.distil import EPOCHS, distil
from mm1_mlx.quantize.needs import check_memory, learning_bytes, measuring_bytes
from mm1_mlx.quantize.pack import assemble, pack_deferred
from mm1_mlx.quantize.shapes import QUESTIONS, Accuracy
from mm1_mlx.recipe import COMPONENTS, Plan, Recipe, component_of, plan
from mm1_mlx.shard import Deferred
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.writer import CheckpointWriter, check_place, check_space

# Prompts that are asked; a quarter of them measures.
MEASURED, LEARNED = 32, 128

# Told what is done, how much of it and of how much.
Progress = Callable[[str, int, int], None]


@dataclass
class Row:
    """A component before and after.

    Attributes:
        parameters: how many it has.
        bits: of every way that its packed modules have, by their number of parameters.
        before: bytes that it took.
        after: bytes that it takes.
    """

    parameters: int = 0
    bits: Counter[str] = field(default_factory=Counter)
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        out: the model's folder.
        rows: by component.
        uneven: modules whose width no group size divides; they stay as they are.
        cost: what it costs, None if that was not measured.
        rounded: what it would cost without learned scales, None if none were asked for.
        accuracy: of mm1-tiny's own questions, before and after; None for other models.
        unmeasured: why the cost was not measured though it was to be, None if it was.
        learned: whether scales were learned; not where they cost more than rounded ones.
    """

    out: Path
    rows: dict[str, Row]
    uneven: tuple[str, ...]
    cost: Cost | None
    rounded: Cost | None
    learned: bool
    accuracy: tuple[Accuracy, Accuracy] | None = None
    unmeasured: str | None = None


def quantize(
    path: Path,
    out: Path,
    recipe: Recipe,
    *,
    learned: bool = False,
    calibration: Path | None = None,
    count: int | None = None,
    epochs: int = EPOCHS,
    measured: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Report:
    """Write a packed copy of a model folder, and say what it costs.

    The weights pass in pieces. To measure, or to learn scales, the model runs before and
    its packed copy after; the two are never in memory together.

    Args:
        path: the model's folder.
        out: the folder to write.
        recipe: how each component is packed.
        learned: whether scales are learned (``distil.py``).
        calibration: prompts and pictures, None for those built in (``calibration.py``).
        count: how many of them, a quarter to measure by; at least 4.
        epochs: how often each is learned from.
        measured: whether the cost is measured, if there is memory to run the model.
        overwrite: whether an existing ``out`` is replaced.
        progress: told what is under way.

    Raises:
        CheckpointError: the model is packed already or damaged, or ``out`` is taken, the
            model itself or without room.
        ConfigError: there is nothing that the recipe packs, or nothing to learn.
        PromptError: the calibration's prompts do not fit the model, or are too few; or
            there is no memory to learn.
    """
    check_place(out, overwrite=overwrite, sources=[path])
    config = load_config(path)
    if config.quantization:
        raise CheckpointError(
            f"{path} is packed already, {config.quantization.bits}-bit; quantize the "
            "model that it was made from"
        )
    made = plan(recipe, config)
    answers = config.decoder is not None and config.prompt is not None
    if learned and not (
        answers
        and any(
            p.startswith("decoder.") and way.mode == "affine"
            for p, way in made.packed.items()
        )
    ):
        raise ConfigError(
            "there are no scales to learn: learning needs a decoder that answers, packed "
            "in the affine mode; leave out --learned"
        )
    job = _Job(path, config, made, progress)
    rows = job.rows()
    # Before hours are spent on what would not fit.
    check_space(out, sum(row.after for row in rows.values()))
    asked, unmeasured = None, None
    if answers and (measured or learned):
        try:
            asked = job.ask(calibration, count, learned=learned)
        except MemoryLimitError as error:
            if learned:
                raise
            unmeasured = str(error)
    replaced: dict[str, mx.array] = {}
    rounded = None
    if learned:
        assert asked is not None
        assert asked.training is not None
        replaced, rounded = job.learn(asked.training, asked.held_out, epochs)
    source = {
        "quantized": {
            "recipe": recipe.name,
            "learned": bool(replaced),
            "calibration": (calibration.name if calibration else "built in")
            if learned
            else None,
        }
    }
    job.write(out, source, replaced, overwrite=overwrite)
    cost = accuracy = None
    if asked:
        said = job.counter("measuring", len(asked.held_out.samples))
        model = load_model(out, device_dtype)
        cost = measure(model, asked.held_out, said)
        if asked.accuracy:
            accuracy = asked.accuracy, job.score(model, "answering again")
    return Report(
        *(out, rows, made.uneven, cost, rounded, bool(replaced)),
        accuracy=accuracy,
        unmeasured=unmeasured,
    )


@dataclass(frozen=True)
class _Asked:
    """What the unpacked model says.

    Attributes:
        training: on what is learned from, None if nothing is.
        held_out: on what is measured by.
        accuracy: of mm1-tiny's own questions, None if it is another model.
    """

    training: Reference | None
    held_out: Reference
    accuracy: Accuracy | None


@dataclass(frozen=True)
class _Job:
    """A model that is being packed."""

    path: Path
    config: MM1Config
    plan: Plan
    progress: Progress

    @cached_property
    def original(self) -> Original:
        """The unpacked model's folder."""
        return Original(self.path)

    @property
    def made(self) -> MM1Config:
        """The config of what is written."""
        ways = QuantizationConfig.of_modules(self.plan.packed)
        return replace(self.config, quantization=ways)

    def counter(self, task: str, total: int) -> Callable[[], None]:
        """A function that says one more of them is done."""
        done = iter(range(1, total + 1))
        return lambda: self.progress(task, next(done), total)

    def ask(
        self, calibration: Path | None, count: int | None, *, learned: bool
    ) -> _Asked:
        """What the unpacked model says, before it is gone.

        Raises:
            MemoryLimitError: there is no room to run it, or for what is kept of it.
        """
        if count is None:
            count = LEARNED if learned else MEASURED
        train, held_out = (
            [self._build(x) for x in part]
            for part in examples(calibration, count, sees=self.config.sees)
        )
        train = train if learned else []
        self._check_memory([*held_out, *train], learned=learned)
        model, tokenizer = load_model(self.path, device_dtype), self._tokenizer

        def asked(prompts: list[Prompt], task: str) -> Reference:
            return ask(model, tokenizer, prompts, self.counter(task, len(prompts)))

        return _Asked(
            asked(train, "asking to learn") if learned else None,
            asked(held_out, "asking"),
            self.score(model, "answering") if self._is_tiny else None,
        )

    def _check_memory(self, prompts: list[Prompt], *, learned: bool) -> None:
        """Pass only if there is room to ask the unpacked model, and then to learn."""
        needs = measuring_bytes(self.config, dict(self._tensors()), prompts)
        fewer = "a smaller --count, or leave out --learned"
        what = "learning" if learned else "measuring"
        check_memory(what, needs, f"give {fewer}" if learned else "nothing is measured")
        if learned:
            packed = dict(self._packed_tensors())
            needs = learning_bytes(self.config, packed, self.plan.packed, prompts)
            check_memory(what, needs, f"give {fewer}")

    def _build(self, example: Example) -> Prompt:
        return Prompt.build(
            example.prompt, example.pictures, self.config, self._tokenizer
        )

    @property
    def _is_tiny(self) -> bool:
        """Whether the model is mm1-tiny, or one that was made of it."""
        named = self.original.source().get("name") == shapes.MODEL
        return named and self.config.sees

    def score(self, model: MM1, task: str) -> Accuracy:
        """How many of mm1-tiny's own questions a model answers right."""
        said = self.counter(task, QUESTIONS)
        return shapes.score(model, self._tokenizer, QUESTIONS, said)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        assert self.config.prompt is not None
        regions = self.config.region is not None
        return load_tokenizer(self.path, self.config.prompt, regions=regions)

    def learn(
        self, training: Reference, reference: Reference, epochs: int
    ) -> tuple[dict[str, mx.array], Cost]:
        """Scales and biases that cost less than the rounded ones, and what those cost.

        None where learning helped nothing.
        """
        model = self._packed_model()
        stored = {name: x.dtype for name, x in self._packed_tensors()}
        rounded = measure(model, reference)
        total = epochs * len(training.samples)
        learned = distil(
            model,
            training,
            stored=stored,
            epochs=epochs,
            progress=self.counter("learning", total),
        )
        better = measure(model, reference).kl_mean < rounded.kl_mean
        return (learned if better else {}), rounded

    def _packed_model(self) -> MM1:
        """The packed model, weights rounded, in the device's precision."""
        return assemble(self.made, self.plan.packed, self._packed_tensors())

    def _tensors(self) -> Iterator[tuple[str, Deferred]]:
        """The unpacked model's; none is read."""
        yield from self.original.tensors().items()

    def _packed_tensors(self) -> Iterator[tuple[str, Deferred]]:
        """The packed model's, rounded when they are asked for."""
        return pack_deferred(self._tensors(), self.plan.packed)

    def write(
        self,
        out: Path,
        source: dict[str, Any],
        replaced: Mapping[str, mx.array],
        *,
        overwrite: bool,
    ) -> None:
        """Write the folder, with ``replaced`` tensors."""
        source = self.original.source() | source
        tensors = dict(self._packed_tensors())
        for name, tensor in replaced.items():
            tensors[name] = Deferred.of(tensor.astype(tensors[name].dtype))
        with CheckpointWriter(
            out,
            self.made,
            source,
            packed=self.plan.packed,
            overwrite=overwrite,
            size=sum(x.nbytes for x in tensors.values()),
            # Learning again would give other scales.
            fingerprint=None
            if replaced
            else self.original.fingerprint(self.made, source, tensors),
            progress=lambda done, total: self.progress("writing", done, total),
        ) as writer:
            for name in list(tensors):
                # Popped, so that a tensor that was written is freed.
                writer.add(name, tensors.pop(name))
            for name, path in self.original.kept.items():
                writer.add_file(name, path)

    def rows(self) -> dict[str, Row]:
        """The components before and after, from shapes alone."""
        rows = {component: Row() for component in COMPONENTS}
        for name, tensor in self._tensors():
            path, _, leaf = name.rpartition(".")
            row = rows[component_of(path)]
            row.parameters += prod(tensor.shape)
            row.before += tensor.nbytes
            if leaf == "weight" and (way := self.plan.packed.get(path)):
                word = f"{way.bits}" if way.mode == "affine" else way.mode
                row.bits[word] += prod(tensor.shape)
        for name, tensor in self._packed_tensors():
            rows[component_of(name.rpartition(".")[0])].after += tensor.nbytes
        return {name: row for name, row in rows.items() if row.parameters}
