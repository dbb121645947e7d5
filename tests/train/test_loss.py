"""The loss is the mean cross-entropy of learned tokens, whatever the batch's shape."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mm1_mlx.models import MM1
from mm1_mlx.train.loss import next_token_loss
from mm1_mlx.train.sample import build_sample, collate


@pytest.fixture
def talks(conversation):
    return [
        conversation("red"),
        conversation("a blue star", "two circles, one red"),
        conversation("lime", pictures=2),
    ]


OWNERS = [[0], [1], [2, 3]]


def test_the_loss_equals_a_plain_computation(talks, make_batch, tiny_model, tolerances):
    batch = make_batch(talks, OWNERS)
    image_tokens = tiny_model.encode(batch.pictures)
    tokens = mx.array(batch.tokens)
    embeddings = tiny_model.embed(tokens.flatten(), image_tokens, batch.spans)
    logits = tiny_model(tokens, input_embeddings=embeddings.reshape(*tokens.shape, -1))
    exact = np.array(logits).astype(np.float64)
    losses = []
    for row, scores, learned in zip(batch.tokens, exact, batch.learned, strict=True):
        for t in range(1, len(row)):
            if learned[t]:
                total = np.log(np.exp(scores[t - 1] - scores[t - 1].max()).sum())
                losses.append(total + scores[t - 1].max() - scores[t - 1][row[t]])
    loss, count = next_token_loss(tiny_model, batch)
    assert count.item() == len(losses) == batch.learned.sum()
    assert loss.item() == pytest.approx(np.mean(losses), rel=tolerances["op"])


def test_padding_changes_nothing(talks, make_batch, tiny_model, tolerances):
    together, count = next_token_loss(tiny_model, make_batch(talks, OWNERS))
    alone = [
        next_token_loss(tiny_model, make_batch([talk], [owners]))
        for talk, owners in zip(talks, OWNERS, strict=True)
    ]
    total = sum(loss.item() * n.item() for loss, n in alone)
    assert count.item() == sum(n.item() for _, n in alone)
    assert together.item() == pytest.approx(total / count.item(), rel=tolerances["op"])


def test_rows_that_share_a_picture_equal_rows_with_copies(
    conversation, make_batch, tiny_model, tolerances
):
    talks = [conversation(answer) for answer in ("red", "a star", "two")]
    shared = make_batch(talks, [[0], [0], [1]], ["red", "blue"])
    copies = make_batch(talks, [[0], [1], [2]], ["red", "red", "blue"])
    grad = nn.value_and_grad(tiny_model, lambda b: next_token_loss(tiny_model, b)[0])
    (one, gradients), (other, expected) = grad(shared), grad(copies)
    assert one.item() == pytest.approx(other.item(), rel=tolerances["op"])
    for (name, x), (_, y) in zip(
        tree_flatten(gradients), tree_flatten(expected), strict=True
    ):
        # A key's bias adds the same to every score: its gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            difference = mx.abs(x - y).max().item()
            assert difference <= tolerances["model"] * mx.abs(y).max().item(), name


def test_every_parameter_learns(talks, make_batch, make_model):
    model = make_model(decoder={"tie_word_embeddings": True})
    batch = make_batch(talks, OWNERS)
    grad = nn.value_and_grad(model, lambda: next_token_loss(model, batch)[0])
    _, gradients = grad()
    for name, gradient in tree_flatten(gradients):
        # Softmax does not see what a key's bias adds to every score.
        if not name.endswith("k_proj.bias"):
            assert mx.abs(gradient).max().item() > 1e-7, name


def test_the_loss_depends_on_the_pictures(conversation, make_batch, tiny_model):
    talk = conversation("red")
    one, _ = next_token_loss(tiny_model, make_batch([talk], [[0]]))
    other, _ = next_token_loss(tiny_model, make_batch([talk], [[1]]))
    assert abs(one.item() - other.item()) > 1e-3


def test_a_batch_that_teaches_nothing_has_no_loss(make_batch, tiny_model):
    loss, count = next_token_loss(tiny_model, make_batch([[("user", ["a"])]], [[]]))
    assert (loss.item(), count.item()) == (0.0, 0)


def test_text_alone_can_be_learned_without_eyes(
    make_config, reinitialise, conversation, train_tokenizer
):
    config = make_config(vision=None, connector=None, image=None)
    sample = build_sample(conversation("red", pictures=0), config, train_tokenizer)
    batch = collate([sample], [[]], [], config, train_tokenizer)
    loss, count = next_token_loss(reinitialise(MM1(config)), batch)
    assert count.item() == sum(sample.learned)
    assert loss.item() > 0
