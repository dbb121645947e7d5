"""An answer and those that are right -> average normalised Levenshtein similarity.

ANLS (Biten et al., arXiv 1905.13648) with its threshold of 0.5, for DocVQA and InfoVQA:
letters that were read wrong cost a little, another answer everything. No mlx.

Source: the metric of https://rrc.cvc.uab.es/?ch=17&com=tasks, as
https://github.com/EvolvingLMMs-Lab/lmms-eval/blob/75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3/lmms_eval/api/metrics.py
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def anls(answer: str, answers: Sequence[str]) -> float:
    """1 less the smallest share of letters to change; 0 if less than half is alike."""
    best = max(_similarity(answer, known) for known in answers)
    return best if best >= THRESHOLD else 0.0


def _similarity(one: str, other: str) -> float:
    # Of the texts as they are written, spaces included, as upstream has it.
    longest = max(len(one), len(other))
    one, other = _plain(one), _plain(other)
    if abs(len(one) - len(other)) > longest * (1 - THRESHOLD):
        return (
            0.0  # Their distance is no less, and the square of their lengths is saved.
        )
    return 1 - levenshtein(one, other) / longest if longest else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def levenshtein(one: str, other: str) -> int:
    """How many letters must be put in, taken out or replaced."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, met in enumerate(other, start=1):
            replaced = above + (letter != met)
            above = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]
