"""A checkpoint of differences, read as the sum with what they are from.

https://github.com/apple/ml-ferret/blob/3c9e5c9/ferret/model/apply_delta.py
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import mlx.core as mx

from mm1_mlx.errors import CheckpointError
from mm1_mlx.pieces import ALL, Readable, TensorInfo

from .source import Source

# What a base does not have: taken as it is.
OWN = ("model.mm_projector.", "model.region_geo_sampler.", "model.vision_tower.")
# Tokens that were added to the base's have rows behind its own.
GROWN = ("model.embed_tokens.weight", "lm_head.weight")
# Buffers that old versions saved.
BUFFER = "rotary_emb.inv_freq"


class Delta(Source):
    """Differences, whose tensors are read with the base's added.

    Args:
        name: a folder or a hub repository of differences.
        base: the same of what they are from.
        out: the place of the model to be made, beside which pickles are unpacked.

    Raises:
        CheckpointError: one of them cannot be had.
    """

    def __init__(self, name: str, base: str, out: Path | None = None) -> None:
        super().__init__(name, out)
        self.base = Source(base, out)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.base.__exit__(kind, error, traceback)
        super().__exit__(kind, error, traceback)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the sum.

        Raises:
            CheckpointError: the two do not belong together.
        """
        tensors, base = super().tensors, self.base.tensors
        lost = sorted(x for x in {*base} - {*tensors} if not x.endswith(BUFFER))
        more = sorted(x for x in {*tensors} - {*base} if not x.startswith(OWN))
        more = [x for x in more if not x.endswith(BUFFER)]
        if lost or more:
            where = self.name if lost else self.base.name
            raise CheckpointError(
                f"{where} lacks {(lost or more)[:3]} of "
                f"{self.base.name if lost else self.name}, so they cannot be added; "
                "give the base that the differences are from"
            )
        for name in sorted({*base} & {*tensors}):
            _check_shapes(name, tensors[name].shape, base[name].shape)
        licences = dict.fromkeys(x for x in (self.licence, self.base.licence) if x)
        self.licence = " and ".join(licences) or None
        return tensors

    def tensor(self, name: str) -> Readable:
        """One tensor: the difference with the base's added.

        Raises:
            CheckpointError: one is not of a 16- or 32-bit floating-point type.
        """
        delta = super().tensor(name)
        if name not in self.base.tensors or name.endswith(BUFFER):
            return delta
        return Sum(delta, self.base.tensor(name))

    def files(self) -> list[Path]:
        """Every file of both."""
        return super().files() + self.base.files()


@dataclass(frozen=True)
class Sum:
    """A difference and the base's tensor, in the difference's type."""

    delta: Readable
    base: Readable

    @property
    def shape(self) -> tuple[int, ...]:
        """The difference's."""
        return self.delta.shape

    @property
    def dtype(self) -> mx.Dtype:
        """The difference's."""
        return self.delta.dtype

    def read(self, rows: slice = ALL) -> mx.array:
        """The sum's values, or those of some places along the first axis."""
        delta = self.delta.read(rows)
        base = self.base.read(rows).astype(delta.dtype)
        if base.shape == delta.shape:
            return delta + base
        shared = base.shape[0]
        return mx.concatenate([delta[:shared] + base, delta[shared:]])


def _check_shapes(name: str, delta: tuple[int, ...], base: tuple[int, ...]) -> None:
    longer = len(delta) == len(base) and delta[:1] >= base[:1] > (0,)
    grown = name in GROWN and longer and delta[1:] == base[1:]
    if delta != base and not grown:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(delta)}, but {list(base)} in the base; give "
            "the base that the differences are from"
        )
