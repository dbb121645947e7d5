"""A model and its adapters as one model, tensor by tensor, and what that costs.

Into 16 bits or more little is lost: sums are made in float32 and rounded once. A packed
weight rounds coarser than many an adapter changes it; so what an adapter changes of a
packed model is kept unpacked, unless packing is asked for, and then it is measured what is
left of the adapter before anything is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.adapters import Adapters, base_of, load_adapted
from mm1_mlx.adapters.attach import Form
from mm1_mlx.checkpoint import (
    build_model,
    cast_overflowing,
    cast_to,
    device_dtype,
    load_config,
    load_model,
    packed_on_disk,
)
from mm1_mlx.config import MM1Config, Packing, QuantizationConfig
from mm1_mlx.errors import CheckpointError, ConfigError, MemoryLimitError
from mm1_mlx.models import MM1
from mm1_mlx.original import Original
from mm1_mlx.pieces import TensorInfo, row_blocks
from mm1_mlx.prompt import Prompt
from mm1_mlx.quantize.calibration import examples
from mm1_mlx.quantize.cost import Cost, Reference, ask, measure, predict
from mm1_mlx.quantize.needs import check_memory, measuring_bytes
from mm1_mlx.quantize.pack import assemble, pack_deferred
from mm1_mlx.recipe import Recipe, plan
from mm1_mlx.resolution import with_resolution
from mm1_mlx.shard import Deferred
from mm1_mlx.tokenizer import load_tokenizer
from mm1_mlx.writer import CheckpointWriter, check_place, check_space

# Without a handler Python prints a warning's text on stderr, and nothing else.
logger = logging.getLogger("mm1_mlx")
# Prompts that are asked to measure.
MEASURED = 24
# The share of an adapter's effect that may be lost unless it is allowed.
MAX_LOST = 0.1
# Nats of divergence below which an adapter has no effect to speak of: of mm1-tiny's
# predictions rounding to float16 makes 1e-7, to bfloat16 1e-5.
NO_EFFECT = 1e-5

# Told what is done, how much of it and of how much.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """How far the fused model is from the one with adapters beside its weights.

    Attributes:
        cost: its predictions' divergence from that one's.
        effect: the same of the model without adapters: what they change.
        largest: the largest difference of a logit.
        mean: and the mean.
        scale: the largest logit, of either sign.
    """

    cost: Cost
    effect: Cost
    largest: float
    mean: float
    scale: float

    @property
    def lost(self) -> float | None:
        """The share of the adapters' effect that is lost; None if there is none here.

        0 where the fused model predicts as the one with adapters, 1 where it is as far
        from that as the model without, or farther.
        """
        if self.effect.kl_mean < NO_EFFECT:
            return None
        return min(max(0.0, self.cost.kl_mean / self.effect.kl_mean), 1.0)


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        out: the model's folder.
        before: bytes that the model's weights took.
        after: and take.
        changed: how many weights the adapters change.
        unpacked: paths of the layers that were packed and no longer are.
        measured: what it costs, None if that was not measured.
        unmeasured: why it was not, None if it was, or was not to be.
    """

    out: Path
    before: int
    after: int
    changed: int
    unpacked: tuple[str, ...]
    measured: Measured | None
    unmeasured: str | None = None


