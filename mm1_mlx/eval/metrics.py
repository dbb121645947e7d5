"""Cases and what was said of them -> figures, by the name of a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mm1_mlx.eval.anls import anls
from mm1_mlx.eval.case import Case
from mm1_mlx.eval.cider import cider
from mm1_mlx.eval.exact import exact_match
from mm1_mlx.eval.existence import pope, says_yes
from mm1_mlx.eval.intervals import Figure, bootstrap, mean, share
from mm1_mlx.eval.letters import find_option
from mm1_mlx.eval.recall import THRESHOLD, overlap
from mm1_mlx.eval.relaxed import relaxed_match
from mm1_mlx.eval.vqa import vqa_accuracy

# Of WinoGrande: what stands in a sentence for each of its choices.
BLANK = "_"
# How many answer each question of VQA.
PEOPLE = 10
# A mean loss beyond it has no perplexity in a float.
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Reply:
    """What came of a case.

    Attributes:
        text: what the model said, empty where texts were scored.
        boxes: in what it said, in pixels of the picture.
        logprobs: of each text that was scored.
        greedy: whether a greedy answer would have begun with it.
        score: of an answer that is scored among all others.
    """

    text: str = ""
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    logprobs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    score: float = 0.0


Cases = Sequence[Case]
Replies = Sequence[Reply]
Figures = dict[str, Figure]


@dataclass(frozen=True)
class Metric:
    """A way to count.

    Attributes:
        needs: what a case must have.
        figures: what is counted of cases and replies.
        scored: whether texts are scored, not generated.
        wrong: what is wrong with a case that has all it needs, empty if nothing.
        passage: whether a row may be a passage whose last word is the answer.
        together: a score for each answer that depends on all cases; ``figures`` of a
            category's are then of these.
    """

    needs: frozenset[str]
    figures: Callable[[Cases, Replies], Figures]
    scored: bool = False
    wrong: Callable[[Case], str] = lambda case: ""  # noqa: ARG005
    passage: bool = False
    together: Callable[[Cases, Replies], list[float]] | None = None


def _of_few_people(case: Case) -> str:
    # Counted by VQA's formula, the only answer of two people would be a third right.
    if len(case.answers) == 1 or len(case.answers) >= PEOPLE:
        return ""
    return (
        f"it has {len(case.answers)} answers, expected one, or those of ten people; for "
        "aliases of one answer use the task exact"
    )


def _not_yes_or_no(case: Case) -> str:
    if case.answers[0].strip().lower() in ("yes", "no"):
        return ""
    return f"answer is {case.answers[0]!r:.40}, expected yes or no"


def _without_a_blank(case: Case) -> str:
    if case.question.count(BLANK) == 1:
        return ""
    return f"question is {case.question!r:.60}, expected one {BLANK!r} for a choice"


def _mean_of(
    name: str,
    score: Callable[[str, Sequence[str]], float],
    cases: Cases,
    replies: Replies,
) -> Figures:
    """The mean of what each answer scores beside those that are right."""
    pairs = zip(cases, replies, strict=True)
    return {name: mean([score(reply.text, case.answers) for case, reply in pairs])}


def _share_of(
    name: str,
    right: Callable[[str, Sequence[str]], bool],
    cases: Cases,
    replies: Replies,
) -> Figures:
    """The share of answers that are right."""
    pairs = zip(cases, replies, strict=True)
    return {name: share([right(reply.text, case.answers) for case, reply in pairs])}


def _any_relaxed(answer: str, answers: Sequence[str]) -> bool:
    return any(relaxed_match(answer, right) for right in answers)


def _scores_of_captions(cases: Cases, replies: Replies) -> list[float]:
    said = [reply.text for reply in replies]
    return cider(said, [case.answers for case in cases])


def _cider(cases: Cases, replies: Replies) -> Figures:  # noqa: ARG001
    scores = np.array([reply.score for reply in replies], np.float64)
    return {"cider": bootstrap(scores, lambda drawn: float(drawn.mean()))}


def _pope(cases: Cases, replies: Replies) -> Figures:
    right = [case.answers[0].strip().lower() == "yes" for case in cases]
    return pope([says_yes(reply.text) for reply in replies], right)


def _letters(cases: Cases, replies: Replies) -> Figures:
    pairs = zip(cases, replies, strict=True)
    found = [find_option(reply.text, case.choices) for case, reply in pairs]
    right = [option == case.right for option, case in zip(found, cases, strict=True)]
    return {
        "accuracy": share(right, _guessing(cases)),
        "answered": share([option is not None for option in found]),
    }


def _guessing(cases: Cases) -> float:
    """The share of right answers among choices taken blindly."""
    return sum(1 / len(case.choices) for case in cases) / len(cases)


def _boxes(cases: Cases, replies: Replies) -> Figures:
    overlaps = []
    for case, reply in zip(cases, replies, strict=True):
        assert case.box is not None
        # The first box is the answer; a list of guesses gains nothing.
        overlaps.append(overlap(reply.boxes[0], case.box) if reply.boxes else 0.0)
    return {
        "recall@0.5": share([found > THRESHOLD for found in overlaps]),
        "overlap": mean(overlaps),
    }


def _likelihood(cases: Cases, replies: Replies) -> Figures:
    """Right choices by the sum of log-probabilities, and by it a letter of the text."""
    chance = _guessing(cases)
    raw, by_length = [], []
    for case, reply in zip(cases, replies, strict=True):
        shares = [
            logprob / len(text)
            for logprob, text in zip(reply.logprobs, case.choices, strict=True)
        ]
        raw.append(_largest(reply.logprobs) == case.right)
        by_length.append(_largest(shares) == case.right)
    return {"acc": share(raw, chance), "acc_norm": share(by_length, chance)}


def _blank(cases: Cases, replies: Replies) -> Figures:
    """As ``_likelihood``; what is scored is the same text, so that nothing is to norm."""
    return {"acc": _likelihood(cases, replies)["acc"]}


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _last_word(cases: Cases, replies: Replies) -> Figures:  # noqa: ARG001
    scores = np.array([-reply.logprobs[0] for reply in replies], np.float64)
    losses = bootstrap(scores, lambda drawn: float(drawn.mean()))
    found = {"acc": share([reply.greedy[0] for reply in replies])}
    if max(losses.value, losses.high or 0.0) > _LARGEST_EXPONENT:
        return found | {"loss": losses}
    low, high = (None if x is None else math.exp(x) for x in (losses.low, losses.high))
    return found | {"perplexity": Figure(math.exp(losses.value), low, high, losses.n)}


_ANSWERED = frozenset({"answers"})
_PICTURED = frozenset({"answers", "images"})
_CHOSEN = frozenset({"choices", "question"})

METRICS = {
    "vqa": Metric(
        _ANSWERED | {"question"},
        partial(_mean_of, "accuracy", vqa_accuracy),
        wrong=_of_few_people,
    ),
    "caption": Metric(_PICTURED, _cider, together=_scores_of_captions),
    "anls": Metric(_ANSWERED | {"question"}, partial(_mean_of, "anls", anls)),
    "relaxed": Metric(
        _ANSWERED | {"question"}, partial(_share_of, "relaxed_accuracy", _any_relaxed)
    ),
    "yes-no": Metric(_ANSWERED | {"question"}, _pope, wrong=_not_yes_or_no),
    "letter": Metric(_CHOSEN, _letters),
    "box": Metric(frozenset({"images", "question", "box"}), _boxes),
    "exact": Metric(
        _ANSWERED | {"question"}, partial(_share_of, "exact_match", exact_match)
    ),
    "likelihood": Metric(_CHOSEN, _likelihood, scored=True),
    "blank": Metric(_CHOSEN, _blank, scored=True, wrong=_without_a_blank),
    "last-word": Metric(
        _ANSWERED | {"question"}, _last_word, scored=True, passage=True
    ),
}
