"""What a run takes of memory, from the config and before it begins.

On Metal to run out of memory ends the process, and no exception says so. What will not
fit is refused instead, with the numbers and what would fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from mm1_mlx.chips import smallest_memory
from mm1_mlx.config import (
    AveragePoolConfig,
    CAbstractorConfig,
    DecoderConfig,
    LinearConfig,
    MM1Config,
    Packing,
)
from mm1_mlx.errors import CheckpointError, ConfigError, MemoryLimitError
from mm1_mlx.layout import most_picture_tokens
from mm1_mlx.models import MM1
from mm1_mlx.recipe import DEFAULT, find_recipe, plan
from mm1_mlx.room import allowed
from mm1_mlx.sizes import human_bytes

# Results of operations that are held at once: mlx runs ahead of the device by up to ten
# operations, and what they read is held too. Seen with encoders, connectors and decoders
# of several widths: 6 to 14 arrays of the widest layer.
HELD = 14
# The C-Abstractor's convolutions gather nine neighbours besides.
HELD_BY_CONVOLUTIONS = 18
# Positions that mlx-lm's caches grow by.
KV_STEP = 256
# Positions of a prompt that are run at once.
PREFILL_STEP = 2048
# What is usually asked: a question's tokens beside a picture, in a long chat.
TEXT_TOKENS, CONTEXT = 56, 2048


def weight_bytes(
    config: MM1Config, ways: Mapping[str, Packing] | None = None, itemsize: int = 2
) -> dict[str, int]:
    """Bytes of the weights by part.

    Args:
        config: the model's.
        ways: how modules are packed, by path; no others are.
        itemsize: bytes of a number that is not packed.
    """
    sizes: dict[str, int] = {}
    for name, tensor in _tensors(config).items():
        part = name.partition(".")[0]
        bits = _bits(name, ways or {}, itemsize)
        sizes[part] = sizes.get(part, 0) + int(tensor.size * bits / 8)
    return sizes


def token_bytes(
    config: MM1Config, ways: Mapping[str, Packing] | None = None, itemsize: int = 2
) -> int:
    """Bytes of the weights that one decoded token reads.

    Of experts those it passes, of an embedding table that is not the head too one row.
    """
    decoder = config.decoder
    assert decoder is not None
    total = 0.0
    for name, tensor in _tensors(replace(config, vision=None, connector=None)).items():
        size = tensor.size - idle(name, tensor.size, config)
        if "embed_tokens" in name and not decoder.tie_word_embeddings:
            size = decoder.hidden_size
        if name.startswith("decoder."):
            total += size * _bits(name, ways or {}, itemsize) / 8
    return int(total)


def idle(name: str, size: int, config: MM1Config) -> int:
    """How many of a tensor's numbers a token, or an image, does not pass through."""
    part = name.partition(".")[0]
    decoder, vision = config.decoder, config.vision
    if part == "decoder" and decoder and decoder.moe and ".switch_mlp." in name:
        count, used = decoder.moe.num_experts, decoder.moe.experts_per_token
    elif name.startswith("vision.layers.") and vision and vision.moe:
        layer = int(name.split(".")[2])
        if not (vision.is_sparse(layer) and ".mlp.fc" in name):
            return 0
        count, used = vision.moe.num_experts, vision.moe.experts_per_image
    else:
        return 0
    return size * (count - used) // count


