"""What a model is asked: MM1's few-shot forms, table 5's instructions, texts."""

from dataclasses import replace

import pytest

from mm1_mlx.errors import DataError, PromptError
from mm1_mlx.eval.case import Case
from mm1_mlx.eval.metrics import METRICS
from mm1_mlx.eval.prompts import Asker, check_prompt, is_base
from mm1_mlx.eval.tasks import TASKS
from mm1_mlx.messages import collect
from mm1_mlx.runtime import TINY
from mm1_mlx.shots import with_shots
from mm1_mlx.train.paper import CAPTION, LETTER, SHORT_ANSWER

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"
ASKED = Case("x:1", (STAR,), "What colour?", answers=("red",))
SOLVED = Case("t:1", (FOUR,), "How many?", answers=("5", "4", "4"))
CHOSEN = Case(
    *("x:2", (STAR,), "Which?"), answers=("dog",), choices=("cat", "dog"), right=1,
    hint="It barks.",
)  # fmt: skip


def shown(ask):
    """All that the model will read, a picture as "<i>"."""
    settings = ask.settings
    messages, images = ask.prompt, ask.images
    if settings.shots:
        messages = with_shots(settings.shots, messages, images, settings.shot_style)
        images = ()
    turns, _ = collect(messages, images)
    return [
        (role, "".join("<i>" if part is None else part for part in parts))
        for role, parts in turns
    ]


def ask(task, case, shots=(), base=False):
    return Asker(TASKS[task], base).ask(case, shots)


def test_a_base_model_is_asked_as_the_paper_does():
    asked = ask("vqav2", ASKED, base=True)
    assert shown(asked) == [("user", "<i> Question: What colour? Short answer:")]
    assert asked.settings.stop == ("\n", ".", ",")
    behind = ask("vqav2", ASKED, [SOLVED], base=True)
    assert shown(behind) == [
        (
            "user",
            "<i> Question: How many? Short answer: 4\n"
            "<i> Question: What colour? Short answer:",
        )
    ]


def test_a_base_model_captions_as_the_paper_does():
    asked = ask("coco-caption", ASKED, base=True)
    assert shown(asked) == [("user", "<i> A photo of")]
    assert asked.settings.stop == ("\n",)
    solved = Case("t:1", (FOUR,), answers=("four shapes", "shapes"))
    assert shown(ask("coco-caption", ASKED, [solved], base=True)) == [
        ("user", "<i> A photo of four shapes\n<i> A photo of")
    ]


def test_a_chat_model_is_given_table_5s_instructions():
    assert shown(ask("vqav2", ASKED)) == [("user", f"<i>What colour?\n{SHORT_ANSWER}")]
    assert shown(ask("nocaps", ASKED)) == [("user", f"<i>{CAPTION}")]
    assert shown(ask("scienceqa", CHOSEN)) == [
        (
            "user",
            f"<i>Context: It barks.\nWhich?\nA. cat\nB. dog\n{LETTER}",
        )
    ]
    assert ask("vqav2", ASKED).settings.stop == ()


# As train/data/forms reads a row whose question has a picture before and one within it.
TOLD = Case(
    *("x:3", (STAR, FOUR), "Beside which is it?"), answers=("the circle",),
    turns=(("user", [None, "What is it?"]), ("assistant", ["A star."]),
           ("user", [None, "Beside which", None, " is it?"])),
)  # fmt: skip
ALONE = Case("x:4", (STAR,), "Which?", turns=(("user", [None, "Which?"]),))


def test_a_conversation_is_asked_as_it_is_trained_on():
    before = [("user", "<i>What is it?"), ("assistant", "A star.")]
    images = (STAR, FOUR, STAR)
    case = replace(TOLD, images=images)
    asked = ask("exact", case)
    assert shown(asked) == [*before, ("user", "<i>Beside which<i> is it?")]
    turns, sources = collect(asked.prompt, asked.images)
    assert (tuple(turns), tuple(sources)) == (TOLD.turns, images)
    # What a task adds stands where it does beside a question.
    assert shown(ask("vqav2", case))[-1] == (
        "user", f"<i>Beside which<i> is it?\n{SHORT_ANSWER}",
    )  # fmt: skip
    assert shown(ask("nocaps", case))[-1] == ("user", f"<i><i>{CAPTION}")
    assert shown(ask("exact", case, [SOLVED]))[:3] == [
        ("user", "<i>How many?"), ("assistant", "4"), before[0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "case", "shots", "base"),
    [("exact", TOLD, (), True), ("vqa", ASKED, [TOLD], False), ("piqa", TOLD, (), False)],
)  # fmt: skip
def test_several_turns_are_shown_to_a_chat_model_alone(task, case, shots, base):
    with pytest.raises(
        DataError, match=r"^x:3: its answer stands behind 3 turns, which"
    ):
        ask(task, case, shots, base)
    one = {"case": ALONE} if case is TOLD else {"case": case, "shots": [ALONE_SOLVED]}
    assert shown(ask(task, **one, base=base))


