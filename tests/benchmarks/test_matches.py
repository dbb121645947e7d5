"""New words: where the last block is told to look, and what it has to know there."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from benchmarks.shapes.joint import Pupil, _attribute_loss
from benchmarks.shapes.matches import HEAD, match_loss
from benchmarks.shapes.patches import COLOUR_CLASSES, SHAPE_CLASSES
from benchmarks.shapes.scene import HELD_OUT
from mm1_mlx.models import MM1


@pytest.fixture
def rows(conversations):
    """Those of an episode's batch with pictures, and those that are told in words."""
    shown, written = conversations("episodes").rows
    return {"shown": shown, "written": written}


@pytest.mark.parametrize("kind", ["shown", "written"])
def test_what_was_told_is_what_is_read(kind, rows):
    examples, tokens = rows[kind].examples, rows[kind].batch.tokens
    assert len(examples.queries) > 20
    for query, told in zip(examples.queries, examples.told, strict=True):
        row, place = divmod(int(query), tokens.shape[1])
        found = np.flatnonzero(told)
        assert found.size
        assert found.max() < place
        assert {*tokens[row, found]} == {tokens[row, place + 1]}


@pytest.mark.parametrize("kind", ["shown", "written"])
def test_every_learned_token_has_a_place_to_look(kind, rows):
    examples, batch = rows[kind].examples, rows[kind].batch
    assert sorted(examples.queries + 1) == [*np.flatnonzero(batch.learned)]


def test_what_is_told_in_words_is_what_has_to_be_known(rows, tokenizer):
    examples, tokens = rows["written"].examples, rows["written"].batch.tokens
    shapes = {number: name for name, number in SHAPE_CLASSES.items()}
    colours = {number: name for name, number in COLOUR_CLASSES.items()}
    for at, shape, colour in zip(
        examples.tokens, examples.shapes, examples.colours, strict=True
    ):
        row, place = divmod(int(at), tokens.shape[1])
        before = tokenizer.hf.decode(tokens[row, :place].tolist())
        latest = before.rsplit("USER:", 1)[1]
        assert f"{colours[colour]} {shapes[shape]}" in latest


def named_pairs(rows):
    return {*zip(rows.examples.colours, rows.examples.shapes, strict=True)}


def test_held_out_pairs_are_told_in_words_and_never_shown(conversations):
    held_out = {(COLOUR_CLASSES[c], SHAPE_CLASSES[s]) for c, s in HELD_OUT}
    # One batch tells of a dozen pairs: held-out ones need not be among them.
    batches = [conversations("episodes", step).rows for step in range(4)]
    assert not held_out & set().union(*(named_pairs(shown) for shown, _ in batches))
    assert held_out & set().union(*(named_pairs(written) for _, written in batches))


def test_a_held_out_pair_is_as_good_as_any_where_it_is_told(conversations, recipe):
    """No -inf of a seen pair's mask is in what has to be known of it."""
    for step in range(4):
        for rows in conversations("episodes", step).rows:
            states = mx.zeros((*rows.batch.tokens.shape, 160))
            assert _attribute_loss(Pupil(recipe), rows, states).item() < 10


def test_the_loss_is_of_the_attention_that_the_head_pays(rows, recipe):
    block = MM1(recipe.config).layers[-1]
    batch, examples = rows["written"].batch, rows["written"].examples
    B, T = batch.tokens.shape
    x = mx.random.normal((B, T, 160), key=mx.random.key(3))
    attention, size = block.self_attn, 32
    # Values that tell one token from another: attention is what comes out of them.
    seen = np.zeros((B, T, T), np.float32)
    normed = block.input_layernorm(x)
    q, k = attention.q_proj(normed), attention.k_proj(normed)
    for first in range(0, T, size):
        v = np.zeros((B, T, 160), np.float32)
        for i in range(first, min(first + size, T)):
            v[:, i, HEAD * size + i - first] = 1
        out = attention._attend(q, k, mx.array(v), "causal")
        width = min(size, T - first)
        seen[:, :, first : first + width] = np.array(out)[
            :, :, HEAD * size : HEAD * size + width
        ]
    assert seen.sum(axis=-1) == pytest.approx(1, abs=1e-4)
    paid = (seen.reshape(B * T, T)[examples.queries] * examples.told).sum(axis=-1)
    expected = -np.log(paid).mean()
    assert match_loss(block, x, examples).item() == pytest.approx(expected, rel=1e-4)


def test_learning_it_turns_the_head_to_what_was_told(rows, recipe):
    mx.random.seed(1)
    block = MM1(recipe.config).layers[-1]
    examples = rows["written"].examples
    x = mx.random.normal((*rows["written"].batch.tokens.shape, 160))
    step = nn.value_and_grad(block, lambda x: match_loss(block, x, examples))
    before = step(x)[0].item()
    optimizer = optim.Adam(1e-2)
    for _ in range(15):
        optimizer.update(block, step(x)[1])
    assert step(x)[0].item() < 0.5 * before
