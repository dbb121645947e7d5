"""What a training step takes of memory, from the config and before it begins."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from mm1_mlx.budget import encode_bytes
from mm1_mlx.config import MM1Config
from mm1_mlx.models import MM1

# Arrays of the width D, of the MLP's width and of all scores that a block keeps for its
# gradients; measured with decoders of several sizes.
KEPT_STATES, KEPT_HIDDEN, KEPT_SCORES = 6, 4, 2
# Logits, their softmax and both gradients, in float32.
KEPT_LOGITS = 4


@dataclass(frozen=True)
class Training:
    """A training step.

    Attributes:
        rows: of a batch.
        positions: of a row.
        tiles: of a batch.
        parts: that are trained; the others only run forward.
        lora_rank: of adapters on the parts' linear layers, None to train every weight.
        optimizer: AdamW keeps two numbers of every weight, AdaFactor sums of rows and of
            columns.
        checkpointing: whether blocks are computed again for their gradients.
        itemsize: bytes of a number.
    """

    rows: int
    positions: int
    tiles: int = 0
    parts: tuple[str, ...] = ("vision", "connector", "decoder")
    lora_rank: int | None = None
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    checkpointing: bool = False
    itemsize: int = 4

    def bytes(self, config: MM1Config) -> dict[str, int]:
        """By what they are for; the largest moment of the last."""
        shapes = {k: tuple(x.shape) for k, x in MM1(config).tensors().items()}
        trained = [
            shape
            for name, own in shapes.items()
            if name.partition(".")[0] in self.parts
            for shape in self._trained(name, own)
        ]
        adapters = sum(map(prod, trained)) if self.lora_rank else 0
        weights = sum(map(prod, shapes.values())) + adapters
        gradients = sum(map(prod, trained))
        # The step's new values stand beside the old ones.
        working = max(self._activations(config), gradients * self.itemsize)
        return {
            "weights": weights * self.itemsize,
            "gradients": gradients * self.itemsize,
            "optimizer": sum(map(self._state, trained)) * self.itemsize,
            "activations": working,
        }

    def _trained(self, name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of what is trained of a tensor."""
        if self.lora_rank is None:
            return [shape]
        if ".layers." not in name or len(shape) < 2:
            return []
        *experts, rows, columns = shape
        r = self.lora_rank
        return [(*experts, rows, r), (*experts, r, columns)]

    def _state(self, shape: tuple[int, ...]) -> int:
        """Numbers that the optimizer keeps of a tensor."""
        if self.optimizer == "adamw":
            return 2 * prod(shape)
        if len(shape) < 2:
            return prod(shape)
        return prod(shape[:-1]) + prod((*shape[:-2], shape[-1]))

    def _activations(self, config: MM1Config) -> int:
        """Bytes that are kept for the gradients."""
        vision, decoder = config.vision, config.decoder
        total = 0
        if vision and self.tiles:
            if "vision" in self.parts:
                side = config.image.size if config.image else vision.image_size
                L = (side // vision.patch_size) ** 2 + vision.class_token
                total += self._blocks(
                    [
                        (vision.intermediate_size, vision.num_attention_heads)
                        for _ in range(vision.depth)
                    ],
                    (self.tiles, L, vision.hidden_size),
                )
            total += encode_bytes(config, self.tiles, self.itemsize)
        if decoder:
            blocks = []
            for i in range(decoder.num_hidden_layers):
                sizes = decoder.sizes(i)
                used = 1
                if decoder.moe and decoder.is_sparse(i):
                    used = decoder.moe.experts_per_token
                width = used * sizes.intermediate_size
                blocks.append((width, sizes.num_attention_heads))
            size = (self.rows, self.positions, decoder.hidden_size)
            total += self._blocks(blocks, size)
            logits = self.rows * self.positions * decoder.vocab_size
            total += KEPT_LOGITS * logits * 4
        return total

    def _blocks(self, blocks: list[tuple[int, int]], size: tuple[int, int, int]) -> int:
        """Bytes of blocks, each of an MLP's width and some heads, over states [N, L, D]."""
        N, L, D = size
        kept = [
            N * L * (KEPT_STATES * D + KEPT_HIDDEN * width)
            + KEPT_SCORES * N * heads * L * L
            for width, heads in blocks
        ]
        if self.checkpointing:
            # What goes in and comes out of every block, and all of one at a time.
            return (2 * len(blocks) * N * L * D + max(kept)) * self.itemsize
        return sum(kept) * self.itemsize
