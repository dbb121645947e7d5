"""Every task by its name: what is asked, how it is counted. Data, and no mlx.

What a model that was taught instructions is asked ends with table 5's prompts
(``train/paper.py``), what one that was only pre-trained reads is as MM1's few-shot
evaluation has it (``shots.py``). Text is put as lm-evaluation-harness puts it, at
4e7e0d47f33bc71070c1d38394bafbb52b117163.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm1_mlx.shots import STOPS
from mm1_mlx.train.paper import CAPTION, LETTER, SHORT_ANSWER

SENTENCE = STOPS["caption"]
PHRASE = STOPS["vqa"]


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
    """

    name: str
    metric: str
    prompt: str
    style: str = "vqa"
    plain: str = "{question}"
    stop: tuple[str, ...] = PHRASE
    max_tokens: int = 16


def _ask(name: str, metric: str = "vqa", stop: tuple[str, ...] = PHRASE) -> Task:
    return Task(name, metric, "{question}\n" + SHORT_ANSWER, stop=stop)


def _describe(name: str) -> Task:
    return Task(name, "caption", CAPTION, "caption", "", SENTENCE, 64)


def _choose(name: str) -> Task:
    asked = "{hint}{question}\n{options}"
    return Task(name, "letter", f"{asked}\n{LETTER}", plain=asked, stop=SENTENCE)


def _read(name: str) -> Task:
    task = _ask(name, "anls", SENTENCE)
    return Task(**{**task.__dict__, "max_tokens": 64})


def _text(name: str, prompt: str, metric: str = "likelihood") -> Task:
    return Task(name, metric, prompt, "text", prompt, PHRASE, 24)


_QA = "Question: {question}\nAnswer:"
# LLaVA's: in VizWiz some questions cannot be answered.
_UNANSWERABLE = (
    "When the provided information is insufficient, respond with 'Unanswerable'.\n"
)
_BOX = "Where is {question}? Answer with its bounding box."

TASKS = {
    task.name: task
    for task in (
        *(_ask(name) for name in ("vqav2", "textvqa", "okvqa", "gqa")),
        Task("vizwiz", "vqa", "{question}\n" + _UNANSWERABLE + SHORT_ANSWER),
        *(_describe(name) for name in ("coco-caption", "nocaps", "textcaps")),
        *(_read(name) for name in ("docvqa", "infovqa")),
        _ask("chartqa", "relaxed", SENTENCE),
        _ask("pope", "yes-no"),
        *(_choose(name) for name in ("ai2d", "scienceqa", "mmbench", "seed")),
        *(
            Task(name, "box", _BOX, plain=_BOX, stop=SENTENCE, max_tokens=64)
            for name in ("refcoco", "refcoco+", "refcocog")
        ),
        *(_text(name, _QA) for name in ("arc-easy", "arc-challenge", "piqa")),
        _text("sciq", "{hint}" + _QA),
        _text("hellaswag", "{question}"),
        _text("winogrande", "{question}", "blank"),
        _text("lambada", "{question}", "last-word"),
        # The second question mark is the harness's own.
        _text("triviaqa", "Question: {question}?\nAnswer:", "exact"),
        _text("webqs", _QA, "exact"),
        # By the metric's name, for data of one's own.
        _ask("vqa"),
        _describe("caption"),
        _read("anls"),
        _ask("relaxed", "relaxed", SENTENCE),
        _ask("yes-no", "yes-no"),
        _choose("letter"),
        Task("box", "box", _BOX, plain=_BOX, stop=SENTENCE, max_tokens=64),
        _ask("exact", "exact", SENTENCE),
        Task("likelihood", "likelihood", "{hint}{question}", plain="{hint}{question}"),
    )
}
