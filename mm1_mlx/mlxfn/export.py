"""``mm1 export mlxfn``: a model folder into one of functions, which is checked first."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mm1_mlx.blas import give_back
from mm1_mlx.checkpoint import device_dtype, load_model
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.files import fsync, replace_json, sha256
from mm1_mlx.hold import LOCK
from mm1_mlx.image import DEFAULT_LIMITS
from mm1_mlx.mlxfn.functions import Traced, check_traceable
from mm1_mlx.mlxfn.program import MLX, open_program
from mm1_mlx.mlxfn.sidecar import (
    FORMAT,
    FORMAT_VERSION,
    SIDECAR,
    TOKENIZER,
    File,
    Limits,
    Sidecar,
)
from mm1_mlx.mlxfn.text import backend_json, prompt_sheet, tokenizer_sheet
from mm1_mlx.models import MM1
from mm1_mlx.partial import Partial
from mm1_mlx.prompt import Prompt
from mm1_mlx.runtime import config_of
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.writer import check_apart, check_space

CAPACITY = 2048
BUCKETS = (32, 128, 512)
# What the functions are checked by.
QUESTION = "What is in the picture?"
CHECKED_TOKENS = 8
# Of the largest logit: what the rounding of sums in another order may change.
ROUNDING = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What was exported.

    Attributes:
        out: the folder.
        sidecar: what it says of itself.
        difference: the largest of a logit, as a share of the largest logit.
    """

    out: Path
    sidecar: Sidecar
    difference: float


