"""A row's question by its keys, as public data sets have them, for training and for eval.

| keys | hold |
|---|---|
| ``question`` | text; ``query`` in ChartQA's rows |
| ``answer`` or ``answers`` | text, or a list of texts or of ``{"answer": text}``; ``label`` beside ``query`` |
| ``caption`` or ``captions`` | what people wrote, for the same as ``answers`` |
| ``choices`` | a list of texts, or ``{"text": [...], "label": [...]}``; ``answer`` is then the number of one, from 0, its label or its text |
| ``options`` | the same in AI2D's rows; an ``answer`` of digits is then always a number from 0 |
| ``hint`` | text that stands before the question |
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm1_mlx.errors import DataError

CAPTIONS = ("caption", "captions")
ANSWERS = ("answer", "answers", *CAPTIONS)
LETTERS = string.ascii_uppercase
# Where options stand that are no list of choices.
_OPTIONS = ("options", "A", "B")


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes:
        text: what is asked.
        hint: what stands before it.
        answers: those that are right; of a question with choices the text of one.
        choices: what is to be chosen from.
        right: which of the choices is right, counted from 0.
    """

    text: str
    hint: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    right: int | None


def read_question(values: Mapping[str, Any]) -> Question:
    """The question of a row by our keys.

    Raises:
        DataError: says what is wrong with the row.
    """
    choices, labels = _choices(values.get("choices", []))
    answers, right = answers_of(values), None
    if choices:
        labelled = isinstance(values["choices"], Mapping)
        right = _chosen(values.get("answer"), choices, labels, labelled=labelled)
        answers = (choices[right],)
    return Question(
        text_of(values, "question"), text_of(values, "hint"), answers, choices, right
    )


def check_options(values: Mapping[str, Any]) -> None:
    """Pass only if a question, by our keys, has no options that it would leave out.

    Raises:
        DataError: it has.
    """
    if "choices" not in values and (lost := [k for k in _OPTIONS if k in values]):
        raise DataError(
            f"its options stand in {lost}, {values[lost[0]]!r:.60}; give them as "
            "choices, a list of texts"
        )


def list_options(choices: Sequence[str]) -> str:
    """The options, each on a line behind its letter."""
    return "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def with_hint(hint: str, *, context: bool) -> str:
    """A hint as it stands before a question; ``context`` names it so.

    So LLaVA asks ScienceQA.
    """
    if not hint:
        return ""
    return f"{'Context: ' if context else ''}{hint.rstrip()}\n"


def most_said(answers: Sequence[str]) -> str:
    """Of ten people's answers the one that most of them gave, of captions the first."""
    return Counter(answers).most_common(1)[0][0]


def as_ours(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ChartQA or AI2D by our keys; others as they are."""
    if "query" in values and "question" not in values:
        answers = {"answers": values["label"]} if "label" in values else {}
        return {"question": values["query"], **answers, **values}
    options, answer = values.get("options"), values.get("answer")
    if not isinstance(options, list) or "choices" in values:
        return dict(values)
    # Never an option's text: of "1", "2", "3" and "4" AI2D's answer "1" is "2". No list
    # has more options; Python reads no numbers of thousands of digits.
    if isinstance(answer, str) and answer.isdecimal() and len(answer) < 10:
        answer = int(answer)
        if answer >= len(options):
            raise DataError(
                f"answer is {answer}, expected the number of one of the {len(options)} "
                "options, from 0; where texts are answers, call the options choices"
            )
    return {**values, "choices": options, "answer": answer}


def text_of(values: Mapping[str, Any], key: str) -> str:
    """The text of a key, empty where it is none."""
    value = values.get(key, "")
    if not isinstance(value, str):
        raise DataError(f"{key} is {value!r:.60}, expected text")
    return _checked(value, key)


def _checked(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{key} is {text!r:.60}, which is not valid Unicode") from None
    return text


def answers_of(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of ``answer``, ``answers``, ``caption`` or ``captions``."""
    keys = [key for key in ANSWERS if key in values]
    if len(keys) > 1:
        raise DataError(f"it has both {keys[0]} and {keys[1]}, expected one of them")
    if not keys:
        return ()
    given = values[keys[0]]
    found = given if isinstance(given, list) else [given]
    return tuple(_answer(answer, keys[0]) for answer in found)


def _answer(answer: Any, key: str) -> str:
    found = answer.get("answer") if isinstance(answer, Mapping) else answer
    # NaN and 1e999, which Python reads from JSON, are the numbers of no answer.
    finite = isinstance(found, float) and math.isfinite(found)
    if finite or (isinstance(found, int) and not isinstance(found, bool)):
        found = str(found)
    if not isinstance(found, str):
        raise DataError(f"{key} holds {answer!r:.60}, expected text")
    return _checked(found, key)


def _choices(given: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is to be chosen from, and what each is called."""
    if isinstance(given, Mapping):
        texts, labels = given.get("text"), given.get("label")
    else:
        texts, labels = given, list(LETTERS)
    for value in (texts, labels):
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise DataError(f"choices is {given!r:.60}, expected a list of texts")
    assert isinstance(texts, list)
    assert isinstance(labels, list)
    if len(texts) == 1 or len(texts) > len(LETTERS) or len(texts) > len(labels):
        raise DataError(
            f"choices has {len(texts)} texts, expected 2 to {len(LETTERS)}, and a label "
            "for each"
        )
    if any(not _checked(text, "choices").strip() for text in texts):
        raise DataError("choices holds an empty text")
    return tuple(texts), tuple(labels[: len(texts)])


def _chosen(
    answer: Any,
    choices: tuple[str, ...],
    labels: tuple[str, ...],
    *,
    labelled: bool,
) -> int:
    """Which choice the row says is right; ``labelled`` says that it gives the labels."""
    named: set[int] = set()
    if type(answer) is int:
        # Not by texts: where numbers are to be chosen from, a number counts them.
        named = {i for i, label in enumerate(labels) if label == str(answer)}
        named |= {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        pairs = enumerate(zip(labels, choices, strict=True))
        named = {i for i, names in pairs if answer in names}
        # Of labels that a row gives itself the answer is one, as ARC's "1" to "4" are.
        if labelled and answer in labels:
            named = {i for i, label in enumerate(labels) if label == answer}
    if len(named) == 1:
        return named.pop()
    if named:
        way_out = (
            "its label or its text" if type(answer) is int else "its number from 0"
        )
        raise DataError(
            f"answer is {answer!r:.60}, which names {len(named)} of the choices "
            f"{list(choices)!r:.80} called {list(labels)!r:.60}; give {way_out}"
        )
    raise DataError(
        f"answer is {answer!r:.60}, expected the number of a choice from 0 to "
        f"{len(choices) - 1}, one of {list(labels)}, or a choice's text"
    )
