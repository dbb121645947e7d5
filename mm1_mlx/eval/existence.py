"""Answers to "is there a ...?" -> whether objects are seen, or made up: POPE.

Li et al., arXiv 2305.10355. What a sentence answers is read as LLaVA reads it. No mlx.

Source: https://github.com/haotian-liu/LLaVA/blob/c121f0432da27facab705978f83c4ada465e46fd/llava/eval/eval_pope.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mm1_mlx.eval.intervals import Figure, Scores, bootstrap, share

_DENIALS = {"No", "no", "not"}


def says_yes(answer: str) -> bool:
    """Whether the first sentence of an answer has no "no", "No" or "not" in it.

    Words end at any white space. LLaVA's end at blanks, where "No", a line break and "It" are one.
    """
    sentence = answer.partition(".")[0].replace(",", "")
    return not _DENIALS & set(sentence.split())


def pope(answers: Sequence[bool], right: Sequence[bool]) -> dict[str, Figure]:
    """Accuracy, precision, recall, F1 and the share of "yes".

    Precision is of the questions answered with "yes", recall of those where it is right.

    Args:
        answers: whether each answer is "yes".
        right: whether "yes" is right.
    """
    rows = np.array([answers, right], np.float64).T
    hits = [a == b for a, b in zip(answers, right, strict=True)]
    return {
        "accuracy": share(hits, chance=0.5),
        "precision": share([b for a, b in zip(answers, right, strict=True) if a]),
        "recall": share([a for a, b in zip(answers, right, strict=True) if b]),
        "f1": bootstrap(rows, _f1),
        "yes_ratio": share(answers),
    }


def _f1(rows: Scores) -> float:
    """The harmonic mean of precision and recall; NaN without any "yes"."""
    total = float(rows.sum())
    return 2 * float((rows[:, 0] * rows[:, 1]).sum()) / total if total else math.nan
