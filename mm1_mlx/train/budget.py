"""What a training step takes of memory and time, from the config and before it begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mm1_mlx.adapters.attach import LEAVES
from mm1_mlx.budget import encode_bytes, or_mac, spell_out, weight_bytes
from mm1_mlx.chips import Chip
from mm1_mlx.config import MM1Config, Packing
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import packed_ways
from mm1_mlx.room import allowed
from mm1_mlx.sizes import human_bytes
from mm1_mlx.train.cross_entropy import block_rows
from mm1_mlx.train.optimizer import kept_numbers
from mm1_mlx.train.sample import Batch
from mm1_mlx.work import decoder_flops, encode_flops

# Arrays that a block keeps for its gradients: of the width D, which are float32 whatever
# is computed with, as norms are, and of the MLP's width; measured with decoders of several
# sizes. Of all scores their softmax: on a CPU mlx was measured to compute them again, on
# Metal nothing was measured.
KEPT_STATES, KEPT_HIDDEN, KEPT_SCORES = 14, 4, 1
# Others of all scores, of the one block whose gradients are computed.
WORKING_SCORES = 2
# Arrays of the width D that stand between two blocks which are computed again; measured.
KEPT_BETWEEN = 5
# Arrays of a block's scores that are there at once, in float32; measured likewise.
KEPT_SCORED = 8
# Bytes of a trained number, whatever is computed with.
MASTER = 4
HEADS = {"decoder.lm_head.weight", "decoder.embed_tokens.weight"}
# Those that are counted: a region sampler is little beside them.
COUNTED = ("vision", "connector", "decoder")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Training:
    """A training step.

    Attributes:
        rows: of a micro-batch.
        positions: of a row.
        tiles: of a micro-batch.
        targets: positions of a micro-batch that are learned, all of them if None.
        parts: that are trained; the others only run forward.
        trained: shapes of what is trained, by path, None for all of the parts.
        optimizer: "adamw", "muon" or "adafactor".
        checkpointing: whether blocks are computed again for their gradients.
        micro_batches: whose gradients are averaged.
        workers: micro-batches that are computed side by side.
        ahead: others whose pictures are decoded meanwhile.
        itemsize: bytes of a number that is computed with; trained ones have 4, and so
            have their gradients and what the optimizer keeps.
        ways: how modules are packed, by path; no others are.
        segments: of the examples that stand behind one another in the only row, which
            attend to themselves; empty where every row is one.
        data: bytes of rows that are kept decoded.
    """

    rows: int
    positions: int
    tiles: int = 0
    targets: int | None = None
    parts: tuple[str, ...] = COUNTED
    trained: Shapes | None = None
    optimizer: str = "adamw"
    checkpointing: bool = False
    micro_batches: int = 1
    workers: int = 1
    ahead: int = 0
    itemsize: int = 4
    ways: Mapping[str, Packing] = field(default_factory=dict)
    segments: tuple[int, ...] = ()
    data: int = 0

    @property
    def tokens(self) -> int:
        """Positions of a step, those that fill short rows included."""
        return self.rows * self.positions * self.micro_batches

    def bytes(self, config: MM1Config) -> dict[str, int]:
        """By what they are for; the largest moment of the last.

        Raises:
            ConfigError: there is no such optimizer, or packed weights are to be trained.
        """
        trained = self._trained(config)
        numbers = sum(map(prod, trained.values()))
        adapters = sum(prod(x) for name, x in trained.items() if ".lora_" in name)
        weights = sum(weight_bytes(config, self.ways, self.itemsize).values())
        weights += (numbers - adapters) * (MASTER - self.itemsize) + adapters * MASTER
        state = (kept_numbers(self.optimizer, *weight) for weight in trained.items())
        rounded = numbers * self.itemsize if self.itemsize < MASTER else 0
        # Of the head: its gradients by one block of rows, beside the sum of all blocks'.
        head = max((prod(trained[name]) for name in HEADS & {*trained}), default=0)
        kept = self.activations(config) + rounded + head * MASTER
        # Those of all else come later than the scores: there is never all of both.
        kept -= min(self._scored(config), (numbers - head) * MASTER)
        if self.checkpointing:
            # Measured: those of blocks that are computed again stand twice.
            kept += numbers * MASTER
        # The step's new values stand beside the old ones.
        working = max(self.workers * kept, numbers * MASTER)
        # The sum so far, and those of every micro-batch that is under way.
        gradients = min(self.micro_batches, 1 + self.workers)
        return {
            "weights": weights,
            "gradients": numbers * MASTER * gradients,
            "optimizer": sum(state) * MASTER,
            "activations": working,
            "pictures": self._pixels(config) * MASTER,
            "rows": self.data,
        }

    def _pixels(self, config: MM1Config) -> int:
        """Numbers of the decoded pictures; those that are encoded are also stacked."""
        if config.image is None:
            return 0
        held = 2 * self.workers + self.ahead
        return held * self.tiles * config.image.size**2 * 3

    def _trained(self, config: MM1Config) -> Shapes:
        """Shapes of what is trained, by path."""
        if self.trained is not None:
            return self.trained
        shapes = {
            name: shape
            for name, shape in _shapes(config).items()
            if name.partition(".")[0] in self.parts
        }
        packed = {path.partition(".")[0] for path in self.ways} & set(self.parts)
        if packed:
            raise ConfigError(
                f"{sorted(packed)} cannot be trained, their weights are packed; train "
                "other parts, or the model that was quantized"
            )
        return shapes

    def flops(self, config: MM1Config) -> int:
        """Operations of a step: of a pass forward, and twice that of one backward.

        The gradients of a part's weights, and those of the states that it read, are as
        many operations each as the part itself. States need none where nothing before
        them is trained, nor do weights that are frozen; those of adapters, a hundredth,
        are left out.
        """
        vision = encode_flops(replace(config, connector=None), self.tiles)
        forward = {
            "vision": vision,
            "connector": encode_flops(config, self.tiles) - vision,
            "decoder": 0,
        }
        if config.decoder:
            forward["decoder"] = self.rows * sum(
                decoder_flops(config.decoder, length, rows=length)
                for length in self.segments or (self.positions,)
            )
        total, learns = 0, 0.0
        for part, once in forward.items():
            # Of what stands before all that is trained nothing is computed backward.
            learns = 1.0 if learns else self._reach(config, part)
            back = learns * (1 + self.checkpointing) + self._share(config, part)
            total += once + round(once * back)
        return total * self.micro_batches

    def _reach(self, config: MM1Config, part: str) -> float:
        """How much of a part stands at or behind the first of it that is trained, of 1."""
        if part not in self.parts:
            return 0.0
        names = [name for name in self.trained or () if name.startswith(f"{part}.")]
        found = [re.search(r"\.layers\.(\d+)\.", name) for name in names]
        blocks = [int(match[1]) for match in found if match]
        if not blocks or len(blocks) < len(names):
            return 1.0
        decoder, vision = config.decoder, config.vision
        depths = {
            "decoder": decoder.num_hidden_layers if decoder else 0,
            "vision": vision.depth if vision else 0,
        }
        depth = depths.get(part) or max(blocks) + 1
        return 1 - min(blocks) / depth

    def _share(self, config: MM1Config, part: str) -> float:
        """How much of a part's own weights is trained, of 1."""
        if part not in self.parts:
            return 0.0
        if self.trained is None:
            return 1.0
        own = {
            name: prod(shape)
            for name, shape in _shapes(config).items()
            if name.startswith(f"{part}.")
        }
        trained = sum(
            prod(shape)
            for name, shape in self.trained.items()
            if name.startswith(f"{part}.") and name.rpartition(".")[2] not in LEAVES
        )
        return trained / sum(own.values())

    def activations(self, config: MM1Config) -> int:
        """Bytes that one micro-batch keeps for its gradients."""
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
                    L * L,
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
            pairs = sum(T * T for T in self.segments or (self.positions,))
            total += self._blocks(blocks, size, pairs)
        return total + self._scored(config)

    def _scored(self, config: MM1Config) -> int:
        """Bytes of the scores that are there at once."""
        if config.decoder is None:
            return 0
        learned = self.rows * self.positions if self.targets is None else self.targets
        rows = min(block_rows(config.decoder.vocab_size), learned)
        return KEPT_SCORED * rows * config.decoder.vocab_size * 4

    def _blocks(
        self, blocks: list[tuple[int, int]], size: tuple[int, int, int], pairs: int
    ) -> int:
        """Bytes of blocks, each of an MLP's width and some heads, over states [N, L, D].

        ``pairs`` of the L positions attend to one another.
        """
        (N, L, D), item = size, self.itemsize
        states, hidden = L * KEPT_STATES * D * 4, L * KEPT_HIDDEN
        kept = [
            N * (states + item * (hidden * width + KEPT_SCORES * heads * pairs))
            for width, heads in blocks
        ]
        most = max(heads for _, heads in blocks)
        working = WORKING_SCORES * N * most * pairs * item
        if self.checkpointing:
            # All of one block at a time.
            between = KEPT_BETWEEN * len(blocks) * N * L * D * item
            return between + max(kept) + working
        return sum(kept) + working


