"""One step of a conversion: some source tensors, and what becomes of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from mm1_mlx.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """Some source tensors, and what becomes of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    # Takes all sources at once, or each by itself if what it makes of them is gathered.
    function: Callable[..., tuple[mx.array, ...]]
    # Whether what the function makes of each source is stacked, in the sources' order.
    gather: bool = False
    # Whether the one source becomes the one target as it is.
    plain: bool = False

    def __call__(
        self, read: Callable[[str], mx.array]
    ) -> Iterable[tuple[str, mx.array]]:
        """The target tensors by name; ``read`` gives a source tensor."""
        if self.gather:
            pieces = (self.function(read(name)) for name in self.sources)
            tensors = _stacked(pieces, self.sources)
        else:
            tensors = list(self.function(*map(read, self.sources)))
        return zip(self.targets, tensors, strict=True)

    def shapes(self, found: Shapes) -> list[tuple[int, ...]]:
        """The targets' shapes, from the sources'; nothing is computed.

        Raises:
            ValueError: the function cannot take a source of its shape, or what it makes
                of several differs in shape.
        """
        given = [mx.zeros(found[name]) for name in self.sources]
        if not self.gather:
            return [tuple(x.shape) for x in self.function(*given)]
        made = [self.function(x) for x in given]
        return [
            tuple(mx.stack(list(pieces)).shape) for pieces in zip(*made, strict=True)
        ]


def _stacked(
    pieces: Iterable[tuple[mx.array, ...]], names: tuple[str, ...]
) -> list[mx.array]:
    """The pieces along a new first axis, filled one by one: only one is held besides.

    Raises:
        CheckpointError: they are not all of one type.
    """
    tensors: list[mx.array] = []
    for i, parts in enumerate(pieces):
        if not tensors:
            tensors = [mx.zeros((len(names), *x.shape), x.dtype) for x in parts]
        for tensor, part in zip(tensors, parts, strict=True):
            if part.dtype != tensor.dtype:
                raise CheckpointError(
                    f"source tensor {names[i]!r} holds {part.dtype}, but {names[0]!r}, "
                    f"which stands beside it, {tensor.dtype}; save both in one type"
                )
            tensor[i] = part
        mx.eval(tensors)
    return tensors