def kv_bytes(
    config: DecoderConfig,
    positions: int,
    itemsize: int = 2,
    bits: int | None = None,
    group_size: int = 64,
) -> int:
    """Bytes of the keys and values of so many positions.

    Args:
        config: the decoder's.
        positions: how many the cache holds.
        itemsize: bytes of a number that is not packed.
        bits: what they are packed to, None for none.
        group_size: how many numbers share a scale and a bias.
    """
    width = itemsize * 8 if bits is None else bits + 2 * itemsize * 8 / group_size
    heads = sum(
        config.sizes(layer).num_key_value_heads
        for layer in range(config.num_hidden_layers)
    )
    held = -(-positions // KV_STEP) * KV_STEP
    return int(held * 2 * heads * config.head_dim * width / 8)


def encode_bytes(config: MM1Config, tiles: int, itemsize: int = 2) -> int:
    """Bytes that encoding so many tiles takes besides the weights, pixels included."""
    vision, connector = config.vision, config.connector
    if vision is None or not tiles:
        return 0
    side = config.image.size if config.image else vision.image_size
    places = (side // vision.patch_size) ** 2 + vision.class_token
    pixels = side * side * 3 * 4
    mlp = vision.intermediate_size * (vision.moe.experts_per_image if vision.moe else 1)
    held = HELD * places * max(mlp, 3 * vision.hidden_size)
    if isinstance(connector, CAbstractorConfig):
        held = max(held, HELD_BY_CONVOLUTIONS * places * connector.hidden_size)
    elif connector and not isinstance(connector, (LinearConfig, AveragePoolConfig)):
        wide = getattr(connector, "hidden_size", connector.output_size)
        held = max(held, HELD * places * max(wide, connector.output_size))
    return tiles * (pixels * 2 + held * itemsize)


def prefill_bytes(config: DecoderConfig, positions: int, itemsize: int = 2) -> int:
    """Bytes that reading a prompt takes besides weights, keys and values."""
    rows = min(positions, PREFILL_STEP)
    widest = 0
    for layer in range(config.num_hidden_layers):
        sizes = config.sizes(layer)
        mlp = sizes.intermediate_size
        if config.moe and config.is_sparse(layer):
            mlp *= config.moe.experts_per_token
        heads = (sizes.num_attention_heads + 2 * sizes.num_key_value_heads) * (
            config.head_dim
        )
        widest = max(widest, mlp, heads, config.hidden_size)
    # The logits of the last position, in float32 where they are sampled.
    logits = config.vocab_size * 4 * 4
    embeddings = positions * config.hidden_size
    return (HELD * rows * widest + embeddings) * itemsize + logits


@dataclass(frozen=True)
class Answer:
    """What an answer takes besides the weights.

    Attributes:
        positions: of the prompt.
        room: the longest answer, in tokens.
        tiles: that are to be encoded.
        reused: positions whose keys and values are in memory already.
        itemsize: bytes of a number in the model's precision.
        kv_bits: what keys and values are packed to, None for none.
        kv_group_size: how many of them share a scale.
        kv_start: positions from which on they are packed.
        processes: that each hold a part of the heads.
    """

    positions: int
    room: int
    tiles: int = 0
    reused: int = 0
    itemsize: int = 2
    kv_bits: int | None = None
    kv_group_size: int = 64
    kv_start: int = 0
    processes: int = 1

    def bytes(self, config: MM1Config) -> dict[str, int]:
        """By what they are for; what never is at the same time stands in one."""
        decoder = config.decoder
        assert decoder is not None
        new = self.positions - self.reused
        kv = self._kv(decoder, self.positions + self.room)
        kv -= self._kv(decoder, self.reused // KV_STEP * KV_STEP)
        encode = encode_bytes(config, self.tiles, self.itemsize)
        prefill = prefill_bytes(decoder, new, self.itemsize)
        name = f"encoding {self.tiles} tiles" if encode > prefill else "activations"
        return {"keys and values": kv, name: max(encode, prefill)}

    def _kv(self, decoder: DecoderConfig, positions: int) -> int:
        """Bytes of keys and values, at most those of a prompt's step unpacked."""
        return self._whole_kv(decoder, positions) // self.processes

    def _whole_kv(self, decoder: DecoderConfig, positions: int) -> int:
        if self.kv_bits is None:
            return kv_bytes(decoder, positions, self.itemsize)
        plain = min(positions, max(self.kv_start, PREFILL_STEP))
        return max(
            kv_bytes(decoder, plain, self.itemsize),
            kv_bytes(
                decoder, positions, self.itemsize, self.kv_bits, self.kv_group_size
            ),
        )


def usual_answer(config: MM1Config, itemsize: int = 2) -> Answer:
    """A question about a picture, in a chat of ``CONTEXT`` positions."""
    assert config.decoder is not None
    tiles = config.image.max_tiles if config.sees and config.image else 0
    positions = TEXT_TOKENS + (most_picture_tokens(config) if tiles else 0)
    return Answer(positions, max(CONTEXT - positions, 0), tiles, 0, itemsize)


def usual_bytes(config: MM1Config, itemsize: int = 2) -> int:
    """Bytes beside the weights of what a model is usually asked: an answer, or vectors."""
    if config.decoder is not None:
        return sum(usual_answer(config, itemsize).bytes(config).values())
    tiles = config.image.max_tiles if config.image else 1
    return encode_bytes(config, tiles, itemsize)


def check_load(
    weights: Mapping[str, mx.array],
    name: object,
    config: MM1Config,
    way_out: str | None = None,
) -> None:
    """Pass only if the device has room for these weights, which may be lazy.

    Args:
        weights: the tensors as they will be held.
        name: what the model is called.
        config: the model's.
        way_out: what to do where it has not; by default to quantize the model, if that
            would fit.

    Raises:
        CheckpointError: it has not.
    """
    # What is cast is held twice for a moment, one tensor at a time.
    need = sum(x.nbytes for x in weights.values())
    need += max((x.nbytes for x in weights.values()), default=0)
    room = allowed()
    if room is None or need <= room:
        return
    kinds = {x.dtype for x in weights.values()}
    packed = any(mx.issubdtype(kind, mx.integer) for kind in kinds)
    floats = [x.size for x in kinds if mx.issubdtype(x, mx.floating)]
    itemsize = max(floats, default=2)
    # On a Mac nothing is held in 32 bits; packed integers are what they are here.
    whole = sum(
        x.nbytes if mx.issubdtype(x.dtype, mx.integer) else 2 * x.size
        for x in weights.values()
    )
    way = way_out
    if way is None:
        way = _smaller(config, room, itemsize) if not packed else None
    raise CheckpointError(
        f"{name} needs {human_bytes(need)} of memory for its weights, but "
        f"{human_bytes(room)} are free here; {way or 'take a smaller model'}"
        f"{or_mac(whole + usual_bytes(config))}"
    )


def _smaller(config: MM1Config, room: int, itemsize: int) -> str | None:
    """The recipe that ``mm1 quantize`` has by itself, if what it makes fits here."""
    try:
        ways = plan(find_recipe(DEFAULT), config).packed
    except ConfigError:
        # Nothing that it packs.
        return None
    need = sum(weight_bytes(config, ways, itemsize).values())
    if need + usual_bytes(config, itemsize) > room:
        return None
    return f"'mm1 quantize' makes a {DEFAULT} one that needs {human_bytes(need)} here"


def check_answer(
    config: MM1Config, answer: Answer, *, spare: int = 0, promised: int = 0
) -> None:
    """Pass only if the device has room for an answer, the weights being there.

    Args:
        config: the model's.
        answer: what it takes.
        spare: bytes in use that would give way.
        promised: bytes that others will take.

    Raises:
        MemoryLimitError: it has not.
    """
    needs = answer.bytes(config)
    need, room = sum(needs.values()), allowed()
    if room is None:
        return
    room = max(room + spare - promised, 0)
    if need <= room:
        return
    assert config.decoder is not None
    raise MemoryLimitError(
        f"the answer needs {human_bytes(need)} ({spell_out(needs)}) of memory beside the "
        f"weights, but {human_bytes(room)} are free here; "
        f"{_way_out(config, answer, room)}"
    )


def spell_out(needs: Mapping[str, int]) -> str:
    """Bytes by what they are for, as a sum in words."""
    return " + ".join(
        f"{human_bytes(size)} {what}" for what, size in needs.items() if size
    )


def _way_out(config: MM1Config, answer: Answer, room: int) -> str:
    """What of an answer would fit."""
    for bits in (8, 4):
        packed = replace(answer, kv_bits=bits)
        narrower = answer.kv_bits is None or bits < answer.kv_bits
        if narrower and sum(packed.bytes(config).values()) <= room:
            return f"pass --kv-bits {bits}"
    if answer.tiles > 1:
        return "give fewer pictures, or a --resolution of fewer tiles"
    low, high = 0, answer.positions + answer.room
    while low < high:
        middle = (low + high + 1) // 2
        fits = replace(answer, positions=middle, room=0, reused=0, tiles=0)
        if sum(fits.bytes(config).values()) <= room:
            low = middle
        else:
            high = middle - 1
    return (
        f"prompt and --max-tokens together may be {low:,} tokens, not "
        f"{answer.positions + answer.room:,}"
    )


def or_mac(need: float) -> str:
    """The end of a refusal: the smallest Mac that has room, if one has."""
    memory = smallest_memory(need)
    return f", or use a Mac with {memory} GB" if memory else ""


def _tensors(config: MM1Config) -> dict[str, mx.array]:
    """Built lazily: no weight is allocated."""
    return MM1(replace(config, quantization=None)).tensors()


def _bits(name: str, ways: Mapping[str, Packing], itemsize: int) -> float:
    module, _, leaf = name.rpartition(".")
    way = ways.get(module) if leaf == "weight" else None
    return way.bits_per_weight(itemsize) if way else itemsize * 8
