"""An answer and those that are right -> whether it is one of them, spelling aside. No mlx.

Of TriviaQA and WebQuestions, as lm-evaluation-harness counts it: case and punctuation
are not looked at, and any alias is right.

Source: https://github.com/EleutherAI/lm-evaluation-harness/blob/4e7e0d47f33bc71070c1d38394bafbb52b117163/lm_eval/tasks/triviaqa/default.yaml
"""

from __future__ import annotations

import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones."""
    return plain(answer) in {plain(known) for known in answers}


def plain(text: str) -> str:
    """A text without case, punctuation and white space at its ends."""
    return text.strip().lower().translate(_PUNCTUATION).strip()
