"""A case -> what the model is asked: MM1's few-shot forms, or an instruction.

MM1 (arXiv 2403.09611), section 4 and appendix; table 5 for instructions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm1_mlx.answer import Settings
from mm1_mlx.batch import Ask
from mm1_mlx.config import PromptConfig
from mm1_mlx.errors import DataError, PromptError
from mm1_mlx.eval.case import Case
from mm1_mlx.eval.metrics import BLANK, METRICS
from mm1_mlx.eval.tasks import Task
from mm1_mlx.likelihood import Candidates
from mm1_mlx.messages import Message, Part, Turn, collect
from mm1_mlx.shots import Shot, with_shots
from mm1_mlx.train.data.example import located
from mm1_mlx.train.data.places import PLACE, with_places, without_places
from mm1_mlx.train.data.questions import LETTERS, list_options, most_said, with_hint

# What an OpenFlamingo answer is cut before: a base model goes on with the next example.
# https://github.com/mlfoundations/open_flamingo/blob/655f693fbfa04cd6e9a987d960654624d48917cf/open_flamingo/eval/vqa_metric.py
_NEXT_EXAMPLE = re.compile("Question|Answer|Short")
# Metrics of short answers, which none of these words begins.
_CUT = ("vqa", "yes-no")
# Between examples of text, as lm-evaluation-harness has it.
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Asker:
    """How the cases of a task are put to a model.

    Attributes:
        task: what is asked.
        base: whether the model was only pre-trained: it goes on with a text.
        tiled: how many of the last pictures may be split into tiles.
    """

    task: Task
    base: bool
    tiled: int | None = None

    def ask(self, case: Case, shots: Sequence[Case] = ()) -> Ask:
        """The question of a case, behind solved ones."""
        task = self.task
        if task.style == "text":
            if pictured := [shot.origin for shot in shots if shot.images]:
                raise DataError(
                    f"{pictured[0]}: examples of {task.name} are shown as text, and this "
                    "one has a picture; draw them from rows without"
                )
            solved = [self._solved(shot) for shot in shots]
            text = _BETWEEN.join([*solved, self._text(case)])
            return Ask(text, case.images, self._settings((), "auto"))
        style = task.style if self.base else "chat"
        given = [
            Shot(shot.images, self._solution(shot).strip(), self._text(shot) or None)
            for shot in shots
        ]
        if given or style == "chat":
            settings = self._settings(given, style)
            asked = self._turns(case) if style == "chat" else self._text(case)
            return Ask(asked, case.images, settings)
        # Without examples a base model is shown the form all the same.
        messages = with_shots((), self._text(case), case.images, style)
        return Ask(messages, (), self._settings((), "auto"))

    def candidates(self, case: Case, shots: Sequence[Case] = ()) -> list[Candidates]:
        """What is to be scored of a case, in the order of its choices."""
        if self.task.metric == "blank":
            asks = [self.ask(filled, shots) for filled, _ in _fillings(case)]
            rest = [behind for _, behind in _fillings(case)]
            return [Candidates(a, (text,)) for a, text in zip(asks, rest, strict=True)]
        texts = case.choices or case.answers[:1]
        spaced = tuple(f" {text.lstrip()}" for text in texts)
        return [Candidates(self.ask(case, shots), spaced)]

    def cut(self, text: str) -> str:
        """The answer in what a model said."""
        if self.base and self.task.metric in _CUT:
            text = _NEXT_EXAMPLE.split(text, maxsplit=1)[0]
        return text.strip()

    @property
    def template(self) -> str:
        """What is asked, before the row's own is put in."""
        return self.task.plain if self.base else self.task.prompt

    @property
    def ends(self) -> tuple[str, ...]:
        """What ends an answer."""
        return self.task.stop if self.base or self.task.style == "text" else ()

    def _turns(self, case: Case) -> str | list[Message]:
        """The question as it is trained on: in its conversation, pictures in place."""
        turns, (ahead, field, behind) = case.turns, _around("{question}", self.template)
        if not turns:
            # A row's places are counted in what the row has, as in training.
            ahead, field, behind = _around(r"\{.*\}", self.template)
            asked = self._filled(field, case, placed=True)
            if PLACE not in asked:
                return self._text(case)
            turns = _placed(asked, case)
        *before, (role, parts) = turns
        # Those before its text stand before what is asked beside it, too.
        first = next((i for i, x in enumerate(parts) if x is not None), len(parts))
        if not field:
            parts = [part for part in parts if part is None]
            first = len(parts)
        behind = self._filled(behind, case)
        if parts and parts[-1] is None:
            # As where training adds a prompt: the template parts it from a picture.
            behind = behind.lstrip("\n")
        last: list[Part] = [
            *parts[:first], self._filled(ahead, case), *parts[first:], behind,
        ]  # fmt: skip
        return [_message(*turn) for turn in (*before, (role, last))]

    def _text(self, case: Case) -> str:
        if len(case.turns) > 1:
            raise DataError(
                f"{case.origin}: its answer stands behind {len(case.turns)} turns, which "
                "only a chat model is asked in, and no example shows; give the question "
                "alone"
            )
        return self._filled(self.template, case)

    def _filled(self, template: str, case: Case, *, placed: bool = False) -> str:
        """A template, or a piece of it, with what the row has in its fields.

        Unless pictures are ``placed`` in it, all stand before it.
        """
        named = bool(case.choices) and self.task.metric == "letter"
        hint, question, *choices = (
            text if placed else without_places(text)
            for text in (case.hint, case.question, *case.choices)
        )
        fields = {
            "{question}": question,
            "{hint}": with_hint(hint, context=named),
            "{options}": list_options(choices),
        }
        # At once: a question may hold what looks like a field.
        return re.sub(r"\{\w+\}", lambda m: fields.get(m[0], m[0]), template)

    def _solved(self, case: Case) -> str:
        """A solved case as text."""
        if self.task.metric == "blank":
            assert case.right is not None
            filled, behind = _fillings(case)[case.right]
            return filled.question + behind
        return self._text(case) + self._solution(case)

    def _solution(self, case: Case) -> str:
        """What a solved case shows as its answer, behind a space."""
        if self.task.metric == "letter":
            assert case.right is not None
            return f" {LETTERS[case.right]}"
        if not case.answers:
            raise DataError(
                f"{case.origin}: it has no answer in text, so it is no example to show"
            )
        return f" {most_said(case.answers)}"

    def _settings(self, shots: Sequence[Shot], style: str) -> Settings:
        return Settings(
            max_tokens=self.task.max_tokens,
            stop=self.ends,
            tiled=self.tiled,
            shots=tuple(shots),
            shot_style=style,
        )


