"""Pairs that training never shows are neither answers nor evidence there."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.shapes.balance import (
    OUT,
    RARE,
    AnswerAdjustment,
    class_adjustments,
    is_evidence,
)
from benchmarks.shapes.conversations import Conversations, _Whole
from benchmarks.shapes.exchanges import Exchange, ask
from benchmarks.shapes.joint import _weighted_loss
from benchmarks.shapes.patches import (
    COLOUR_CLASSES,
    SHAPE_CLASSES,
    PatchHeads,
    label_patches,
    patch_loss,
)
from benchmarks.shapes.scene import (
    ALL_PAIRS,
    HELD_OUT,
    UNNAMED,
    random_scene,
    recolour,
    split_rng,
)


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


def test_the_adjusted_classes_are_the_held_out_pairs():
    shapes, colours = class_adjustments()
    for pair in ALL_PAIRS:
        colour, shape = COLOUR_CLASSES[pair[0]], SHAPE_CLASSES[pair[1]]
        assert shapes[colour, shape] == np.float32(OUT if pair in HELD_OUT else 0)
        assert colours[shape, colour] == np.float32(RARE if pair in HELD_OUT else 0)
    # Neither the background nor a colour without a name adjusts anything.
    assert not shapes[0].any()
    assert not shapes[COLOUR_CLASSES[UNNAMED]].any()
    assert not colours[0].any()


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


def test_no_target_is_left_out(conversations, recipe, tokenizer):
    adjusted = 0
    for step in range(4):
        for rows in conversations("questions", step).rows:
            learned = rows.batch.learned[:, 1:]
            targets = rows.batch.tokens[:, 1:][learned]
            V = recipe.config.decoder.vocab_size
            assert rows.adjustment.shape == (len(targets), V)
            own = rows.adjustment[np.arange(len(targets)), targets]
            # Only what is doubted is touched, and that is not left out.
            assert own.min() >= 0.0
            stage = recipe.stages[-1]
            assert own.max() <= max(stage.doubt, 6 * stage.doubt_few)
            words = {tokenizer.hf.decode([t]).strip() for t in targets[own != 0]}
            assert words <= {"no", "No", *"012345"}
            adjusted += int(rows.adjustment.any(axis=1).sum())
    assert adjusted > 50


@pytest.fixture(scope="module")
def patches(recipe):
    """Labelled pictures, scores of their patches, and where red is."""
    mx.random.seed(0)
    rng = split_rng("train", 9)
    scenes = [recolour(random_scene(rng), 0.5, rng) for _ in range(24)]
    batch = label_patches(scenes, recipe.config)
    scores = PatchHeads(8)(mx.random.normal((24, 144, 8)))
    return batch, scores


def patch_losses(patches, biased, seen, favoured):
    """Plain and balanced, as they are, and with a favoured class where one is seen."""
    batch, scores = patches
    values = [batch.shapes, batch.colours]
    where = mx.array(values[1 - biased] == seen)
    assert where.any()
    raised = list(scores)
    is_favoured = mx.arange(scores[biased].shape[-1]) == favoured
    raised[biased] = scores[biased] + 5.0 * (where[..., None] & is_favoured)
    return [
        patch_loss(lambda _, s=s: s, None, batch, balanced=balanced).item()
        for balanced in (False, True)
        for s in (scores, tuple(raised))
    ]


def test_a_shape_that_is_left_out_costs_nothing(patches):
    red, square = COLOUR_CLASSES["red"], SHAPE_CLASSES["square"]
    plain, plain_raised, balanced, raised = patch_losses(patches, 0, red, square)
    assert plain_raised > plain
    assert raised == balanced


def test_a_colour_that_is_rare_costs_little(patches):
    square, red = SHAPE_CLASSES["square"], COLOUR_CLASSES["red"]
    plain, plain_raised, balanced, raised = patch_losses(patches, 1, square, red)
    assert 0 < raised - balanced < 0.1 * (plain_raised - plain)


SQUARE, STAR, TRIANGLE = ("green", "square"), ("red", "star"), ("black", "triangle")


@pytest.mark.parametrize(
    ("text", "pairs", "told"),
    [
        # No green star is ever shown.
        ("How many stars are there?", [SQUARE], True),
        ("Is there a star?", [STAR, SQUARE], True),
        ("What colour is the star?", [STAR, SQUARE], True),
        ("Is there a red star?", [STAR, SQUARE], False),
        ("Is there a star?", [STAR, TRIANGLE], False),
        ("Which shape is green?", [STAR, SQUARE], True),
        ("Count the green objects.", [STAR], True),
        ("Count the green squares.", [STAR], False),
        ("How many shapes are there?", [STAR, SQUARE], False),
        ("Where is the heart relative to the red star?", [TRIANGLE, STAR], True),
        ("Where is the pink heart relative to the red star?", [TRIANGLE, STAR], False),
        ("do the two crosses have the same colour?", [("yellow", "star")], True),
        ("Is there a star?", [(UNNAMED, "square")], False),
    ],
)
def test_what_tells_something_of_a_pair_not_shown(text, pairs, told):
    lone = random_scene(split_rng("train", 1), counts=(1,))
    (item,) = lone.objects
    objects = tuple(replace(item, colour=c, shape=s) for c, s in pairs)
    scene = replace(lone, objects=objects)
    assert is_evidence(text, [scene]) == told
    # It is enough that one of two pictures tells it.
    assert is_evidence(text, [replace(lone, objects=()), scene]) == told


def test_fair_questions_tell_nothing_of_pairs_not_shown():
    asked = {True: 0, False: 0}
    for seed in range(40):
        scene = random_scene(split_rng("train", seed))
        for fair in asked:
            found = ask(scene, split_rng("train", seed), 14, fair=fair)
            told = [x for x in found if is_evidence(x.question, [scene])]
            assert not (fair and told)
            asked[fair] += len(told)
    assert asked[False] > 40


def test_a_no_is_doubted_where_presence_is_asked_for(recipe, tokenizer):
    adjustment = AnswerAdjustment(tokenizer, recipe.config.decoder.vocab_size)

    def doubted(answer, doubt):
        tokens = tokenizer.hf.encode(f" {answer}", add_special_tokens=False)
        doubts = adjustment.doubt_denials(doubt)
        found = adjustment([*tokens, tokenizer.hf.eos_token_id], None, doubts)
        words = [tokenizer.hf.decode([t]).strip() for b in found for t in b]
        return words, {value for b in found for value in b.values()}

    for answer in ("yes", "no"):
        assert doubted(answer, 3.0) == (["no"], {3.0})
        assert doubted(answer, 0.0) == ([], set())
    assert doubted("Yes, there it is.", 3.0) == (["No"], {3.0})


def test_a_small_number_is_doubted_the_more(recipe, tokenizer):
    adjustment = AnswerAdjustment(tokenizer, recipe.config.decoder.vocab_size)
    doubts = adjustment.doubt_small_numbers(2.0)
    for answer in ("2", "The number of stars is 2."):
        tokens = tokenizer.hf.encode(f" {answer}", add_special_tokens=False)
        (found,) = [b for b in adjustment(tokens, None, doubts) if b]
        scores = {tokenizer.hf.decode([t]): value for t, value in found.items()}
        assert scores == {str(n): 2.0 * (6 - n) for n in range(6)}
    assert adjustment.doubt_small_numbers(0.0) == {}


def test_only_questions_about_presence_and_number_are_doubted(recipe, tokenizer):
    stage = replace(
        recipe.stages[-1],
        doubt=3.0, doubt_few=1.0, soften_no=0.0, doubt_some=False, turns=(1,),
    )  # fmt: skip
    making = Conversations(recipe, stage, tokenizer)
    scene = random_scene(split_rng("train", 1), counts=(1,))

    def doubts(kind, answer):
        spoken = making._in_turn([Exchange("Is it?", answer, kind=kind)], 1)
        return making._whole([scene], [[_Whole(spoken, [0])]]).rows[0].adjustment.max()

    assert doubts("exists", "no") == 3.0
    assert doubts("count", "2") == 6.0
    assert doubts("where", "no") == doubts("exists", "2") == doubts(None, "2") == 0.0
    asked = {
        exchange.kind == "exists"
        for seed in range(20)
        for exchange in ask(
            random_scene(split_rng("train", seed)), split_rng("train", seed), 14
        )
        if exchange.answer in ("yes", "no")
    }
    # Whether something is left of something else is another question.
    assert asked == {True, False}


def test_a_no_and_a_number_give_a_share_to_what_is_more(recipe, tokenizer):
    stage = replace(
        recipe.stages[-1],
        doubt=3.0, doubt_few=1.0, soften_no=0.1, soften_number=0.2, turns=(1,),
        doubt_some=True,
    )  # fmt: skip
    making = Conversations(recipe, stage, tokenizer)
    scene = random_scene(split_rng("train", 1), counts=(1,))

    def softened(kind, answer, balanced=True, asked="How many Stars?"):
        spoken = making._in_turn([Exchange(asked, answer, kind=kind)], 1)
        spoken = replace(spoken, balanced=balanced)
        (rows,) = making._whole([scene], [[_Whole(spoken, [0])]]).rows
        learned = rows.batch.tokens[:, 1:][rows.batch.learned[:, 1:]]
        assert len(rows.rivals) == len(rows.shares) == len(learned)
        found = [
            (tokenizer.hf.decode([t]).strip(), tokenizer.hf.decode([r]).strip(), s)
            for t, r, s in zip(learned, rows.rivals, rows.shares, strict=True)
            if s
        ]
        return found, rows.adjustment.max()

    # Doubted as well, a no would be less likely than a yes where nothing is.
    assert softened("exists", "no") == ([("no", "yes", np.float32(0.1))], 0.0)
    # Of the two in this sentence, it is the first that says whether.
    said = softened("exists", "No, there is no red star in the picture.")[0]
    assert said == [("No", "Yes", np.float32(0.1))]
    assert softened("exists", "yes") == ([], 3.0)
    for answer in ("2", "There are 2 red stars."):
        assert softened("count", answer)[0] == [("2", "3", np.float32(0.2))]
    assert softened("count", "6") == ([], 6.0)
    # Of all that is there none is left out for its colour or shape.
    for asked, doubted in (("How many red objects?", 6.0), ("How many shapes?", 0.0)):
        assert softened("count", "2", asked=asked)[1] == doubted
        assert bool(softened("count", "2", asked=asked)[0]) is (doubted > 0)
    assert softened("where", "no") == softened(None, "2") == ([], 0.0)
    # What is told in words is of all pairs.
    assert softened("exists", "no", balanced=False) == ([], 0.0)


def test_a_softened_target_is_shared_with_its_rival(recipe, tokenizer):
    """The loss has its least where the scores differ by the log of the shares' ratio."""
    stage = replace(recipe.stages[-1], soften_no=0.1, doubt=3.0, turns=(1,))
    making = Conversations(recipe, stage, tokenizer)
    spoken = making._in_turn([Exchange("Is it?", "no", kind="exists")], 1)
    scene = random_scene(split_rng("train", 1), counts=(1,))
    (rows,) = making._whole([scene], [[_Whole(spoken, [0])]]).rows
    (place,) = np.flatnonzero(rows.shares)
    no = int(rows.batch.tokens[:, 1:][rows.batch.learned[:, 1:]][place])
    yes = int(rows.rivals[place])
    V = recipe.config.decoder.vocab_size
    gap = mx.array(np.log(0.9 / 0.1), mx.float32)

    def loss(gap):
        scores = -20.0 * mx.ones((len(rows.shares), V))
        scores[place, no], scores[place, yes] = gap, 0.0
        pupil = SimpleNamespace(
            mm1=SimpleNamespace(decoder=SimpleNamespace(logits=lambda _: scores))
        )
        states = mx.zeros((*rows.batch.tokens.shape, 1))
        only = replace(rows, weights=np.eye(len(rows.shares), dtype=np.float32)[place])
        return _weighted_loss(pupil, only, states)

    assert abs(mx.grad(loss)(gap).item()) < 1e-5
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert loss(gap).item() == pytest.approx(entropy, abs=1e-4)


def test_a_share_of_a_kind_is_asked():
    def kinds(shares):
        texts = Counter()
        for seed in range(60):
            scene = random_scene(split_rng("train", seed))
            for x in ask(scene, split_rng("train", 1000 + seed), 99, shares=shares):
                texts[
                    "count" if x.answer.isdigit() else "box" if "[" in x.answer else ""
                ] += 1
        return texts

    everything, none, half = kinds({}), kinds({"box": 0.0}), kinds({"box": 0.5})
    assert none["box"] == 0
    assert 0.3 < half["box"] / everything["box"] < 0.8
    assert none["count"] > 0.8 * everything["count"]