def fuse(
    path: Path,
    out: Path,
    adapters: Adapters,
    *,
    recipe: Recipe | None = None,
    dtype: mx.Dtype | None = None,
    resolution: str | None = None,
    calibration: Path | None = None,
    count: int = MEASURED,
    measured: bool = True,
    allow_loss: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Report:
    """Write a model folder that computes what another does with adapters.

    Says, through ``logging``, which of them was trained on another model. Of a packed
    model, what the adapters do not change stays as it is, to the bit. Three models run
    to measure, never two at once: with adapters, without, and the fused one.

    Args:
        path: the model's folder.
        out: the folder to write.
        adapters: what changes it.
        recipe: how the weights are packed, of a packed model those that change; None to
            keep them, and those that change unpacked.
        dtype: of all that is not packed; by default each as it is stored, and what was
            packed in the type of its scales.
        resolution: a mode for pictures, by default the one that the adapters learned from,
            or else the model's own.
        calibration: prompts and pictures to measure by, None for those built in.
        count: how many of them; at least 4.
        measured: whether the cost is measured, if there is memory to run the model.
        allow_loss: whether more than ``MAX_LOST`` of the adapters' effect may be lost,
            or a share that is not known: packed, and not measured, or only on prompts
            on which they do nothing.
        overwrite: whether an existing ``out`` is replaced.
        progress: told what is under way.

    Raises:
        CheckpointError: the model or an adapter does not fit or is damaged, ``out`` is
            taken, the model itself or without room, or too much of the effect would be lost.
        ConfigError: there is no adapter, or nothing that the recipe packs.
        PromptError: the calibration's prompts do not fit the model, or are too few.
    """
    check_place(out, overwrite=overwrite, sources=[path])
    if not adapters.given:
        raise ConfigError("there is nothing to fuse; name an adapter")
    config = load_config(path)
    if mode := adapters.resolution(resolution):
        config = with_resolution(config, mode)
    job = _Job(path, config, adapters, recipe, dtype)
    if not measured and not allow_loss:
        _check_known(job, "nothing is to be measured")
    for doubt in adapters.doubts(base_of(path)):
        logger.warning(doubt)
    after = sum(x.nbytes for _, x in job.tensors())
    check_space(out, after)
    found: Measured | None = None
    unmeasured = None
    if measured and job.config.decoder and job.config.prompt:
        try:
            found = job.measure(calibration, count, progress)
        except MemoryLimitError as error:
            unmeasured = str(error)
    elif measured:
        unmeasured = f"{path} answers nothing, so nothing is measured"
    if not allow_loss and found:
        _check_loss(job, found)
    elif not allow_loss and unmeasured:
        _check_known(job, unmeasured)
    job.write(out, overwrite=overwrite, progress=progress)
    return Report(
        out=out,
        before=sum(x.deferred().nbytes for x in job.stored.values()),
        after=after,
        changed=len({f"{path}.weight" for path in adapters.layers} | adapters.full),
        unpacked=tuple(sorted(set(job.packed) - set(job.ways))),
        measured=found,
        unmeasured=unmeasured,
    )


def _check_loss(job: _Job, measured: Measured) -> None:
    """Pass only if packing rounds little of the adapters' effect away.

    Raises:
        CheckpointError: too much is, or the prompts show no effect to lose.
    """
    lost = measured.lost
    if lost is None:
        _check_known(
            job,
            "on the prompts asked they move predictions by but "
            f"{measured.effect.kl_mean:.2g} nats",
            "measure by prompts of the adapters' task (--calibration), ",
        )
        return
    if not job.coarser or lost <= MAX_LOST:
        return
    # Rounded twice, weights lose more than twice as much.
    more = "fuse the model that this was quantized from, " if job.packed else ""
    raise CheckpointError(
        f"{lost:.1%} of what the adapters change would be lost, more than "
        f"{MAX_LOST:.0%} (predictions move by {measured.effect.kl_mean:.2g} nats, "
        f"and the fused model's are {measured.cost.kl_mean:.2g} off); leave out the "
        f"bits, for 16, {more}measure by prompts of the adapters' task (--calibration), "
        "or pass --allow-loss"
    )


def _check_known(job: _Job, why: str, better: str = "") -> None:
    """Pass without a measurement only if packing rounds nothing of the adapters' away.

    Raises:
        CheckpointError: it may.
    """
    if job.coarser:
        raise CheckpointError(
            f"how much of what the adapters change would be lost by packing "
            f"{len(job.coarser)} of their weights is not known: {why}; {better}leave "
            "out the bits, for 16, or pass --allow-loss"
        )


@dataclass(frozen=True)
class _Job:
    """A model that is being fused, checked by names and shapes."""

    path: Path
    config: MM1Config
    adapters: Adapters
    recipe: Recipe | None
    dtype: mx.Dtype | None

    @cached_property
    def packed(self) -> dict[str, Packing]:
        """How the model's modules are packed, by path."""
        return packed_on_disk(self.path, self.config)

    @cached_property
    def ways(self) -> dict[str, Packing]:
        """How the fused model's are."""
        kept = {p: x for p, x in self.packed.items() if p not in self.adapters.layers}
        return kept | self.rounded

    @cached_property
    def rounded(self) -> dict[str, Packing]:
        """Those of them that are packed here: of a packed model what has changed."""
        if self.recipe is None:
            return {}
        chosen = plan(self.recipe, replace(self.config, quantization=None)).packed
        if not self.packed:
            return chosen
        return {p: way for p, way in chosen.items() if p in self.adapters.layers}

    @property
    def coarser(self) -> set[str]:
        """The layers that adapters change and that are packed here."""
        full = {name.rpartition(".")[0] for name in self.adapters.full}
        return set(self.rounded) & (self.adapters.layers | full)

    @property
    def made(self) -> MM1Config:
        """The config of what is written."""
        ways = QuantizationConfig.of_modules(self.ways) if self.ways else None
        return replace(self.config, quantization=ways)

    @cached_property
    def original(self) -> Original:
        """The model's folder."""
        return Original(self.path)

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """The model's tensors; none is read."""
        return self.original.stored

    @cached_property
    def forms(self) -> dict[str, Form]:
        """How the adapters' matrices are laid out, by path; they fit the model."""
        return self.adapters.check(build_model(self.config, self.packed))

    def tensors(self) -> Iterator[tuple[str, Deferred]]:
        """The fused model's, made when they are asked for."""
        return pack_deferred(self._fused(), self.rounded)

    def _fused(self) -> Iterator[tuple[str, Deferred]]:
        """The same before they are packed."""
        for name, tensor in self.stored.items():
            path, _, leaf = name.rpartition(".")
            if path in self.forms and path in self.packed and leaf != "weight":
                if leaf == "bias":
                    yield name, self._cast(name, tensor.deferred())
                continue
            if name in self.adapters.full or (path in self.forms and leaf == "weight"):
                yield name, self._cast(name, self._changed(name, path, tensor))
            elif path in self.ways and leaf in ("scales", "biases"):
                # Of a layer that stays packed: to round them would change its weights.
                yield name, tensor.deferred()
            else:
                yield name, self._cast(name, tensor.deferred())

    def _changed(self, name: str, path: str, tensor: TensorInfo) -> Deferred:
        """A weight with what the adapters change, in the type that it is stored in."""
        shape, dtype = tensor.shape, tensor.dtype
        if path in self.packed:
            scales = self.stored[f"{path}.scales"].dtype
            dtype = scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16
            shape = (*shape[:-1], shape[-1] * 32 // self.packed[path].bits)

        kind = self.dtype or dtype

        def pieces() -> Iterator[mx.array]:
            for rows in row_blocks(shape):
                if path in self.packed:
                    weight = self._unpacked(path, rows)
                else:
                    weight = tensor.read(rows)
                if name in self.adapters.full:
                    weight = self.adapters.replaced(name, weight, rows)
                if path in self.forms:
                    weight = self.adapters.fused(path, self.forms[path], weight, rows)
                yield _fitting(name, kind, weight)

        return Deferred(shape, kind, pieces)

    def _unpacked(self, path: str, rows: slice) -> mx.array:
        """Rows of a packed layer's weight, in float32."""
        read = {
            leaf: self.stored[f"{path}.{leaf}"].read(rows)
            for leaf in ("weight", "scales", "biases")
            if f"{path}.{leaf}" in self.stored
        }
        # Before, not behind: products of halves are rounded to halves.
        read = {leaf: cast_to(mx.float32, tensor) for leaf, tensor in read.items()}
        way: dict[str, Any] = self.packed[path].to_dict()
        packed = (read["weight"], read["scales"], read.get("biases"))
        return mx.dequantize(*packed, **way, dtype=mx.float32)

    def _cast(self, name: str, tensor: Deferred) -> Deferred:
        floating = mx.issubdtype(tensor.dtype, mx.floating)
        if self.dtype is None or tensor.dtype == self.dtype or not floating:
            return tensor
        return tensor.map(partial(_fitting, name, self.dtype))

    def measure(
        self, calibration: Path | None, count: int, progress: Progress
    ) -> Measured:
        """What fusing costs.

        Raises:
            MemoryLimitError: there is no room to run the model.
        """
        assert self.config.prompt is not None
        regions = self.config.region is not None
        tokenizer = load_tokenizer(self.path, self.config.prompt, regions=regions)
        # Nothing is learned from them: all measure.
        prompts = [
            Prompt.build(x.prompt, x.pictures, self.config, tokenizer)
            for part in examples(calibration, count, sees=self.config.sees)
            for x in part
        ]
        needs = measuring_bytes(self.config, self.original.tensors(), prompts)
        check_memory("measuring", needs, "nothing is measured")

        def said(task: str) -> Callable[[], None]:
            done = iter(range(1, len(prompts) + 1))
            return lambda: progress(task, next(done), len(prompts))

        adapted = load_adapted(self.path, self.adapters, device_dtype, beside=True)
        # At the resolution that was learned from, which the folder's own may not be.
        adapted.config = self.config
        reference = ask(adapted, tokenizer, prompts, said("asking"))
        del adapted
        plain = load_model(self.path, device_dtype)
        plain.config = self.config
        effect = measure(plain, reference, said("without adapters"))
        del plain
        fused = assemble(self.made, self.ways, self.tensors())
        cost = measure(fused, reference, said("fused"))
        return Measured(cost, effect, *_differences(fused, reference))

    def write(self, out: Path, *, overwrite: bool, progress: Progress) -> None:
        """Write the folder."""
        source = self.original.source(self.adapters.full)
        if self.recipe is not None:
            source["quantized"] = {"recipe": self.recipe.name}
        elif not self.ways:
            source.pop("quantized", None)
        before = source.get("fused")
        source["fused"] = [
            *(before if isinstance(before, list) else []),
            *(
                {
                    "adapter": Path(adapter.name).name,
                    "digest": adapter.digest,
                    "scale": scale,
                    "trained_on": adapter.base.to_dict(),
                    "into": base_of(self.path).to_dict(),
                }
                for adapter, scale in self.adapters.given
            ),
        ]
        tensors = dict(self.tensors())
        with CheckpointWriter(
            out,
            self.made,
            source,
            packed=self.ways,
            overwrite=overwrite,
            size=sum(x.nbytes for x in tensors.values()),
            fingerprint=self.original.fingerprint(self.made, source, tensors),
            progress=lambda done, total: progress("writing", done, total),
        ) as writer:
            for name in list(tensors):
                # Popped, so that a tensor that was written is freed.
                writer.add(name, tensors.pop(name))
            for name, file in self.original.kept.items():
                writer.add_file(name, file)


def _fitting(name: str, dtype: mx.Dtype, tensor: mx.array) -> mx.array:
    """A tensor in ``dtype``.

    Raises:
        CheckpointError: a number is too large for it.
    """
    cast, overflows = cast_overflowing(dtype, tensor)
    if overflows.item():
        raise CheckpointError(
            f"{name} holds numbers too large for {dtype}; pass --dtype bfloat16"
        )
    return cast


def _differences(model: MM1, reference: Reference) -> tuple[float, float, float]:
    """Of the logits: the largest difference, the mean one, and the largest logit."""
    largest = total = scale = 0.0
    count = 0
    for sample, expected in zip(reference.samples, reference.logits, strict=True):
        apart = mx.abs(predict(model, sample) - expected)
        largest = max(largest, float(apart.max()))
        scale = max(scale, float(mx.abs(expected).max()))
        total += float(apart.sum())
        count += apart.size
    return largest, total / count, scale