def check_prompt(task: Task, prompt: str) -> None:
    """Refuse a prompt that leaves out what a task asks.

    Raises:
        PromptError: it has a field that there is none of, or lacks one.
    """
    known = ("question", "hint", "options")
    given = re.findall(r"\{(\w+)\}", prompt)
    if unknown := sorted(set(given) - set(known)):
        raise PromptError(
            f"the prompt has {{{unknown[0]}}}, expected of fields only "
            f"{', '.join(f'{{{name}}}' for name in known)}"
        )
    needed = ["question"] if "question" in METRICS[task.metric].needs else []
    if task.metric == "letter":
        needed.append("options")
    for name in needed:
        if name not in given:
            raise PromptError(
                f"the prompt {prompt!r:.60} has no {{{name}}}, which each row of "
                f"{task.name} has; put it where that is to stand"
            )


def _around(field: str, template: str) -> tuple[str, str, str]:
    """A template before, in and behind what matches; all of it before where nothing does."""
    found = re.search(field, template, re.DOTALL)
    start, stop = found.span() if found else (len(template),) * 2
    return template[:start], template[start:stop], template[stop:]


def _placed(text: str, case: Case) -> tuple[Turn, ...]:
    """A question's only turn, a picture in each of its places."""
    with located(case.origin):
        asked = with_places([{"role": "user", "content": text}], list(case.images))
        return tuple(collect(asked, case.images)[0])


def _message(role: str, parts: Sequence[Part]) -> Message:
    """A turn as a message, its pictures taken from those that are given beside it."""
    content: list[dict[str, Any]] = [
        {"type": "image"} if part is None else {"type": "text", "text": part}
        for part in parts
        if part != ""
    ]
    return {"role": role, "content": content}


def _fillings(case: Case) -> list[tuple[Case, str]]:
    """For each choice the sentence up to it and with it, and what stands behind.

    Where nothing does, the sentence before it, and the choice.
    """
    before, _, behind = case.question.partition(BLANK)
    if not behind.strip():
        asked = replace(case, question=before.rstrip())
        return [(asked, f" {choice.strip()}") for choice in case.choices]
    return [
        (replace(case, question=before + choice), f" {behind.strip()}")
        for choice in case.choices
    ]


def is_base(style: str, config: PromptConfig) -> bool:
    """Whether a model is shown a text to go on with: its template has no turns."""
    return config.template == "plain" if style == "auto" else style == "base"
