"""Sources to a model folder: a whole checkpoint, or parts of several put together."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mm1_mlx.checkpoint import CheckpointWriter, model_shapes
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.presets import PRESETS

from .connectors import SPELLINGS, connector_config, is_spec
from .formats import Format, detect_format, name_of
from .rules import Plan, plan
from .source import Source
from .text import tokenizer_files

SEED = 0
PARTS = MM1Config.PARTS

# Told the tensors written so far and their number.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Origin:
    """Something that parts come from: an open source, or a preset, which has no weights."""

    name: str
    config: MM1Config
    source: Source | None = None
    format: Format | None = None


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        out: the model's folder.
        config: its config.
        parts: the source and format of every part that has weights.
        needs_training: the parts that were initialised.
        dropped: source tensors that the model has no use for, by source.
        has_tokenizer: whether a source brought tokenizer files.
    """

    out: Path
    config: MM1Config
    parts: dict[str, tuple[str, str]]
    needs_training: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]]
    has_tokenizer: bool


def convert(
    source: str | None,
    out: Path,
    *,
    vision: str | None = None,
    connector: str | None = None,
    decoder: str | None = None,
    dtype: mx.Dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a model folder, tensor by tensor, from foreign checkpoints.

    A source is a folder or a hub repository. ``source`` gives every part that no other
    argument does; ``vision`` and ``decoder`` may also name a preset, ``connector`` a kind
    such as ``c-abstractor:144``. Those parts are initialised and need training.

    Args:
        source: the checkpoint to convert, or None if all parts are named.
        out: the folder to write.
        vision: where the image encoder comes from instead.
        connector: where the connector comes from instead, or its kind.
        decoder: where the decoder comes from instead.
        dtype: what weights are cast to; None keeps each as it is.
        overwrite: whether an existing ``out`` is replaced.
        progress: called after every tensor.

    Raises:
        CheckpointError: a source cannot be had, read, or understood.
        ConfigError: the parts do not fit together.
    """
    if out.exists() and not overwrite:
        raise CheckpointError(
            f"{str(out)!r} already exists; choose another name or pass --overwrite"
        )
    spec = connector if connector and is_spec(connector) else None
    chosen = {"vision": vision, "connector": connector, "decoder": decoder}
    if spec:
        del chosen["connector"]
    with ExitStack() as stack:
        origins = _open(chosen, source, stack)
        config = _compose(origins, spec)
        plans = {
            name: _plan(origin, [p for p in PARTS if origins.get(p) is origin], config)
            for name, origin in {o.name: o for o in origins.values()}.items()
            if origin.source
        }
        return _write(out, config, origins, plans, dtype, overwrite, progress)


def _open(
    chosen: dict[str, str | None], base: str | None, stack: ExitStack
) -> dict[str, Origin]:
    """The origin of every part that has one; each source is opened once.

    Raises:
        CheckpointError: a source does not have the part it was named for.
    """
    opened: dict[str, Origin] = {}
    origins: dict[str, Origin] = {}
    for part, name in chosen.items():
        wanted = name or base
        if wanted is None:
            continue
        if wanted not in opened:
            opened[wanted] = _origin(wanted, stack)
        if getattr(opened[wanted].config, part) is not None:
            origins[part] = opened[wanted]
        elif name:
            raise CheckpointError(f"{name} holds no {part}; name another source for it")
    return origins


def _origin(name: str, stack: ExitStack) -> Origin:
    if name in PRESETS:
        return Origin(name, PRESETS[name])
    source = stack.enter_context(Source(name))
    format = detect_format(source)
    return Origin(name, format.config(source), source, format)


def _compose(origins: dict[str, Origin], spec: str | None) -> MM1Config:
    """The config of the parts together, a new connector between them if asked for.

    Raises:
        ConfigError: a part is missing, or they do not fit.
    """
    values: dict[str, Any] = {
        part: getattr(origin.config, part) for part, origin in origins.items()
    }
    if "vision" in origins:
        values["image"] = origins["vision"].config.image
    if "decoder" in origins:
        values["prompt"] = origins["decoder"].config.prompt
    both = "vision" in origins and "decoder" in origins
    if spec:
        if not both:
            raise ConfigError(
                f"connector {spec!r} needs a vision part and a decoder to stand between"
            )
        # A class token has no place in the grid that connectors pool.
        values["vision"] = replace(values["vision"], drop_cls=True)
        values["connector"] = connector_config(
            spec, values["vision"], values["decoder"]
        )
    elif both and "connector" not in values:
        raise ConfigError(
            "vision and decoder need a connector between them, one of "
            f"{', '.join(SPELLINGS)}, or a source of one"
        )
    return MM1Config(**values)


def _plan(origin: Origin, parts: list[str], config: MM1Config) -> Plan:
    """What the origin's tensors become, checked by name and shape.

    Raises:
        CheckpointError: they do not fit the model.
    """
    assert origin.source is not None
    assert origin.format is not None
    found = {name: info.shape for name, info in origin.source.tensors.items()}
    wanted = {
        name: shape
        for name, shape in model_shapes(config).items()
        if name.partition(".")[0] in parts
    }
    result = plan(origin.format.RULES, found, wanted, possible_shapes(origin.config))
    if "decoder" in parts:
        _check_tied(origin.source, result)
    return result


def possible_shapes(config: MM1Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a source of this config may hold, needed here or not."""
    vision, decoder = config.vision, config.decoder
    if vision:
        vision = replace(vision, feature_layer=-1, apply_post_norm=True)
    if decoder:
        decoder = replace(decoder, tie_word_embeddings=False)
    return model_shapes(replace(config, vision=vision, decoder=decoder))


def _check_tied(source: Source, result: Plan) -> None:
    """Pass only if a head that the config ties to the embedding is equal to it.

    Raises:
        CheckpointError: it is not.
    """
    heads = [name for name in result.dropped if name.endswith("lm_head.weight")]
    embeddings = [
        step.sources[0]
        for step in result.steps
        if step.targets == ("decoder.embed_tokens.weight",)
    ]
    for head in heads:
        if not mx.array_equal(source.read(head), source.read(embeddings[0])):
            raise CheckpointError(
                f"{source.name}: config.json ties {head!r} to {embeddings[0]!r}, but they "
                "differ; set tie_word_embeddings to false there"
            )


def _write(
    out: Path,
    config: MM1Config,
    origins: dict[str, Origin],
    plans: dict[str, Plan],
    dtype: mx.Dtype | None,
    overwrite: bool,
    progress: Progress | None,
) -> Report:
    initialised = tuple(
        part
        for part in PARTS
        if getattr(config, part)
        and (part not in origins or origins[part].source is None)
    )
    decoder = origins.get("decoder")
    files = tokenizer_files(decoder.source) if decoder and decoder.source else {}
    by_name = {origin.name: origin for origin in origins.values()}
    total = len(model_shapes(config))
    record = _record(origins, initialised)
    with CheckpointWriter(out, config, record, overwrite=overwrite) as writer:
        tensors = _tensors(config, by_name, plans, initialised)
        for count, (name, tensor) in enumerate(tensors, 1):
            made = tensor if dtype is None else tensor.astype(dtype)
            # Evaluated one by one: what the tensor was made from is freed here.
            mx.eval(made)
            writer.add(name, made)
            if progress:
                progress(count, total)
        for name, path in files.items():
            writer.add_file(name, path)
    return Report(
        out=out,
        config=config,
        parts={
            part: (origin.name, name_of(origin.format))
            for part, origin in origins.items()
            if origin.format
        },
        needs_training=initialised,
        dropped={name: p.dropped for name, p in plans.items() if p.dropped},
        has_tokenizer=any(name.startswith(("tokenizer.", "vocab.")) for name in files),
    )


def _tensors(
    config: MM1Config,
    origins: dict[str, Origin],
    plans: dict[str, Plan],
    initialised: tuple[str, ...],
) -> Iterator[tuple[str, mx.array]]:
    for name, result in plans.items():
        source = origins[name].source
        assert source is not None
        for step in result.steps:
            yield from step(source.read)
    if initialised:
        rest: Any = dict.fromkeys(set(PARTS) - set(initialised))
        mx.random.seed(SEED)
        model = MM1(replace(config, **rest, image=None, prompt=None))
        tensors = dict(tree_flatten(model.parameters()))
        del model
        # Popped, so that a tensor that was written is freed.
        while tensors:
            yield tensors.popitem()


def _record(origins: dict[str, Origin], initialised: tuple[str, ...]) -> dict[str, Any]:
    """What the manifest says of where the model comes from."""
    parts: dict[str, Any] = {
        part: {
            "source": origin.name,
            "format": name_of(origin.format),
            "licence": origin.source.licence,
        }
        for part, origin in origins.items()
        if origin.source and origin.format
    }
    for part in initialised:
        parts[part] = {"initialised": True, "seed": SEED}
    return {
        "parts": parts,
        "needs_training": list(initialised),
        "parity_checked": False,
    }
