"""What measuring and learning take of memory, said before a model is asked anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import mlx.core as mx

from mm1_mlx.budget import HELD, Answer, spell_out
from mm1_mlx.checkpoint import device_dtype
from mm1_mlx.config import MM1Config, Packing
from mm1_mlx.errors import MemoryLimitError
from mm1_mlx.prompt import Prompt
from mm1_mlx.quantize.cost import MAX_ANSWER
from mm1_mlx.recipe import component_of
from mm1_mlx.room import allowed
from mm1_mlx.shard import Deferred
from mm1_mlx.sizes import human_bytes
from mm1_mlx.train.budget import Training

# Of every scale and bias that is learned: its shift, Adam's two averages, the gradient
# and its sum over a step, and the new shift beside the old one.
LEARNING = 6

Tensors = Mapping[str, Deferred]


def measuring_bytes(
    config: MM1Config, tensors: Tensors, prompts: Sequence[Prompt]
) -> dict[str, int]:
    """What asking a model takes, whose logits are kept, by what it is for.

    Args:
        config: the model's.
        tensors: the model's, in the precision that they are stored in.
        prompts: all that are asked.
    """
    itemsize = _itemsize(tensors)
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    tiles = sum(len(picture.tiles) for picture in longest.pictures)
    answer = Answer(len(longest.tokens), MAX_ANSWER, tiles, 0, itemsize)
    return {
        "weights": _held(tensors),
        **_kept(config, prompts),
        "answering": sum(answer.bytes(config).values()),
    }


def learning_bytes(
    config: MM1Config,
    tensors: Tensors,
    packed: Mapping[str, Packing],
    prompts: Sequence[Prompt],
) -> dict[str, int]:
    """What learning a packed model's scales takes, by what it is for.

    Args:
        config: the model's.
        tensors: the packed model's.
        packed: how its modules are packed, by path.
        prompts: all that were asked, whose logits are kept.
    """
    sizes = {
        path: prod(tensors[f"{path}.scales"].shape)
        for path, way in packed.items()
        if path.startswith("decoder.") and way.mode == "affine"
    }
    scales = LEARNING * 2 * 4 * sum(sizes.values())
    step = Training(
        rows=1,
        positions=max(len(prompt.tokens) for prompt in prompts) + MAX_ANSWER,
        parts=("decoder",),
        itemsize=_itemsize(tensors),
        targets=MAX_ANSWER,
    )
    gradients = step.activations(config)
    if mx.default_device() == mx.cpu:
        # There many rows unpack a layer, and the gradient of its scales begins as one of
        # all its weights; experts' are picked out of all of them besides.
        unpacked = {p: 4 * n * packed[p].group_size for p, n in sizes.items()}
        gradients += HELD * max(unpacked.values())
        for path, size in unpacked.items():
            gradients += size * (4 if component_of(path) == "experts" else 2)
    return {
        "weights": _held(tensors),
        **_kept(config, prompts),
        "scales": scales,
        "gradients": gradients,
    }


def check_memory(what: str, needs: Mapping[str, int], way_out: str) -> None:
    """Pass only if the device has room.

    Raises:
        MemoryLimitError: it has not; ``what`` says for what, and ``way_out`` what to do.
    """
    need, room = sum(needs.values()), allowed()
    if room is not None and need > room:
        raise MemoryLimitError(
            f"{what} needs {human_bytes(need)} ({spell_out(needs)}) of memory, but "
            f"{human_bytes(room)} are free here; {way_out}"
        )


def _kept(config: MM1Config, prompts: Sequence[Prompt]) -> dict[str, int]:
    assert config.decoder is not None
    pixels = (tile.nbytes for x in prompts for p in x.pictures for tile in p.tiles)
    return {
        f"logits of {len(prompts)} answers": len(prompts)
        * MAX_ANSWER
        * config.decoder.vocab_size
        * 4,
        "pictures": sum(pixels),
    }


def _held(tensors: Tensors) -> int:
    """Bytes of tensors in the device's precision, the largest twice while it is cast."""
    sizes = [prod(x.shape) * _device(x.dtype).size for x in tensors.values()]
    return sum(sizes) + max(sizes)


def _itemsize(tensors: Tensors) -> int:
    """Bytes of a number that is not packed."""
    kinds = {x.dtype for x in tensors.values()}
    return max(_device(x).size for x in kinds if mx.issubdtype(x, mx.floating))


def _device(dtype: mx.Dtype) -> mx.Dtype:
    return device_dtype(dtype) if mx.issubdtype(dtype, mx.floating) else dtype
