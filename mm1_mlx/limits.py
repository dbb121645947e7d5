"""The least time that a chip takes for a model's work: by its operations or its bytes.

Decoding reads every weight that a token passes through, and the keys and values of all
before it; a prompt and its pictures are bounded by the operations, or by the weights
where they are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mm1_mlx.budget import KV_STEP, Answer, kv_bytes, token_bytes, weight_bytes
from mm1_mlx.chips import Chip
from mm1_mlx.config import MM1Config, Packing
from mm1_mlx.work import decoder_flops, encode_flops

Ways = Mapping[str, Packing]
# Operations, and bytes that are read: what a chip's time is computed from.
Work = tuple[float, float]


def decode_rate(
    chip: Chip,
    config: MM1Config,
    ways: Ways | None = None,
    context: int = 0,
    itemsize: int = 2,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> float:
    """Most tokens a second, one after another, behind so many positions.

    Args:
        chip: where.
        config: the model's.
        ways: how modules are packed, by path.
        context: positions whose keys and values are read.
        itemsize: bytes of a number that is not packed.
        kv_bits: what keys and values are packed to, None for none.
        kv_group_size: how many of them share a scale.
    """
    work = decode_work(config, ways, context, itemsize, kv_bits, kv_group_size)
    return 1 / chip.seconds(*work)


def decode_work(
    config: MM1Config,
    ways: Ways | None = None,
    context: int = 0,
    itemsize: int = 2,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> Work:
    """What ``decode_rate`` is computed from."""
    decoder = config.decoder
    assert decoder is not None
    # Keys before the window are not looked at, nor is room that is not filled yet.
    seen = min(context, decoder.sliding_window or context)
    step = kv_bytes(decoder, KV_STEP, itemsize, kv_bits, kv_group_size)
    kv = step / KV_STEP * seen
    read = token_bytes(config, ways, itemsize) + kv
    return decoder_flops(decoder, 1, context), read


def encode_seconds(
    chip: Chip,
    config: MM1Config,
    tiles: int = 1,
    ways: Ways | None = None,
    itemsize: int = 2,
) -> float:
    """Least time for pictures of so many tiles to become image tokens."""
    return chip.seconds(*encode_work(config, tiles, ways, itemsize))


def encode_work(
    config: MM1Config, tiles: int = 1, ways: Ways | None = None, itemsize: int = 2
) -> Work:
    """What ``encode_seconds`` is computed from."""
    sizes = weight_bytes(config, ways, itemsize)
    read = sizes.get("vision", 0) + sizes.get("connector", 0)
    return encode_flops(config, tiles), read


def prefill_seconds(
    chip: Chip,
    config: MM1Config,
    positions: int,
    ways: Ways | None = None,
    itemsize: int = 2,
    before: int = 0,
) -> float:
    """Least time for so many positions behind others, to the first token."""
    return chip.seconds(*prefill_work(config, positions, ways, itemsize, before))


def prefill_work(
    config: MM1Config,
    positions: int,
    ways: Ways | None = None,
    itemsize: int = 2,
    before: int = 0,
) -> Work:
    """What ``prefill_seconds`` is computed from."""
    decoder = config.decoder
    assert decoder is not None
    active = token_bytes(config, ways, itemsize)
    whole = weight_bytes(config, ways, itemsize)["decoder"]
    if decoder.moe:
        # Experts that no position chose are not read, were each choice free.
        share = decoder.moe.experts_per_token / decoder.moe.num_experts
        read = whole - (whole - active) * (1 - share) ** (positions - 1)
    else:
        read = active
    return decoder_flops(decoder, positions, before), read


def first_token_seconds(
    chip: Chip,
    config: MM1Config,
    positions: int,
    tiles: int = 1,
    ways: Ways | None = None,
    itemsize: int = 2,
) -> float:
    """Least time from pictures and prompt to the first token."""
    prefill = prefill_seconds(chip, config, positions, ways, itemsize)
    return encode_seconds(chip, config, tiles, ways, itemsize) + prefill


def answer_seconds(
    chip: Chip, config: MM1Config, answer: Answer, ways: Ways | None = None
) -> tuple[float, float]:
    """Least times of an answer: to its first token, and to the last that it may have.

    Args:
        chip: that each of the answer's processes has to itself.
        config: the model's.
        answer: what is asked.
        ways: how modules are packed, by path.
    """
    count, itemsize = answer.processes, answer.itemsize
    chip = replace(chip, bandwidth=count * chip.bandwidth, flops=count * chip.flops)
    new = answer.positions - answer.reused
    first = prefill_seconds(chip, config, new, ways, itemsize, answer.reused)
    if answer.tiles:
        first += encode_seconds(chip, config, answer.tiles, ways, itemsize)
    # On average half of the answer stands before a token of it.
    context = answer.positions + answer.room // 2
    packed = answer.kv_bits if context >= answer.kv_start else None
    rate = decode_rate(
        *(chip, config, ways, context, itemsize), packed, answer.kv_group_size
    )
    return first, first + (answer.room - 1) / rate
