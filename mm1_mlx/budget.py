"""What a run takes of memory, from the config and before it begins; and what there is.

On Metal to run out of memory ends the process, and no exception says so. What will not
fit is refused instead, with the numbers and what would fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

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
from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.models import MM1

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
    """

    positions: int
    room: int
    tiles: int = 0
    reused: int = 0
    itemsize: int = 2
    kv_bits: int | None = None
    kv_group_size: int = 64
    kv_start: int = 0

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
        if self.kv_bits is None:
            return kv_bytes(decoder, positions, self.itemsize)
        plain = min(positions, max(self.kv_start, PREFILL_STEP))
        return max(
            kv_bytes(decoder, plain, self.itemsize),
            kv_bytes(
                decoder, positions, self.itemsize, self.kv_bits, self.kv_group_size
            ),
        )


def allowed() -> int | None:
    """Bytes that this process may still take on its device; None if nothing says so.

    On Metal what is left of the working set that the device recommends; on a CPU what
    the system has, its swap included. A container's own limit is not seen.
    """
    used, kept = mx.get_active_memory(), mx.get_cache_memory()
    info = mx.device_info()
    if mx.default_device() != mx.cpu:
        limit = info.get("max_recommended_working_set_size")
        return None if limit is None else int(limit) - used
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        sizes = {words[0]: int(words[1]) * 1024 for words in lines}
        return sizes["MemAvailable:"] + sizes.get("SwapFree:", 0) + kept
    size = info.get("memory_size")
    return None if size is None else int(size) - used


def check_load(
    weights: Mapping[str, mx.array], name: object, way_out: str | None = None
) -> None:
    """Pass only if the device has room for these weights, which may be lazy.

    Args:
        weights: the tensors as they will be held.
        name: what the model is called.
        way_out: what to do where it has not; by default to quantize it.

    Raises:
        CheckpointError: it has not.
    """
    # What is cast is held twice for a moment, one tensor at a time.
    need = sum(x.nbytes for x in weights.values())
    need += max((x.nbytes for x in weights.values()), default=0)
    room = allowed()
    if room is None or need <= room:
        return
    packed = any(mx.issubdtype(x.dtype, mx.integer) for x in weights.values())
    numbers = sum(x.size for x in weights.values())
    smaller = f"'mm1 quantize' makes a 4-bit one of about {_gb(numbers * 4.5 / 8)}"
    way = way_out or ("take a smaller model" if packed else smaller)
    raise CheckpointError(
        f"{name} needs {_gb(need)} of memory for its weights, but {_gb(room)} are free "
        f"here; {way}{_or_mac(need)}"
    )


def check_answer(config: MM1Config, answer: Answer) -> None:
    """Pass only if the device has room for an answer, the weights being there.

    Raises:
        PromptError: it has not.
    """
    needs = answer.bytes(config)
    need, room = sum(needs.values()), allowed()
    if room is None or need <= room:
        return
    assert config.decoder is not None
    parts = " + ".join(f"{_gb(n)} {what}" for what, n in needs.items())
    raise PromptError(
        f"the answer needs {_gb(need)} ({parts}) of memory beside the weights, but "
        f"{_gb(room)} are free here; {_way_out(config, answer, room)}"
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


def _or_mac(need: float) -> str:
    memory = smallest_memory(need)
    return f", or use a Mac with {memory} GB" if memory else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _tensors(config: MM1Config) -> dict[str, mx.array]:
    """Built lazily: no weight is allocated."""
    return MM1(replace(config, quantization=None)).tensors()


def _bits(name: str, ways: Mapping[str, Packing], itemsize: int) -> float:
    module, _, leaf = name.rpartition(".")
    way = ways.get(module) if leaf == "weight" else None
    return way.bits_per_weight if way else itemsize * 8
