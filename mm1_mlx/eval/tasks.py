"""Every task by its name: what is asked, how it is counted. Data, and no mlx.

What a model that was taught instructions is asked ends with table 5's prompts
(``train/paper.py``), what one that was only pre-trained reads is as MM1's few-shot
evaluation has it (``shots.py``). Text is put as lm-evaluation-harness puts it, at
4e7e0d47f33bc71070c1d38394bafbb52b117163; what it does to a row before that, as HellaSwag's
joining of ``activity_label`` and ``ctx``, is done where the row is written (README.md beside it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mm1_mlx.shots import STOPS
from mm1_mlx.train.paper import CAPTION, LETTER, SHORT_ANSWER

SENTENCE = STOPS["caption"]
PHRASE = STOPS["vqa"]
# The longest answer to a question of one's own: some sentences.
OWN_TOKENS = 128


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: what users call it.
        metric: of ``metrics.METRICS``: how it is counted.
        prompt: what is asked; of ``{question}``, ``{hint}`` and ``{options}`` each is
            what the row has.
        style: how a base model is shown it: ``vqa`` or ``caption`` as ``shots`` has
            them, ``text`` as it stands.
        plain: what is asked there in the prompt's place.
        stop: what ends a base model's answer.
        max_tokens: the longest answer.
        pictured: whether a row without a picture is refused, not asked blindly.
        note: what else is to be known of its rows or its figure.
    """

    name: str
    metric: str
    prompt: str
    style: str = "vqa"
    plain: str = "{question}"
    stop: tuple[str, ...] = PHRASE
    max_tokens: int = 16
    pictured: bool = False
    note: str = ""


def _ask(name: str, metric: str = "vqa", stop: tuple[str, ...] = PHRASE) -> Task:
    pictured = metric != "exact"
    return Task(
        name, metric, "{question}\n" + SHORT_ANSWER, stop=stop, pictured=pictured
    )


def _own(metric: str, stop: tuple[str, ...] = SENTENCE) -> Task:
    """Of one's own data, asked as it was trained on: the question behind its hint."""
    return replace(
        _ask(metric, metric, stop), prompt="{hint}{question}", max_tokens=OWN_TOKENS
    )


def _describe(name: str) -> Task:
    return Task(name, "caption", CAPTION, "caption", "", SENTENCE, 64, pictured=True)


def _choose(name: str, *, pictured: bool = True, note: str = "") -> Task:
    asked = "{hint}{question}\n{options}"
    return Task(
        *(name, "letter", f"{asked}\n{LETTER}"),
        plain=asked,
        stop=SENTENCE,
        pictured=pictured,
        note=note,
    )


def _read(name: str) -> Task:
    return replace(_ask(name, "anls", SENTENCE), max_tokens=64)


def _find(name: str) -> Task:
    asked = "Where is {question}? Answer with its bounding box."
    return Task(
        *(name, "box", asked),
        plain=asked,
        stop=SENTENCE,
        max_tokens=64,
        pictured=True,
    )


def _text(name: str, prompt: str, metric: str = "likelihood") -> Task:
    return Task(name, metric, prompt, "text", prompt, PHRASE, 24)


_QA = "Question: {question}\nAnswer:"
# LLaVA's: in VizWiz some questions cannot be answered.
_UNANSWERABLE = (
    "When the provided information is insufficient, respond with 'Unanswerable'.\n"
)

TASKS = {
    task.name: task
    for task in (
        *(_ask(name) for name in ("vqav2", "textvqa", "okvqa", "gqa")),
        replace(_ask("vizwiz"), prompt="{question}\n" + _UNANSWERABLE + SHORT_ANSWER),
        *(_describe(name) for name in ("coco-caption", "nocaps", "textcaps")),
        *(_read(name) for name in ("docvqa", "infovqa")),
        _ask("chartqa", "relaxed", SENTENCE),
        _ask("pope", "yes-no"),
        *(_choose(name) for name in ("ai2d", "seed")),
        # Many of its questions have no picture.
        _choose("scienceqa", pictured=False),
        _choose("mmbench", note="each row by itself: not CircularEval, no judge"),
        *(_find(name) for name in ("refcoco", "refcoco+", "refcocog")),
        *(_text(name, _QA) for name in ("arc-easy", "arc-challenge", "piqa")),
        _text("sciq", "{hint}" + _QA),
        replace(
            _text("hellaswag", "{question}"),
            note="question as the row has it: join activity_label and ctx there",
        ),
        _text("winogrande", "{question}", "blank"),
        replace(_text("lambada", "{question}", "last-word"), note="or text, a passage"),
        # The second question mark is the harness's own.
        _text("triviaqa", "Question: {question}?\nAnswer:", "exact"),
        _text("webqs", _QA, "exact"),
        # By the metric's name, for data of one's own.
        _own("vqa", PHRASE),
        replace(_describe("caption"), max_tokens=OWN_TOKENS),
        _own("anls"),
        _own("relaxed"),
        _own("yes-no", PHRASE),
        replace(_choose("letter", pictured=False), max_tokens=OWN_TOKENS),
        _find("box"),
        _own("exact"),
        Task("likelihood", "likelihood", "{hint}{question}", plain="{hint}{question}"),
    )
}