@lru_cache(maxsize=4)
def _shapes(config: MM1Config) -> Shapes:
    """Shapes of a model's weights by path, as they are before they are packed."""
    tensors = MM1(replace(config, quantization=None)).tensors()
    return {name: tuple(x.shape) for name, x in tensors.items()}


def step_seconds(chip: Chip, config: MM1Config, training: Training) -> float:
    """Least time of a step on a chip.

    Weights are read forward and backward; gradients and what the optimizer keeps are
    read and written.
    """
    needs = training.bytes(config)
    read = 2 * training.micro_batches * needs["weights"]
    read += 2 * (needs["gradients"] + needs["optimizer"])
    return chip.seconds(training.flops(config), read)


def training_of(
    model: MM1,
    batch: Batch,
    optimizer: str,
    micro_batches: int = 1,
    workers: int = 1,
    *,
    itemsize: int = MASTER,
    checkpointing: bool = False,
    ahead: int = 0,
    data: int = 0,
) -> Training:
    """The step that trains what is not frozen of a model on batches like this one."""
    trained: Any = tree_flatten(model.trainable_parameters())
    shapes = {path: tuple(x.shape) for path, x in trained}
    rows, positions = batch.tokens.shape
    return Training(
        rows=rows,
        positions=positions,
        segments=batch.segments,
        tiles=sum(len(picture.tiles) for picture in batch.pictures),
        targets=int(batch.learned[:, 1:].sum()),
        parts=tuple(p for p in COUNTED if any(x.startswith(f"{p}.") for x in shapes)),
        trained=shapes,
        optimizer=optimizer,
        micro_batches=micro_batches,
        workers=workers,
        ahead=ahead,
        itemsize=itemsize,
        checkpointing=checkpointing,
        ways=packed_ways(model),
        data=data,
    )


