"""How likely texts are behind a prompt: as one plain pass over all of it says."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax

from mm1_mlx.answer import Settings
from mm1_mlx.batch import Ask
from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.likelihood import Candidates, Likelihood, loglikelihoods
from mm1_mlx.prompt import Prompt
from mm1_mlx.runtime import TINY, generate, load
from mm1_mlx.shots import Shot

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"
QUESTION = "What colour is the star?"
TEXTS = (" red", " blue", " a red star", " blue and green, as it seems to me", " re")
# More than are run together.
MANY = tuple(
    f" {a} {b}" for a in ("red", "blue", "pink") for b in ("star", "a heart", "x")
)


@pytest.fixture(scope="module")
def runtime():
    with load(dtype=mx.float32) as runtime:
        yield runtime


def scored(runtime, *questions):
    return [found for _, found in loglikelihoods(runtime, questions)]


def plainly(runtime, prompt, images, texts, tiled=None):
    """The same by one pass over prompt and text each, without any cache."""
    engine, found = runtime.engine, []

    def work(_):
        built, behind = Prompt.build_continued(
            prompt, images, engine.config, engine.tokenizer, texts, tiled=tiled
        )
        model = engine.model
        for text in behind:
            tokens = mx.array([*built.tokens, *text])
            pictures = model.encode(built.pictures) if built.pictures else []
            embedded = model.embed(tokens, pictures, built.spans)
            logits = np.array(model(tokens[None], input_embeddings=embedded[None])[0])
            rows = log_softmax(
                logits[len(built.tokens) - 1 : -1].astype(np.float64), -1
            )
            picked = rows[np.arange(len(text)), text].sum()
            greedy = bool((rows.argmax(-1) == text).all())
            yield Likelihood(picked, len(text), greedy)

    found += runtime.run(work)
    return found


def assert_equal(found, expected, tolerances):
    assert [x.num_tokens for x in found] == [x.num_tokens for x in expected]
    assert [x.greedy for x in found] == [x.greedy for x in expected]
    near = {"rel": tolerances["model"], "abs": tolerances["model"]}
    for one, other in zip(found, expected, strict=True):
        # An absolute error of a logarithm is a relative one of the probability.
        assert one.logprob == pytest.approx(other.logprob, **near)


@pytest.mark.parametrize("images", [[], [STAR], [FOUR, STAR]])
@pytest.mark.parametrize("texts", [TEXTS, MANY, TEXTS[:1]])
def test_texts_are_as_likely_as_in_one_pass(runtime, tolerances, images, texts):
    (found,) = scored(runtime, Candidates(Ask(QUESTION, images), texts))
    assert_equal(found, plainly(runtime, QUESTION, images, texts), tolerances)
    assert len({x.logprob for x in found}) == len(texts)


def test_what_is_known_of_the_prompt_changes_nothing(runtime, tolerances):
    """The second time its cache is there, and behind an answer more than it."""
    generate(runtime, QUESTION, [STAR])
    question = Candidates(Ask(QUESTION, [STAR]), TEXTS)
    first, second = scored(runtime, question, question)
    runtime.forget()
    (fresh,) = scored(runtime, question)
    assert_equal(first, fresh, tolerances)
    assert_equal(second, fresh, tolerances)


def test_the_greedy_answer_is_greedy_and_the_likeliest(runtime):
    said = generate(runtime, QUESTION, [STAR]).text.strip()
    others = [word for word in ("red", "blue", "green", "seven") if word != said]
    texts = tuple(f" {word}" for word in (said, *others))
    (found,) = scored(runtime, Candidates(Ask(QUESTION, [STAR]), texts))
    assert found[0].greedy
    assert not any(x.greedy for x in found[1:])
    assert max(found, key=lambda x: x.logprob) is found[0]


def test_experts_with_so_many_places_see_no_padding(runtime, tolerances, monkeypatch):
    """Each text is then run by itself."""
    question = Candidates(Ask(QUESTION, [STAR]), TEXTS)
    (together,) = scored(runtime, question)
    widths = []
    decoder = runtime.model.decoder
    monkeypatch.setattr(decoder, "has_capacity", True)
    hidden = type(decoder).hidden

    def watch(self, tokens, *arguments):
        widths.append(tokens.shape)
        return hidden(self, tokens, *arguments)

    monkeypatch.setattr(type(decoder), "hidden", watch)
    (alone,) = scored(runtime, question)
    assert_equal(alone, together, tolerances)
    lengths = [x.num_tokens - 1 for x in alone]
    assert widths == [(1, length) for length in lengths if length]


def test_examples_stand_before_the_prompt(runtime, tolerances):
    shots = (Shot((FOUR,), "blue", "What colour is the square?"),)
    settings = Settings(shots=shots)
    (found,) = scored(runtime, Candidates(Ask(QUESTION, [STAR], settings), TEXTS))
    turns = [
        {"role": "user", "content": [{"type": "image", "image": FOUR},
                                     {"type": "text", "text": shots[0].question}]},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": [{"type": "image", "image": STAR},
                                     {"type": "text", "text": QUESTION}]},
    ]  # fmt: skip
    assert_equal(found, plainly(runtime, turns, [], TEXTS), tolerances)


def test_a_space_is_the_templates_where_that_ends_with_one(make_config, tokenizer):
    for template, behind in (("plain", " red"), ("honeybee", "red")):
        config = make_config(prompt={"template": template})
        prompt, (tokens,) = Prompt.build_continued(
            "What?", (), config, tokenizer, [" red"]
        )
        text = tokenizer.hf.decode([*prompt.tokens, *tokens])
        assert text.endswith(behind)
        assert "  red" not in text


def test_a_typed_end_is_text(runtime):
    texts = ("</s>", " red")
    (found,) = scored(runtime, Candidates(Ask(QUESTION, [STAR]), texts))
    assert found[0].num_tokens > 1


def test_what_cannot_be_scored_stops_no_other(runtime):
    picture = Image.new("RGB", (8, 8))
    found = scored(
        runtime,
        Candidates(Ask(QUESTION, [STAR]), ()),
        Candidates(Ask(QUESTION, [STAR]), ("",)),
        Candidates(Ask(QUESTION, [picture]), (" red " * 900,)),
        Candidates(Ask(QUESTION, [STAR]), (" red",)),
    )
    assert "there are no texts to score" in str(found[0])
    assert "the continuation '' has no tokens" in str(found[1])
    assert "more than the model's context holds (1,024)" in str(found[2])
    assert all(isinstance(error, PromptError) for error in found[:3])
    assert len(found[3]) == 1


def test_a_model_that_predicts_no_numbers_is_said():
    with load(dtype=mx.float32) as broken:
        layer = broken.model.decoder.layers[0].mlp.down_proj

        def spoil(_):
            layer.weight = layer.weight * mx.nan
            yield mx.eval(layer.weight)

        assert list(broken.run(spoil)) == [None]
        (found,) = scored(broken, Candidates(Ask(QUESTION, [STAR]), TEXTS))
    assert isinstance(found, CheckpointError)
    assert "what the model predicts are no numbers (NaN)" in str(found)
