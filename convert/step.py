"""One step of a conversion: some source tensors, and what becomes of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from mm1_mlx.errors import CheckpointError
from mm1_mlx.pieces import Readable, read_in_pieces
from mm1_mlx.shard import Deferred

Shapes = Mapping[str, tuple[int, ...]]
Find = Callable[[str], Readable]


@dataclass(frozen=True)
class Step:
    """Some source tensors, and what becomes of them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    # Takes all sources at once, or each by itself if what it makes of them is gathered.
    function: Callable[..., tuple[mx.array, ...]]
    # Whether what the function makes of each source is stacked, in the sources' order.
    gather: bool = False
    # Whether what it makes of each place along the one source's first axis is stacked.
    each: bool = False
    # The only place along the one source's first axis that it takes.
    row: int | None = None
    # Whether the one source becomes the one target as it is.
    plain: bool = False

    def shapes(self, found: Shapes) -> list[tuple[int, ...]]:
        """The targets' shapes, from the sources'; nothing is computed.

        Raises:
            ValueError: the function cannot take a source of its shape, or what it makes
                of several differs in shape.
        """
        given = [mx.zeros(found[name]) for name in self.sources]
        return [tuple(x.shape) for x in self._results(given)]

    def tensors(self, find: Find) -> Iterator[tuple[str, Deferred]]:
        """The target tensors by name; ``find`` gives a source tensor.

        Raises:
            CheckpointError: what is to be stacked is not all of one type.
        """
        sources = [find(name) for name in self.sources]
        if self.gather:
            self._check_types(sources)
        made = self._results([mx.zeros(x.shape, x.dtype) for x in sources])
        for i, (target, x) in enumerate(zip(self.targets, made, strict=True)):
            pieces = partial(self._pieces, sources, i)
            yield target, Deferred(tuple(x.shape), x.dtype, pieces)

    def _results(self, given: list[mx.array]) -> list[mx.array]:
        """What becomes of these arrays, lazily."""
        if self.gather:
            made = [self.function(x) for x in given]
            return [mx.stack(list(pieces)) for pieces in zip(*made, strict=True)]
        if self.each:
            (x,) = given
            rows = self.function(x[0])
            return [mx.broadcast_to(row, (x.shape[0], *row.shape)) for row in rows]
        if self.row is not None:
            given = [given[0][self.row]]
        return list(self.function(*given))

    def _pieces(self, sources: list[Readable], target: int) -> Iterator[mx.array]:
        """One target's values, in order; no more is read at a time than one piece needs."""
        first = sources[0]
        if self.plain:
            yield from read_in_pieces(first)
        elif self.gather:
            yield from (self.function(x.read())[target] for x in sources)
        elif self.each or self.row is not None:
            places = range(first.shape[0]) if self.row is None else (self.row,)
            for i in places:
                yield self.function(first.read(slice(i, i + 1))[0])[target]
        else:
            yield self.function(*(x.read() for x in sources))[target]

    def _check_types(self, sources: list[Readable]) -> None:
        for name, source in zip(self.sources, sources, strict=True):
            if source.dtype != sources[0].dtype:
                raise CheckpointError(
                    f"source tensor {name!r} holds {source.dtype}, but "
                    f"{self.sources[0]!r}, which stands beside it, {sources[0].dtype}; "
                    "save both in one type"
                )
