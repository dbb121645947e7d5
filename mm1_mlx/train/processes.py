"""What the processes of one run tell each other, and what one says when another is gone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import ConfigError

# How what mlx says of its connections begins.
_BACKENDS = ("[ring]", "[jaccl]", "[mpi]", "[nccl]")


def is_of_another(error: Exception) -> bool:
    """Whether mlx raised it because another process is gone."""
    return str(error).startswith(_BACKENDS)


def ended(error: Exception) -> str:
    """Such an error, said to a user."""
    return f"another process of the run has ended ({error})"


@contextmanager
def among_processes() -> Iterator[None]:
    """Says in one line that another process is gone; what a function does, if it has it.

    Raises:
        ConfigError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_another(error):
            raise
        raise ConfigError(
            f"{ended(error)}, which says why; mend that, and give all of them the same "
            "command"
        ) from None


def first_arrays(arrays: Sequence[mx.array]) -> list[mx.array]:
    """The first process's arrays, in all of them; shapes are everywhere the same."""
    group = mx.distributed.init()
    if group.size() == 1:
        return list(arrays)
    told = []
    for x in arrays:
        own = x if group.rank() == 0 else mx.zeros_like(x)
        told.append(mx.distributed.all_sum(own, stream=mx.cpu))
        # One after another: else two could be under way in different orders.
        mx.eval(told[-1])
    return told


def first_text(text: str) -> str:
    """The first process's text, in all of them."""
    return _text_of(0, text)


def all_texts(text: str) -> list[str]:
    """Every process's text, in their order, in all of them."""
    return [_text_of(rank, text) for rank in range(mx.distributed.init().size())]


def agree(facts: Mapping[str, str]) -> None:
    """Pass only if they are the same in all processes; the first difference is named.

    Raises:
        ConfigError: they are not; in all of them.
    """
    ours, *others = map(json.loads, all_texts(json.dumps(dict(facts))))
    for rank, theirs in enumerate(others, 1):
        for name in {**ours, **theirs}:
            its, said = (facts.get(name, "none") for facts in (theirs, ours))
            if its != said:
                raise ConfigError(
                    f"process {rank} of the run and the first one do not agree on {name}: "
                    f"{its:.90} and {said:.90}; give all of them the same"
                )


def _text_of(rank: int, text: str) -> str:
    """The text of one process, in all of them."""
    group = mx.distributed.init()
    if group.size() == 1:
        return text
    mine = group.rank() == rank
    own = np.frombuffer(text.encode(), np.uint8) if mine else np.zeros(0)
    sizes = mx.distributed.all_sum(mx.array(len(own)), stream=mx.cpu)
    padded = np.zeros(cast(int, sizes.item()), np.int32)
    padded[: len(own)] = own
    told = mx.distributed.all_sum(mx.array(padded), stream=mx.cpu)
    return bytes(cast(list[int], told.tolist())).decode()
