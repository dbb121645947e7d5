"""Encoder and connector as programs: one, or several that follow each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mm1_mlx.config.limits import MAX_PATCHES
from mm1_mlx.coreml.bc1s import BC1S
from mm1_mlx.coreml.connectors import connect
from mm1_mlx.coreml.encoder import Encoder
from mm1_mlx.coreml.layout import Layout, Value
from mm1_mlx.coreml.nlc import NLC
from mm1_mlx.coreml.numbers import Numbers, Precision
from mm1_mlx.coreml.tools import Function, Placeholder, Program, ct, mb, types
from mm1_mlx.coreml.weights import Weights
from mm1_mlx.errors import ConfigError

IMAGE = "image"
# What a model without a connector gives.
FEATURES = "features"
IMAGE_TOKENS = "image_tokens"
# The Neural Engine's compiler fails on programs of a ViT-H's size.
# https://github.com/apple/coremltools/issues/2758
CHUNK_BLOCKS = 8
# macOS 15: attention as one operation, several functions in a package.
TARGET = ct.target.iOS18


@dataclass(frozen=True)
class Plan:
    """What a program computes.

    Attributes:
        precision: of numbers and weights.
        ane: whether it is laid out for the Neural Engine, in chunks.
        as_image: whether the tile comes as a picture, 0 to 255, else as numbers, 0 to 1.
        size: side of the tile, in pixels.
    """

    precision: Precision = "fp16"
    ane: bool = False
    as_image: bool = True
    size: int = 0

    @property
    def layout(self) -> Layout:
        """The operations that it is written in."""
        kind = BC1S if self.ane else NLC
        return kind(Numbers(self.precision))


def output_name(weights: Weights) -> str:
    """What the last program's result is called."""
    return IMAGE_TOKENS if weights.config.connector else FEATURES


def programs(
    weights: Weights,
    plan: Plan,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Iterator[Any]:
    """The programs of a plan, each made when the one before is done with.

    Args:
        weights: of the model.
        plan: what is computed.
        progress: called with a task, blocks written and blocks in all.

    Raises:
        ConfigError: the model cannot be computed so.
    """
    vision = weights.config.vision
    assert vision is not None
    _check_size(weights, plan.size)
    step = CHUNK_BLOCKS if plan.ane else vision.depth
    ends = [*range(0, vision.depth, step), vision.depth]
    encoder = Encoder(plan.layout, weights)
    shape = (1, 3, plan.size, plan.size)
    for number, (start, stop) in enumerate(pairwise(ends)):
        made = _program(
            encoder,
            IMAGE if start == 0 else f"states_{number}",
            shape,
            _counted(range(start, stop), plan.size, vision.depth, progress),
            None if stop == vision.depth else f"states_{number + 1}",
        )
        shape = made.functions["main"].outputs[0].shape
        yield made
        # Its weights go before the next one's are read.
        del made


def _program(
    encoder: Encoder,
    name: str,
    shape: tuple[int, ...],
    blocks: Iterable[int],
    states: str | None,
) -> Any:
    """A program from an image, or states, through some blocks.

    Args:
        encoder: writes it.
        name: of its input.
        shape: of its input.
        blocks: which run.
        states: what the states after them are called; None where the encoder ends.
    """
    layout = encoder.layout
    first = name == IMAGE
    # An image is converted to float32 by Core ML, and divided by 255 so.
    half = layout.numbers.name == "fp16" and not first
    kind = types.fp16 if half else types.fp32
    inputs = {name: Placeholder(shape, kind, name=name)}
    with Function(inputs, opset_version=TARGET) as function:
        x = function.inputs[name]
        if first:
            x = mb.cast(x=encoder.centre(x), dtype=layout.numbers.name)
            x = encoder.embed(x)
        for index in blocks:
            x = encoder.block(x, index)
        x = _end(encoder, x) if states is None else mb.identity(x=x, name=states)
        function.set_outputs([x])
    made = Program()
    made.add_function("main", function)
    return made


def _counted(
    blocks: range, size: int, total: int, progress: Callable[[str, int, int], None]
) -> Iterator[int]:
    """The blocks, and word of each that was asked for."""
    for index in blocks:
        progress(f"blocks at {size}", index + 1, total)
        yield index


def _end(encoder: Encoder, x: Value) -> Value:
    """The features, or image tokens, of the last block's states."""
    weights, layout = encoder.weights, encoder.layout
    x = encoder.finish(x)
    if weights.config.connector:
        places = x.shape[1] if isinstance(layout, NLC) else x.shape[-1]
        x = connect(layout, weights, x, places)
    return layout.result(x, output_name(weights))


def _check_size(weights: Weights, size: int) -> None:
    vision = weights.config.vision
    assert vision is not None
    if size < 1 or size % vision.patch_size:
        raise ConfigError(
            f"resolution {size} is not a multiple of the encoder's patches of "
            f"{vision.patch_size} pixels"
        )
    patches = (size // vision.patch_size) ** 2
    if patches > MAX_PATCHES:
        raise ConfigError(
            f"tiles of {size} pixels have {patches:,} patches, more than {MAX_PATCHES:,}"
        )
