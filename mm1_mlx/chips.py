"""The Macs: what their chips can do, what their memory allows, what was measured on them.

Bandwidths are Apple's, operations those of the GPU's 16-bit matrix products as Hugging
Face's hardware table has them (https://github.com/huggingface/huggingface.js/pull/1044;
M1 to M4 do 32 and 16 bits at one rate). Rows marked ``projected`` rest on secondary
sources: of the M5 family they are the neural accelerators' 1,024 operations a core and
cycle. Rates of Llama-7B are llama.cpp's, which stand for what good programs reach:
https://github.com/ggml-org/llama.cpp/discussions/4167
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
# Llama-7B as those rates were measured: bytes at 16, 8 and 4 bits, operations a token.
LLAMA_BYTES = {16: 13.48e9, 8: 7.16e9, 4: 3.82e9}
LLAMA_FLOPS = 13.3e9
# What a mixture of experts reached of its limit where a dense model reached all of its
# share: mlx-lm with Qwen3-30B-A3B on an M4 Max, 39 to 43 % at 4 bits and 54 % at 8.
MOE_SHARES = {8: 0.54, 4: 0.39}
# Of the operations, what prompts of 512 tokens and more reach: llama.cpp and MLX 60 to 78 %.
PREFILL_SHARE = 0.65


@dataclass(frozen=True)
class Chip:
    """A Mac's chip.

    Attributes:
        name: as Apple calls it.
        gpu_cores: of the variant whose figures these are.
        bandwidth: of its memory, bytes a second.
        flops: of its GPU, operations a second.
        memory: the sizes it is sold with, GiB; none where it is not sold yet.
        decoded: Llama-7B's tokens a second at 16, 8 and 4 bits, None where not measured.
        prefilled: prompt tokens a second at 16 bits, or else at 4.
        projected: whether its operations are a projection and not a measurement; where it
            is not sold yet, its bandwidth is one too.
    """

    name: str
    gpu_cores: int
    bandwidth: float
    flops: float
    memory: tuple[int, ...]
    decoded: tuple[float | None, float | None, float | None] = (None, None, None)
    prefilled: float | None = None
    projected: bool = False

    def decode_share(self, bits: int) -> float | None:
        """Share of the bandwidth that decoding with weights of so many bits reached."""
        rate = dict(zip((16, 8, 4), self.decoded, strict=True)).get(bits)
        return rate * LLAMA_BYTES[bits] / self.bandwidth if rate else None

    @property
    def prefill_share(self) -> float | None:
        """Share of the operations that prompts of 512 tokens reached."""
        if self.prefilled is None:
            return None
        return self.prefilled * LLAMA_FLOPS / self.flops

    def seconds(self, flops: float, read: float) -> float:
        """The least time for so many operations and bytes."""
        return max(flops / self.flops, read / self.bandwidth)


def _chip(
    name: str,
    cores: int,
    bandwidth: float,
    teraflops: float,
    memory: tuple[int, ...],
    decoded: tuple[float | None, float | None, float | None] = (None, None, None),
    prefilled: float | None = None,
    *,
    projected: bool = False,
) -> Chip:
    rates = bandwidth * 1e9, teraflops * 1e12
    return Chip(name, cores, *rates, memory, decoded, prefilled, projected)


CHIPS = (
    _chip("M1", 8, 68.25, 2.6, (8, 16), (None, 7.9, 14.2), 118),
    _chip("M1 Pro", 16, 200, 5.2, (16, 32), (12.8, 22.3, 36.4), 302),
    _chip("M1 Max", 32, 400, 10.4, (32, 64), (23.0, 40.2, 61.2), 600),
    _chip("M1 Ultra", 64, 800, 21, (64, 128), (37.0, 59.9, 83.7), 1169),
    _chip("M2", 10, 100, 3.6, (8, 16, 24), (6.7, 12.2, 21.9), 201),
    _chip("M2 Pro", 19, 200, 6.8, (16, 32), (13.1, 23.0, 38.9), 384),
    _chip("M2 Max", 38, 400, 13.5, (32, 64, 96), (24.7, 41.8, 66.0), 756),
    _chip("M2 Ultra", 76, 800, 27.2, (64, 128, 192), (41.0, 66.6, 94.3), 1402),
    _chip("M3", 10, 100, 4.1, (8, 16, 24), (None, 12.3, 21.3), 187),
    _chip("M3 Pro", 18, 150, 7.4, (18, 36), (9.9, 17.5, 30.7), 357),
    _chip("M3 Max", 30, 300, 10.7, (36, 96), (19.5, 34.3, 56.6), 589),
    _chip("M3 Max", 40, 400, 14.2, (48, 64, 128), (25.1, 42.8, 66.3), 779),
    _chip("M3 Ultra", 80, 819, 28.4, (96, 256, 512), (39.8, 63.9, 92.1), 1538),
    _chip("M4", 10, 120, 4.6, (16, 24, 32), (7.4, 13.5, 24.1), 230),
    _chip("M4 Pro", 20, 273, 9.2, (24, 48, 64), (17.2, 30.7, 50.7), 464),
    _chip("M4 Max", 32, 410, 14.7, (36,), (24.3, 43.9, 70.0), 736),
    _chip("M4 Max", 40, 546, 18.4, (48, 64, 128), (31.6, 54.1, 83.1), 923),
    _chip("M5", 10, 153, 17, (16, 24, 32), projected=True),
    _chip("M5 Pro", 20, 307, 35, (24, 48, 64), projected=True),
    _chip("M5 Max", 32, 460, 56, (36,), projected=True),
    # Its rates are of 4 bits, half a year after it came out.
    _chip(
        *("M5 Max", 40, 614, 70, (48, 64, 128), (None, None, 119.1), 3347),
        projected=True,
    ),
    _chip("M5 Ultra", 80, 1200, 140, (), projected=True),
)


def gpu_memory(memory: int) -> int:
    """Bytes that a Mac of so many GiB lets its GPU use.

    What Metal answered (``recommendedMaxWorkingSetSize``) on Macs of 8 to 64 GiB: two
    thirds below 36, three quarters from there on. Where there is a device, it is asked.
    """
    return memory * GIB * 3 // 4 if memory >= 36 else memory * GIB * 2 // 3


def smallest_memory(need: float) -> int | None:
    """GiB of the smallest Mac whose GPU may use so many bytes; None if there is none."""
    sizes = sorted({size for chip in CHIPS for size in chip.memory})
    return next((size for size in sizes if gpu_memory(size) >= need), None)
