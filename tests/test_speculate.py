"""Guessed answers are the ones that the model gives alone, in fewer steps."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mm1_mlx import generate, load
from mm1_mlx.errors import PromptError
from mm1_mlx.memory.prefixes import KVPrecision
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
    {"kv_bits": 8, "kv_group_size": 32, "kv_start": 0},
    {"kv_bits": 8, "kv_group_size": 32, "kv_start": 30},
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
