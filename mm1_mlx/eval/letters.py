"""An answer to a question with options -> which option it means, without a judge. No mlx.

A letter is looked for as MMBench's code does before it asks ChatGPT, and so as LLaVA
does: "B", "B.", "(B)", "The answer is B."; else the text of one option.

Source: https://github.com/EvolvingLMMs-Lab/lmms-eval/blob/75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3/lmms_eval/tasks/mmbench/mmbench_evals.py
and https://github.com/haotian-liu/LLaVA/blob/c121f0432da27facab705978f83c4ada465e46fd/llava/eval/eval_science_qa.py
"""

from __future__ import annotations

from collections.abc import Sequence

from mm1_mlx.train.data.questions import LETTERS

# What may stand around a letter, tried one after another.
_MARKS = (
    ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"),
    ("(", ")."), (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
# In a longer answer a lone "A" is an article.
_SHORT = 3


def find_option(answer: str, choices: Sequence[str]) -> int | None:
    """The option that an answer means, counted from 0; None if it means none, or two."""
    number = _find_letter(answer, len(choices))
    return _find_text(answer, choices) if number is None else number


def _find_letter(answer: str, count: int) -> int | None:
    words = answer.split()
    # LLaVA's way comes first: whatever an explanation says, it begins with the letter.
    if words and len(words[0]) == 2 and words[0][1] == ".":
        first = LETTERS.find(words[0][0])
        if 0 <= first < count:
            return first
    for before, behind in _MARKS:
        found = [i for i in range(count) if before + LETTERS[i] + behind in words]
        if len(found) == 1:
            article = (before, behind) == ("", "") and "A" in words
            if not (article and len(words) > _SHORT):
                return found[0]
    return None


def _find_text(answer: str, choices: Sequence[str]) -> int | None:
    said = answer.lower()
    found = [i for i, choice in enumerate(choices) if choice.lower() in said]
    return found[0] if len(found) == 1 else None
