"""What an encoder and a connector are written in: operations on states of a layout.

States are L vectors of C channels, one per patch or image token. A layout says which
axis is which, and so which of Core ML's operations a linear layer or a norm becomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mm1_mlx.coreml.numbers import Numbers
from mm1_mlx.coreml.weights import Array

# A value of the program: coremltools' ``Var``.
Value = Any


class Layout(Protocol):
    """Operations on states; ``name`` is what a result is called in the program."""

    numbers: Numbers

    def patches(self, image: Value, weight: Array, bias: Array, name: str) -> Value:
        """States of the patches of an image [1, 3, S, S], by weights [C, 3, P, P]."""

    def rows(self, table: Array) -> Any:
        """A table [L, C] as states."""

    def vector(self, values: Array) -> Any:
        """Numbers [C] that are the same at every place."""

    def linear(self, x: Value, weight: Array, bias: Array | None, name: str) -> Value:
        """Every vector times a matrix [D, C], plus a bias [D]."""

    def layer_norm(
        self, x: Value, weight: Array, bias: Array, eps: float, name: str
    ) -> Value:
        """Every vector less its mean, over its deviation, scaled and moved."""

    def rms_norm(self, x: Value, weight: Array, eps: float, name: str) -> Value:
        """Every vector over its root mean square, scaled."""

    def attend(self, q: Value, k: Value, v: Value, heads: int, name: str) -> Value:
        """What queries find among keys and values, head by head."""

    def join(self, parts: Sequence[Any]) -> Value:
        """States one behind the other."""

    def cut(self, x: Value, start: int, name: str) -> Value:
        """The states from a place on."""

    def mean(self, x: Value, name: str) -> Value:
        """The mean of all states."""

    def resample(self, x: Value, matrix: Array, name: str) -> Value:
        """A square grid of states, both sides multiplied by a matrix [s, g]."""

    def depthwise(self, x: Value, weight: Array, name: str) -> Value:
        """A square grid of states, each channel convolved by its own [3, 3]."""

    def result(self, x: Value, name: str) -> Value:
        """States as [1, L, C] in float32."""


def spell(path: str) -> str:
    """A module's path as a name that Core ML takes."""
    return path.replace(".", "_")
