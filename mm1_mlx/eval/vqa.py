"""An answer and those that ten people gave -> VQA accuracy, as VQA's own code counts it.

An answer is right if three of nine people gave it, for every nine of the ten. What is
compared is lower-cased, without articles, with numbers as digits and most punctuation
as spaces. No mlx.

Source: https://github.com/GT-Vision-Lab/VQA/blob/a013f0043c1e2cdc995922dfe257f7149aa9af06/PythonEvaluationTools/vqaEvaluation/vqaEval.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS.split())} | {
    "none": "0"
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Upstream means to keep a point between digits, and keeps each before one.
_PERIOD = re.compile(r"\.(?!\d)")
# Contractions that are also found with an apostrophe of theirs left out. Those with a
# capital letter are never found, as words are lower-cased before.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've
it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[: match.start()] + word[match.end() :]: word
    for word in _CONTRACTED.split()
    for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # So upstream has it.


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """How far people agree with an answer, 0 to 1.

    Answers on which all people agree are normalised, too. Upstream compares them as they
    are written, so that "Yes" is wrong where ten say "yes".

    Args:
        answer: the model's.
        answers: of people, usually ten; a single one has to be met exactly.
    """
    said = normalise(answer)
    agree = [normalise(text) == said for text in answers]
    if len(agree) == 1:
        return float(agree[0])
    # Each person's answer is left out once.
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)


def normalise(text: str) -> str:
    """The text as answers are compared."""
    line = text.replace("\n", " ").replace("\t", " ").strip()
    return _without_articles(_without_punctuation(line))


def _without_punctuation(text: str) -> str:
    """Punctuation beside a space vanishes, in a word it becomes one.

    A number with a comma makes all of it vanish.
    """
    vanish = _COMMA_IN_NUMBER.search(text) is not None
    written = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        written = written.replace(mark, "" if beside or vanish else " ")
    return _PERIOD.sub("", written)


def _without_articles(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)