def check_training(config: MM1Config, training: Training) -> None:
    """Pass only if the device has room for a training step.

    Of the weights, and of what the optimizer keeps, what is in memory already is not
    counted again.

    Raises:
        ConfigError: it has not; or ``Training.bytes`` says what cannot be trained.
    """
    needs, room = training.bytes(config), allowed()
    if room is None:
        return
    room += min(mx.get_active_memory(), needs["weights"] + needs["optimizer"])
    need = sum(needs.values())
    if need > room:
        raise ConfigError(
            f"a training step needs {human_bytes(need)} ({spell_out(needs)}) of memory, "
            f"but {human_bytes(room)} are free here; "
            f"{_way_out(config, training, room)}{or_mac(need)}"
        )


def _way_out(config: MM1Config, training: Training, room: int) -> str:
    """What of a training step would fit."""

    def fits(changed: Training) -> bool:
        return sum(changed.bytes(config).values()) <= room

    def with_rows(rows: int) -> Training:
        tiles = -(-training.tiles * rows // training.rows)
        targets = training.targets
        if targets is not None:
            targets = -(-targets * rows // training.rows)
        return replace(training, rows=rows, tiles=tiles, targets=targets)

    alone = replace(training, micro_batches=1, workers=1)
    if fits(alone):
        return "train on one micro-batch a step"
    if rows := _most(training.rows, lambda n: fits(with_rows(n))):
        return f"give batches of at most {rows} rows, not {training.rows}"
    few = replace(with_rows(1), micro_batches=1, workers=1)
    ways = {"give": few}
    if config.connector and training.parts != ("connector",):
        less = replace(few, parts=("connector",), trained=None)
        ways["train the connector alone, and give"] = less
    for words, step in ways.items():

        def fits_so_long(positions: int, step: Training = step) -> bool:
            return fits(replace(step, positions=positions, segments=()))

        tokens = _most(step.positions + 1, fits_so_long)
        if tokens:
            return f"{words} batches of one row of at most {tokens:,} tokens"
    return "train a smaller model"


def _most(below: int, fits: Callable[[int], bool]) -> int:
    """The largest number under ``below`` that fits, 0 if none does."""
    low, high = 0, below - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
