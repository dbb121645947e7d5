"""Pairs that training never shows are neither answers nor evidence there."""

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.shapes.balance import (
    OUT,
    RARE,
    AnswerAdjustment,
    shape_adjustments,
)
from benchmarks.shapes.conversations import Conversations
from benchmarks.shapes.patches import (
    COLOUR_CLASSES,
    SHAPE_CLASSES,
    PatchHeads,
    label_patches,
    patch_loss,
)
from benchmarks.shapes.recipe import load_recipe, open_tokenizer
from benchmarks.shapes.scene import (
    ALL_PAIRS,
    HELD_OUT,
    UNNAMED,
    random_scene,
    recolour,
    split_rng,
)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe()


@pytest.fixture(scope="module")
def tokenizer(recipe, tmp_path_factory):
    return open_tokenizer(tmp_path_factory.mktemp("tokenizer"), recipe.config)


@pytest.fixture(scope="module")
def balance(recipe, tokenizer):
    """A function: word by word of an answer, what is added to which words' scores."""
    adjustment = AnswerAdjustment(tokenizer, recipe.config.decoder.vocab_size)

    def balance(answer, about=None):
        tokens = tokenizer.hf.encode(f" {answer}", add_special_tokens=False)
        tokens.append(tokenizer.hf.eos_token_id)
        words = [tokenizer.hf.decode([token]).strip() for token in tokens]
        others = [
            {tokenizer.hf.decode([t]).strip(): value for t, value in words.items()}
            for words in adjustment(tokens, about)
        ]
        return {w: o for w, o in zip(words, others, strict=True) if o}

    return balance


def test_the_left_out_classes_are_the_held_out_pairs():
    adjustments = shape_adjustments()
    for colour, shape in ALL_PAIRS:
        expected = OUT if (colour, shape) in HELD_OUT else 0
        assert adjustments[COLOUR_CLASSES[colour], SHAPE_CLASSES[shape]] == expected
    # Neither the background nor a colour without a name leaves anything out.
    assert not adjustments[0].any()
    assert not adjustments[COLOUR_CLASSES[UNNAMED]].any()


def test_a_word_is_balanced_against_what_it_could_never_have_been(balance):
    assert balance("star", ("red", "star")) == {"star": {"square": OUT}}
    assert balance("red", ("red", "star")) == {"red": {"green": RARE}}
    assert balance("red", ("red", "heart")) == {"red": {"orange": RARE, "black": RARE}}
    assert balance("star", (UNNAMED, "star")) == {}
    assert balance("red") == balance("2") == balance("yes") == {}


def test_a_sentence_is_balanced_by_its_own_pairs(balance):
    assert balance("A red star, two green hearts.") == {
        "red": {"green": RARE},
        "star": {"square": OUT},
        "green": {"orange": RARE, "black": RARE},
        "hearts": {"stars": OUT},
    }


def test_no_target_is_left_out(recipe, tokenizer):
    conversations = Conversations(recipe, recipe.stages[-1], tokenizer)
    adjusted = 0
    for step in range(4):
        batch = conversations(step, 0)
        learned = batch.rows.learned[:, 1:]
        targets = batch.rows.tokens[:, 1:][learned]
        assert batch.adjustment.shape == (len(targets), 512)
        assert not batch.adjustment[np.arange(len(targets)), targets].any()
        adjusted += int(batch.adjustment.any(axis=1).sum())
    assert adjusted > 50


def test_a_left_out_class_costs_nothing(recipe):
    """A score for red squares on red patches changes the plain loss alone."""
    mx.random.seed(0)
    rng = split_rng("train", 9)
    scenes = [recolour(random_scene(rng), 0.5, rng) for _ in range(8)]
    batch = label_patches(scenes, recipe.config)
    heads = PatchHeads(8)
    features = mx.random.normal((8, 144, 8))
    red = mx.array(batch.colours == COLOUR_CLASSES["red"])
    assert red.any()

    class Biased:
        def __call__(self, x):
            shapes, colours = heads(x)
            square = mx.arange(shapes.shape[-1]) == SHAPE_CLASSES["square"]
            return shapes + 5.0 * (red[..., None] & square), colours

    def loss(heads, **kind):
        return patch_loss(heads, features, batch, **kind).item()

    assert loss(Biased(), balanced=True) == loss(heads, balanced=True)
    assert loss(Biased()) > loss(heads)
