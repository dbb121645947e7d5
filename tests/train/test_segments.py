"""Examples in one row learn as they do alone, and none sees another."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mm1_mlx.image import load_pictures
from mm1_mlx.train.loss import batch_states, next_token_loss, sparse_loss
from mm1_mlx.train.sample import build_sample, pack, stack, widen_sample

MOE = {"num_experts": 4, "every": 1, "offset": 0}
# Alone a row's logits are the model's own: whatever a kind of attention adds must restart.
DECODERS = {
    "plain": {},
    "window": {"sliding_window": 7},
    "full norm": {"qk_norm": "full"},
    "head norm": {"qk_norm": "head"},
    "rotated norm": {"qk_norm": "rotated"},
    "interleaved": {"rope_interleaved": True},
    "experts": {"moe": MOE},
}


@pytest.fixture(scope="session")
def rows(tiny_config, train_tokenizer, conversation):
    """A function: rows, places and pictures of conversations with these answers."""

    def rows(*answers):
        made, places = [], []
        for i, answer in enumerate(answers):
            sample = build_sample(conversation(answer), tiny_config, train_tokenizer)
            own = load_pictures([Image.new("RGB", (16, 16), "red")], tiny_config.image)
            made.append(widen_sample(sample, own, tiny_config, train_tokenizer))
            places.append([i])
        colours = ["red", "blue", "lime", "white"]
        images = [Image.new("RGB", (16, 16), colours[i % 4]) for i in range(len(made))]
        return made, places, load_pictures(images, tiny_config.image)

    return rows


ANSWERS = ("a blue star", "two circles, one of them red", "red", "a red star?", "no")


@pytest.mark.parametrize("name", DECODERS)
def test_packed_rows_equal_padded_ones(name, make_model, rows, tolerances):
    model = make_model(decoder=DECODERS[name])
    made = rows(*ANSWERS)
    padded, packed = stack(*made), pack(*made)
    assert packed.tokens.shape[0] == 1
    assert packed.tokens.shape[1] % 32 == 0
    assert len(packed.segments) == len(ANSWERS)
    loss = sparse_loss if name == "experts" else next_token_loss
    # The gates' losses are means over rows, of which there are not as many.
    weights = {"balance_weight": 0.0, "z_weight": 0.0} if name == "experts" else {}

    def learn(batch):
        count = loss(model, batch)[1].item()
        value = partial(loss, model, batch, **weights)
        mean, gradients = nn.value_and_grad(model, lambda: value()[0])()
        return mean.item(), count, dict(tree_flatten(gradients))

    (mean, count, gradients), (other, others, expected) = learn(packed), learn(padded)
    assert count == others
    assert mean == pytest.approx(other, rel=tolerances["op"])
    largest = max(mx.abs(x).max().item() for x in expected.values())
    for path, gradient in gradients.items():
        difference = mx.abs(gradient - expected[path]).max().item()
        # Of a key's bias it is rounding alone: the softmax does not see it.
        size = mx.abs(expected[path]).max().item()
        assert difference <= tolerances["model"] * max(size, 1e-3 * largest), path


@pytest.mark.parametrize("name", DECODERS)
def test_an_example_does_not_see_another(name, make_model, rows, assert_close):
    """Another text of the same length before it, and every later number stays.

    To rounding: other tokens before it put its own at other rows of an expert's matrix.
    """
    model = make_model(decoder=DECODERS[name])
    batch = pack(*rows(*ANSWERS))
    tokens = batch.tokens.copy()
    changed = np.flatnonzero(batch.learned[0, : batch.segments[0]])
    tokens[0, changed] = tokens[0, changed[::-1]]
    packs = [batch, replace(batch, tokens=tokens)]
    states = [
        batch_states(model, batch, model.encode(batch.pictures)) for batch in packs
    ]
    first = packs[0].segments[0]
    assert not mx.array_equal(states[0][:, :first], states[1][:, :first])
    logits = [model.decoder.logits(x[:, first:]) for x in states]
    assert_close(*logits, "op")


def test_what_stands_behind_is_not_seen_either(make_model, rows):
    model = make_model()
    one, other = (rows(*ANSWERS[:-1], last) for last in ("no", "on"))
    packs = [pack(*made) for made in (one, other)]
    assert packs[0].segments == packs[1].segments
    states = [
        batch_states(model, batch, model.encode(batch.pictures)) for batch in packs
    ]
    before = sum(packs[0].segments[:-1])
    assert mx.array_equal(states[0][:, :before], states[1][:, :before])
    assert not mx.array_equal(states[0][:, before:], states[1][:, before:])


def test_positions_begin_anew(make_model, rows, assert_close):
    """The same example twice in a row: the second's states are the first's."""
    model, (made, places, pictures) = make_model(), rows("a blue star")
    batch = pack(made * 2, places * 2, pictures)
    states = batch_states(model, batch, model.encode(pictures))
    length = batch.segments[0]
    first, second = states[:, :length], states[:, length : 2 * length]
    assert_close(second, first, "op")
    assert np.abs(np.array(first)).max() > 0
