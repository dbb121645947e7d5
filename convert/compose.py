"""Sources to a model folder: a whole checkpoint, or parts of several put together."""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mm1_mlx.config import MM1Config
from mm1_mlx.folders import user_path
from mm1_mlx.quantize import Recipe
from mm1_mlx.resolution import with_resolution
from mm1_mlx.writer import CheckpointWriter, check_place

from .connectors import is_spec
from .detect import name_of
from .job import Job
from .origins import open_origins
from .parts import compose
from .upcycle import Upcycle

# Told the tensors written so far and their number.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        out: the model's folder.
        config: its config.
        parts: the source and format of every part that has weights.
        needs_training: the parts that were initialised, here or in a model of ours that
            they are from, and a new router.
        dropped: source tensors that the model has no use for, by source.
        has_tokenizer: whether a source brought tokenizer files.
        uneven: modules that are not packed, because no group size divides their width.
    """

    out: Path
    config: MM1Config
    parts: dict[str, tuple[str, str]]
    needs_training: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]]
    has_tokenizer: bool
    uneven: tuple[str, ...]


def convert(
    source: str | None,
    out: Path,
    *,
    vision: str | None = None,
    connector: str | None = None,
    decoder: str | None = None,
    base: str | None = None,
    resolution: str | None = None,
    upcycle: str | None = None,
    recipe: Recipe | None = None,
    dtype: mx.Dtype | None = None,
    overwrite: bool = False,
    starting: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a model folder, tensor by tensor, from foreign checkpoints.

    A source is a folder or a hub repository. ``source`` gives every part that no other
    argument does. A part may also name a preset, and ``connector`` a kind such as
    ``c-abstractor:144``: those are initialised, which seeds mlx's generator, and need
    training.

    Args:
        source: the checkpoint to convert, or None if all parts are named.
        out: the folder to write.
        vision: where the image encoder comes from instead.
        connector: where the connector comes from instead, or its kind.
        decoder: where the decoder comes from instead.
        base: what ``source`` holds differences from, as Ferret does from Vicuna.
        resolution: how pictures become tiles, a mode of ``resolution.py``; by default
            as the encoder's source has it.
        upcycle: which layers of a dense decoder become sparse, and of how many experts:
            ``experts=64,every=2``.
        recipe: how weights that are not packed yet become so; None for not at all.
        dtype: what weights are cast to; None keeps each as it is.
        overwrite: whether an existing ``out`` is replaced.
        starting: called before the first tensor, with the bytes of initialised weights.
        progress: called after every tensor.

    Raises:
        CheckpointError: a source cannot be had, read, or understood; or the disk has
            too little room.
        ConfigError: the parts do not fit together, or cannot be upcycled.
    """
    plan = Upcycle.parse(upcycle) if upcycle is not None else None
    chosen = {"vision": vision, "connector": connector, "decoder": decoder}
    spec = connector if connector and is_spec(connector) else None
    if spec:
        del chosen["connector"]
    named = (user_path(name) for name in (source, base, *chosen.values()) if name)
    check_place(out, overwrite=overwrite, sources=named)
    with ExitStack() as stack:
        origins = open_origins(chosen, source, stack, base, out.resolve())
        config = compose(origins, spec)
        if resolution is not None:
            config = with_resolution(config, resolution)
        job = Job(config, origins, plan, recipe)
        files = job.tokenizer_files()
        rounded = {"quantized": {"recipe": recipe.name}} if recipe else {}
        tensors = dict(job.tensors(dtype))
        sizes: Counter[str] = Counter()
        for name, tensor in tensors.items():
            sizes[name.partition(".")[0]] += tensor.nbytes
        with CheckpointWriter(
            out,
            job.made,
            job.lineage.to_dict() | rounded,
            packed=job.packed,
            overwrite=overwrite,
            size=sizes.total(),
            fingerprint=job.fingerprint(tensors),
            progress=progress,
        ) as writer:
            if starting:
                starting(sum(sizes[part] for part in job.initialised))
            for name in list(tensors):
                # Popped, so that a tensor that was written is freed.
                writer.add(name, tensors.pop(name))
            for name, path in files.items():
                writer.add_file(name, path)
    return _report(job, out, files)


def _report(job: Job, out: Path, files: Collection[str]) -> Report:
    """What was done, ``files`` of the tokenizer included."""
    return Report(
        out=out,
        config=job.made,
        parts={
            part: (origin.name, name_of(origin.format))
            for part, origin in job.sourced.items()
        },
        needs_training=job.lineage.needs_training,
        dropped={n: p.dropped for n, (_, p) in job.plans.items() if p.dropped},
        has_tokenizer=any(f.startswith(("tokenizer.", "vocab.")) for f in files),
        uneven=job.uneven,
    )
