"""Guessed answers are the ones that the model gives alone, in fewer steps."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mm1_mlx import budget, generate, load
from mm1_mlx.config import DecoderConfig
from mm1_mlx.errors import PromptError
from mm1_mlx.memory.named import Prefix
from mm1_mlx.memory.prefixes import KVPrecision
from mm1_mlx.prefill import prefill
from mm1_mlx.runtime import TINY
from mm1_mlx.sampling import Sampler
from mm1_mlx.speculate import PromptLookup, speculate

STAR = TINY / "red-star.png"
FOUR = TINY / "four-shapes.png"
QUESTIONS = [
    ("What colour is the star?", [STAR]),
    ("Describe the picture.", [FOUR]),
    ("How many shapes are there?", [FOUR, STAR]),
    ("What is this?", []),
]
each_question = pytest.mark.parametrize(("question", "images"), QUESTIONS)
OPTIONS = [
    {},
    {"max_tokens": 1},
    {"max_tokens": 2},
    {"max_tokens": 5},
    {"temperature": 1.2, "seed": 4},
    {"kv_bits": 8, "kv_start": 0},
    {"kv_bits": 8, "kv_start": 30},
]


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def draft():
    with load() as draft:
        yield draft


@each_question
@pytest.mark.parametrize("options", OPTIONS)
def test_prompt_lookup_gives_the_same_answer(runtime, question, images, options):
    runtime.forget()
    expected = generate(runtime, question, images, **options)
    runtime.forget()
    answer = generate(runtime, question, images, prompt_lookup=True, **options)
    assert (answer.tokens, answer.finish_reason) == (
        expected.tokens,
        expected.finish_reason,
    )


@each_question
@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_draft_model_gives_the_same_answer(runtime, draft, question, images, count):
    for options in OPTIONS:
        expected = generate(runtime, question, images, **options)
        guess = {"draft": draft, "num_draft_tokens": count}
        answer = generate(runtime, question, images, **guess, **options)
        assert answer.tokens == expected.tokens


def count_steps(runtime, monkeypatch):
    """How many positions every step of a model has, from now on."""
    steps = []
    routed = runtime.model.decoder.routed

    def counted(tokens, *args, **options):
        steps.append(tokens.shape[1])
        return routed(tokens, *args, **options)

    monkeypatch.setitem(runtime.model.decoder.__dict__, "routed", counted)
    return steps


def test_a_draft_model_saves_steps(runtime, draft, monkeypatch):
    runtime.forget()
    steps = count_steps(runtime, monkeypatch)
    answer = generate(runtime, *QUESTIONS[1], draft=draft)
    # It guesses all right: it is the same model.
    assert len(answer.tokens) > 12
    assert len(steps) <= 1 + -(-len(answer.tokens) // 5) + 1


def test_a_draft_model_reads_only_what_is_new(runtime, draft, monkeypatch):
    draft.forget()
    steps = count_steps(draft, monkeypatch)
    first = generate(runtime, *QUESTIONS[1], draft=draft)
    before = len(steps)
    assert steps[0] > 16
    generate(runtime, *QUESTIONS[1], draft=draft)
    assert max(steps[before:]) < 6
    # What it guessed wrong is not taken for what was said.
    assert generate(draft, *QUESTIONS[1]).tokens == first.tokens


def test_cancelling_while_the_draft_reads_ends_the_answer(runtime, draft, monkeypatch):
    draft.forget()
    runtime.forget()
    cancel = threading.Event()
    routed = draft.model.decoder.routed

    def read(*args, **options):
        cancel.set()
        return routed(*args, **options)

    monkeypatch.setattr("mm1_mlx.prefill.STEP", 4)
    monkeypatch.setattr(prefill, "__kwdefaults__", prefill.__kwdefaults__ | {"step": 4})
    monkeypatch.setitem(draft.model.decoder.__dict__, "routed", read)
    answer = generate(runtime, *QUESTIONS[1], draft=draft, cancel=cancel)
    assert answer.finish_reason == "cancelled"
    monkeypatch.undo()
    assert generate(draft, *QUESTIONS[0]).text == "red"


def test_a_draft_guesses_behind_a_prefix(runtime, draft, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime.engine.named, "folder", tmp_path)
    runtime.save_prefix(Prefix("page", images=(FOUR,)))
    expected = generate(runtime, "Describe the picture.", prefix="page")
    steps = count_steps(runtime, monkeypatch)
    answer = generate(runtime, "Describe the picture.", prefix="page", draft=draft)
    assert answer.tokens == expected.tokens
    assert len(steps) < len(answer.tokens)


def test_experts_with_few_places_are_not_guessed(runtime, monkeypatch):
    config = runtime.config.decoder.to_dict()
    moe = {"num_experts": 4, "every": 1, "offset": 0, "capacity_factor": 2.0}
    changed = DecoderConfig.from_dict(config | {"moe": moe})
    monkeypatch.setattr(
        runtime.engine, "config", replace(runtime.config, decoder=changed)
    )
    with pytest.raises(PromptError, match="experts share out their places"):
        generate(runtime, "What?", prompt_lookup=True)


def test_a_refused_question_costs_no_conversation(runtime, draft, monkeypatch):
    runtime.forget()
    first = generate(runtime, *QUESTIONS[1])
    monkeypatch.setattr(budget, "allowed", lambda: 1000)
    with pytest.raises(PromptError, match="are free here"):
        generate(runtime, "Describe it in detail.", [FOUR, STAR])
    monkeypatch.undo()
    monkeypatch.setattr(draft.tokenizer, "vocabulary", {"a": 0})
    with pytest.raises(PromptError, match="another vocabulary"):
        generate(runtime, *QUESTIONS[1], draft=draft)
    assert generate(runtime, *QUESTIONS[1]).cached_tokens == first.prompt_tokens - 1


def test_a_draft_model_that_is_wrong_changes_nothing(runtime, draft):
    head = draft.model.decoder.embed_tokens
    weight = head.weight
    # Other embeddings guess other tokens.
    head.weight = mx.random.normal(weight.shape, key=mx.random.key(1))
    mx.eval(head.weight)
    try:
        draft.forget()
        expected = generate(runtime, *QUESTIONS[1])
        assert generate(runtime, *QUESTIONS[1], draft=draft).tokens == expected.tokens
    finally:
        head.weight = weight
        draft.forget()


def test_the_next_turn_goes_on_from_a_guessed_answer(runtime):
    runtime.forget()
    question, images = QUESTIONS[1]
    first = generate(runtime, question, images, prompt_lookup=True)
    turns = [
        {"role": "user", "content": [
            *({"type": "image", "image": image} for image in images),
            {"type": "text", "text": question},
        ]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "How many shapes are there?"},
    ]  # fmt: skip
    second = generate(runtime, turns)
    assert second.cached_tokens > first.prompt_tokens
    runtime.forget()
    assert generate(runtime, turns).tokens == second.tokens


def test_both_ways_of_guessing_are_refused(runtime, draft):
    with pytest.raises(PromptError, match="both given"):
        generate(runtime, "What?", prompt_lookup=True, draft=draft)


def test_a_draft_model_of_another_vocabulary_is_refused(runtime, draft, monkeypatch):
    monkeypatch.setattr(draft.tokenizer, "vocabulary", {"a": 0})
    with pytest.raises(PromptError, match="another vocabulary"):
        generate(runtime, "What?", draft=draft)


class Counting:
    """A model that says its last token plus one, and counts its steps."""

    def __init__(self):
        self.config = SimpleNamespace(decoder=SimpleNamespace(vocab_size=50))
        self.steps = 0

    def __call__(self, tokens, cache=None):
        self.steps += 1
        cache[0].offset += tokens.shape[1]
        following = mx.minimum(tokens + 1, 49)
        return (mx.arange(50) == following[..., None]).astype(mx.float32) * 9


class Offset:
    offset = 0

    def trim(self, n):
        self.offset -= n


def run(drafter, prompt, count):
    model, cache = Counting(), [Offset()]
    steps = speculate(
        model, prompt[-1] + 1, cache, drafter, Sampler(), prompt, count, KVPrecision()
    )
    tokens = list(steps)
    # Every token but the last drawn is in the cache.
    assert cache[0].offset == len(tokens)
    return tokens, model.steps


def test_lookup_needs_few_steps_where_the_prompt_is_repeated():
    tokens, steps = run(PromptLookup(), [*range(1, 40), 0], 33)
    assert tokens == list(range(2, 34))
    assert steps <= 6


def test_lookup_needs_as_many_steps_as_tokens_where_nothing_is():
    tokens, steps = run(PromptLookup(), [20], 12)
    assert tokens == list(range(22, 33))
    assert steps == 11


def test_lookup_prefers_the_longest_end():
    lookup = PromptLookup(longest=3)
    tokens = [1, 2, 3, 7, 7, 9, 3, 8, 8, 1, 2, 3]
    assert lookup.propose(tokens)[:2] == [7, 7]


def test_lookup_prefers_the_latest_place():
    assert PromptLookup().propose([5, 1, 5, 2, 5])[:1] == [2]


def test_lookup_guesses_nothing_at_first():
    assert PromptLookup().propose([1, 2, 3]) == []
    assert PromptLookup().propose([1]) == []


class Wild:
    """Guesses tokens that are none."""

    def propose(self, tokens):
        return [tokens[-1] + 1, -1, 3, 1000]


def test_guesses_that_are_no_tokens_are_left_out():
    tokens, steps = run(Wild(), [1], 9)
    assert tokens == list(range(3, 11))
    assert steps == 4