ALONE_SOLVED = replace(ALONE, answers=("that",))


def test_a_chat_models_examples_are_turns_asked_alike():
    assert shown(ask("mmbench", CHOSEN, [CHOSEN]))[:2] == [
        ("user", f"<i>Context: It barks.\nWhich?\nA. cat\nB. dog\n{LETTER}"),
        ("assistant", "B"),
    ]
    assert shown(ask("vqav2", ASKED, [SOLVED]))[:2] == [
        ("user", f"<i>How many?\n{SHORT_ANSWER}"),
        ("assistant", "4"),
    ]


def test_text_is_put_as_the_harness_puts_it():
    text = Case("x:3", (), "Why?", answers=("so",), choices=("no", "so"), right=1)
    asker = Asker(TASKS["arc-easy"], base=True)
    (candidates,) = asker.candidates(text, [text])
    assert shown(candidates.ask) == [
        ("user", "Question: Why?\nAnswer: so\n\nQuestion: Why?\nAnswer:")
    ]
    assert candidates.texts == (" no", " so")


def test_of_winogrande_what_stands_behind_the_blank_is_scored():
    case = Case(
        *("x:4", (), "The cup fell since _ was wet."),
        choices=("it", "the bag"),
        right=0,
    )
    found = Asker(TASKS["winogrande"], base=True).candidates(case, [case])
    before = "The cup fell since it was wet.\n\nThe cup fell since "
    assert [shown(one.ask) for one in found] == [
        [("user", f"{before}it")],
        [("user", f"{before}the bag")],
    ]
    assert {one.texts for one in found} == {(" was wet.",)}


def test_a_blank_at_the_sentences_end_is_scored_itself():
    case = Case(
        *("x:5", (), "What fell was _ "), choices=("the cup", "the bag"), right=1
    )
    found = Asker(TASKS["winogrande"], base=True).candidates(case, [case])
    for one, choice in zip(found, case.choices, strict=True):
        assert shown(one.ask) == [("user", "What fell was the bag\n\nWhat fell was")]
        assert one.texts == (f" {choice}",)


def test_a_base_models_answer_ends_where_it_goes_on_with_an_example():
    assert Asker(TASKS["vqav2"], base=True).cut(" red Question: x") == "red"
    assert Asker(TASKS["vqav2"], base=False).cut(" a Question ") == "a Question"

    assert Asker(TASKS["pope"], base=True).cut(" yes Question: x") == "yes"


@pytest.mark.parametrize("task", ["ai2d", "docvqa", "refcoco", "exact", "chartqa"])
def test_answers_that_are_not_vqas_are_left_whole(task):
    assert Asker(TASKS[task], base=True).cut(" Short-tailed cat") == "Short-tailed cat"


def test_a_prompt_asks_what_the_row_has():
    check_prompt(TASKS["letter"], "{hint}{question}\n{options}")
    check_prompt(TASKS["caption"], "Describe it.")
    for task, prompt, message in (
        ("vqa", "{asked}", "the prompt has {asked}, expected"),
        ("letter", "Choose. {question}", "has no {options}"),
        ("letter", "{options}", "has no {question}"),
        ("exact", "Choose.", "has no {question}"),
    ):
        with pytest.raises(PromptError) as caught:
            check_prompt(TASKS[task], prompt)
        assert message in str(caught.value)


def test_pictures_of_text_examples_are_not_dropped():
    pictured = Case(
        "t:1", (STAR,), "Why?", answers=("so",), choices=("no", "so"), right=1
    )
    with pytest.raises(DataError, match="t:1: examples of arc-easy are shown as text"):
        ask("arc-easy", pictured, [pictured])


def test_a_question_may_hold_what_looks_like_a_field():
    odd = Case("x:5", (), "Is {options} {hint}?", choices=("x", "y"), right=0)
    assert shown(ask("letter", odd))[0][1].startswith("Is {options} {hint}?\nA. x")


def test_the_style_is_the_templates(plain_prompt):
    assert is_base("auto", plain_prompt())
    assert not is_base("auto", plain_prompt(template="llava"))
    assert is_base("base", plain_prompt(template="llava"))
    assert not is_base("chat", plain_prompt())


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_is_counted_and_asked_somehow(task):
    assert task.metric in METRICS
    assert task.style in ("vqa", "caption", "text")
    assert TASKS[task.name] is task
    if task.metric == "letter":
        assert "{options}" in task.prompt
        assert "{options}" in task.plain
