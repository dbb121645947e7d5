"""An answer and the right one -> whether numbers agree within 5 %, texts exactly.

Relaxed accuracy of ChartQA (Masry et al., arXiv 2203.10244, section 5.1). No mlx.

Source: https://github.com/EvolvingLMMs-Lab/lmms-eval/blob/75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3/lmms_eval/tasks/chartqa/utils.py
"""

from __future__ import annotations

TOLERANCE = 0.05


def relaxed_match(answer: str, right: str) -> bool:
    """Whether an answer is the right one, as ChartQA counts it.

    A right answer of 0 is matched by its text alone: 5 % of it is nothing.
    """
    answer, right = answer.strip(), right.strip()
    number, target = _number(answer), _number(right)
    if number is not None and target:
        return abs(number - target) / abs(target) <= TOLERANCE
    return answer.lower() == right.lower()


def _number(text: str) -> float | None:
    """The number that a text spells, a percentage as a share."""
    percent = text.endswith("%")
    try:
        value = float(text.rstrip("%") if percent else text)
    except ValueError:
        return None
    return value / 100 if percent else value