def export(
    path: Path,
    out: Path,
    *,
    resolution: str | None = None,
    capacity: int | None = None,
    prefill: Sequence[int] = BUCKETS,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> Report:
    """Write a model's functions, its tokenizer and a sidecar as a folder.

    They are opened as a program would and asked what the model was asked, before the
    folder comes to its place. The model and its functions are not in memory at once.

    Args:
        path: the model's folder.
        out: the folder to write.
        resolution: a mode of ``resolution.py`` with one tile a picture.
        capacity: positions of prompt and answer; by default 2,048, or as many as the
            model has.
        prefill: how many positions are run at once.
        overwrite: whether an export that is there is replaced.
        progress: told what is under way.

    Raises:
        CheckpointError: the model is damaged or its text cannot be described; ``out`` is
            taken or without room; or the functions do not compute what the model does.
        ConfigError: the model cannot be traced, or the numbers do not fit it.
    """
    out = out.resolve()
    config = config_of(path, resolution)
    check_traceable(config)
    capacity = _capacity(capacity, config)
    buckets = tuple(sorted({1, *(T for T in prefill if capacity >= T)}))
    check_apart(out, [path])
    partial = Partial(out, None)
    partial.open()
    try:
        check_free(out, overwrite=overwrite)
        report = _write(path, config, partial.folder, capacity, buckets, progress)
        partial.publish(overwrite=overwrite)
    except BaseException:
        partial.remove()
        raise
    return replace(report, out=out)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Pass only where an export may be written.

    Raises:
        CheckpointError: something else is there, or an export that is to be kept.
    """
    if not out.exists():
        return
    if not (out / SIDECAR).is_file():
        raise CheckpointError(
            f"{str(out)!r} already exists and holds no exported functions; choose another "
            "name"
        )
    if not overwrite:
        raise CheckpointError(
            f"{str(out)!r} already exists; choose another name or pass --overwrite"
        )


def _capacity(wanted: int | None, config: MM1Config) -> int:
    assert config.decoder is not None
    most = config.decoder.max_position_embeddings
    if wanted is None:
        return min(CAPACITY, most)
    if wanted > most:
        raise ConfigError(
            f"a capacity of {wanted:,} positions is more than the model's {most:,}; pass "
            "--capacity with at most as many"
        )
    return wanted


def _write(
    path: Path,
    config: MM1Config,
    folder: Path,
    capacity: int,
    buckets: tuple[int, ...],
    progress: Progress,
) -> Report:
    """Fill the folder, and ask what is in it."""
    assert config.prompt is not None
    model = load_model(path, device_dtype)
    model.config = config
    tokenizer = load_tokenizer(path, config.prompt, regions=config.region is not None)
    prompt, words = prompt_sheet(config, tokenizer), tokenizer_sheet(tokenizer)
    content = backend_json(tokenizer)
    check_space(folder, sum(x.nbytes for x in model.tensors().values()))
    asked = _question(config, tokenizer)
    if len(asked.tokens) + CHECKED_TOKENS > capacity:
        raise ConfigError(
            f"a capacity of {capacity:,} positions holds no question about a picture, "
            f"which has {len(asked.tokens):,}; pass a larger --capacity"
        )
    expected, tokens = _ask(model, asked)
    rounding = ROUNDING[model.decoder.norm.weight.dtype]
    functions = Traced(model, capacity, buckets).write(folder, progress)
    del model
    gc.collect()
    mx.clear_cache()
    give_back()
    (folder / TOKENIZER).write_bytes(content)
    files = []
    for written in sorted(folder.iterdir()):
        if written.name != LOCK:
            fsync(written)
            size = written.stat().st_size
            files.append(File(name=written.name, bytes=size, sha256=sha256(written)))
    limits = DEFAULT_LIMITS
    on_cpu = mx.default_device() == mx.cpu
    sidecar = Sidecar(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        written_by=f"mm1-mlx {version('mm1-mlx')}",
        mlx=MLX,
        device="cpu" if on_cpu else "gpu",
        chip=str(mx.device_info().get("device_name", "")),
        capacity=capacity,
        buckets=buckets,
        functions=functions,
        image=config.image if config.sees else None,
        limits=Limits(
            max_bytes=limits.max_bytes,
            max_pixels=limits.max_pixels,
            max_side=limits.max_side,
        ),
        prompt=prompt,
        tokenizer=words,
        files=tuple(files),
    )
    replace_json(folder / SIDECAR, sidecar.to_dict())
    difference = _check(folder, asked, expected, tokens, rounding)
    return Report(folder, sidecar, difference)


def _question(config: MM1Config, tokenizer: Tokenizer) -> Prompt:
    """A question about a drawn picture, or without one where the model sees none."""
    pictures = []
    if config.sees:
        ramp = np.arange(64, dtype=np.uint8) * 4
        red, green = np.meshgrid(ramp, ramp)
        pixels = np.stack([red, green, red ^ green], axis=-1)
        pictures.append(Image.fromarray(pixels))
    return Prompt.build(QUESTION, pictures, config, tokenizer)


def _ask(model: MM1, prompt: Prompt) -> tuple[mx.array, list[int]]:
    """The logits [N, V] of a model's answer, and its tokens."""
    embeddings = model.embed(
        mx.array(prompt.tokens), model.encode(prompt.pictures), prompt.spans
    )
    cache = model.make_cache()
    row = model(mx.array([prompt.tokens]), cache, embeddings[None])[:, -1]
    rows, tokens = [row], [int(row.argmax())]
    for _ in range(CHECKED_TOKENS - 1):
        row = model(mx.array([tokens[-1:]]), cache)[:, -1]
        rows.append(row)
        tokens.append(int(row.argmax()))
    logits = mx.concatenate(rows).astype(mx.float32)
    mx.eval(logits)
    return logits, tokens


def _check(
    folder: Path,
    prompt: Prompt,
    expected: mx.array,
    tokens: list[int],
    rounding: float,
) -> float:
    """How far the functions' logits are from the model's behind the same tokens.

    Raises:
        CheckpointError: farther than rounding accounts for.
    """
    program = open_program(folder)
    state = program.start()
    rows = [program.logits(prompt, state)]
    rows += [program.logits(Prompt((token,)), state) for token in tokens[:-1]]
    found = mx.concatenate(rows).astype(mx.float32)
    scale = mx.abs(expected).max()
    difference = float(mx.abs(found - expected).max() / scale)
    # Written so that NaN fails too.
    if not difference <= rounding:
        raise CheckpointError(
            f"the exported functions differ from the model by {difference:.2g} of the "
            f"largest logit, expected at most {rounding:g}; nothing was written, and the "
            "model's config.json is what to report"
        )
    return difference
