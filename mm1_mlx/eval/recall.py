"""Boxes of an answer and the right one -> whether the object was found. No mlx.

RefCOCO: an object counts as found if its box and the answer's share more than half of
what they cover together (recall at IoU 0.5; "greater than" in the paper of the data set,
Yu et al., arXiv 1608.00272, and in apple/ml-ferret, ferret/eval/eval_refexp.py).
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5
Box = Sequence[float]


def overlap(one: Box, other: Box) -> float:
    """What two boxes [x1, y1, x2, y2] share of what they cover together (IoU)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    covered = _area(one) + _area(other) - shared
    return shared / covered if covered else 0.0


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
