"""The head's loss by blocks of rows against mlx's own over all of them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mm1_mlx.adapters import AdapterConfig, attach
from mm1_mlx.kernels import by_blocks
from mm1_mlx.train import cross_entropy
from mm1_mlx.train.cross_entropy import block_rows, summed_cross_entropy

N, D, V = 23, 48, 320
# Rows of a block: two and a rest, all, and more than there are.
SIZES = (10, N, 64)


@pytest.fixture
def make(make_model):
    """``make_model`` in training."""
    return lambda **changes: make_model(**changes).train()


def whole(model, states, targets):
    scores = model.decoder.logits(states).astype(mx.float32)
    return nn.losses.cross_entropy(scores, targets, reduction="sum")


def drawn(*shape, scale=1.0):
    rng = np.random.default_rng(sum(shape))
    return mx.array(rng.normal(0, scale, shape).astype(np.float32))


HEADS = {
    "own": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"head_bias": True},
    "frozen": {},
    "adapted": {},
}


@pytest.fixture(params=HEADS)
def model(request, make):
    model = make(decoder=HEADS[request.param])
    if request.param == "frozen":
        model.freeze()
    if request.param == "adapted":
        model.freeze()
        attach(model, AdapterConfig(rank=2, where=("head",)))
        model.decoder.lm_head.lora_b = drawn(2, V, scale=0.1)
    return model


@pytest.fixture
def targets():
    return mx.array(np.random.default_rng(1).integers(0, V, N))


def both(model, states, targets):
    """Losses and gradients of states and of trained weights: by blocks, and whole."""

    def value(function):
        def loss(weights, states):
            model.update(weights)
            # A factor, as the mean and a loss's scale are.
            return function(model, states, targets) * 0.37

        weights = model.trainable_parameters()
        found = mx.value_and_grad(loss, argnums=(0, 1))(weights, states)
        model.update(weights)
        mx.eval(found)
        return found

    return value(summed_cross_entropy), value(whole)


@pytest.mark.parametrize("rows", SIZES)
def test_loss_and_gradients_are_those_of_all_scores(
    model, targets, rows, monkeypatch, tolerances
):
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", rows)
    monkeypatch.setattr(cross_entropy, "SCORES", 1)
    monkeypatch.setattr(by_blocks, "BLOCK", 1000)
    (ours, mine), (expected, theirs) = both(model, drawn(N, D), targets)
    trained = tree_flatten(model.trainable_parameters())
    assert len(tree_flatten(mine)) == len(trained) + 1
    assert ours.item() == pytest.approx(expected.item(), rel=tolerances["op"])
    for (name, x), (_, y) in zip(tree_flatten(mine), tree_flatten(theirs), strict=True):
        difference, size = mx.abs(x - y).max().item(), mx.abs(y).max().item()
        assert difference <= tolerances["model"] * size, name


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_half_precision_gives_gradients_in_kind(make, targets, kind, monkeypatch):
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", 10)
    monkeypatch.setattr(cross_entropy, "SCORES", 1)
    model = make()
    model.set_dtype(kind)
    (ours, mine), (expected, theirs) = both(model, drawn(N, D).astype(kind), targets)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-3)
    for (name, x), (_, y) in zip(tree_flatten(mine), tree_flatten(theirs), strict=True):
        assert x.dtype == y.dtype == kind, name
        x, y = x.astype(mx.float32), y.astype(mx.float32)
        error = mx.abs(x - y).max().item()
        assert error <= 2 * mx.finfo(kind).eps * mx.abs(y).max().item(), name


@pytest.mark.parametrize("frozen", [False, True])
def test_a_large_scale_saves_small_gradients_of_float16(make, frozen):
    """Scaled before they are rounded: as the trainer scales a loss in float16."""
    model = make(decoder={"head_bias": True})
    targets = mx.full((N,), 7)
    # Nearly certain: each score's gradient is less than float16 holds.
    model.decoder.lm_head.bias = mx.where(mx.arange(V) == 7, 24.0, 0.0)
    model.set_dtype(mx.float16)
    if frozen:
        model.freeze()
    states = drawn(N, D).astype(mx.float16)

    def gradient(scale):
        def loss(x):
            return summed_cross_entropy(model, x, targets) * scale

        return np.array(mx.grad(loss)(states).astype(mx.float32) / scale)

    exact = np.array(
        mx.grad(lambda x: whole(model, x, targets))(states.astype(mx.float32))
    )
    size = np.abs(exact).max()
    assert size > 0
    assert np.abs(gradient(2.0**24) - exact).max() < 0.05 * size
    assert np.abs(gradient(1.0) - exact).max() > 0.5 * size


def test_what_only_measures_computes_no_gradients(make, targets, monkeypatch):
    model = make()
    states = drawn(N, D)
    expected = whole(model, states, targets).item()

    def refuse(*_, **__):
        raise AssertionError("a gradient was asked for")

    model.eval()
    monkeypatch.setattr(mx, "value_and_grad", refuse)
    assert summed_cross_entropy(model, states, targets).item() == pytest.approx(
        expected
    )
    model.train()
    with pytest.raises(AssertionError, match="gradient"):
        summed_cross_entropy(model, states, targets)


def test_scores_of_one_block_are_held_at_a_time(make, monkeypatch):
    rows, vocabulary = 8192, 1024
    model = make(decoder={"vocab_size": vocabulary})
    model.freeze()
    states, targets = drawn(rows, D), mx.arange(rows) % vocabulary
    monkeypatch.setattr(cross_entropy, "SCORES", 1)
    mx.eval(model.parameters(), states, targets)

    def peak(function):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda x: function(model, x, targets))(states))
        return mx.get_peak_memory() - before

    scores = rows * vocabulary * 4
    assert peak(summed_cross_entropy) < scores / 2
    assert peak(whole) > 2 * scores


def test_what_only_measures_holds_scores_of_one_block_too(make, monkeypatch):
    rows, vocabulary = 8192, 1024
    model = make(decoder={"vocab_size": vocabulary})
    states, targets = drawn(rows, D), mx.arange(rows) % vocabulary
    monkeypatch.setattr(cross_entropy, "SCORES", 1)
    mx.eval(model.parameters(), states, targets)
    model.eval()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(summed_cross_entropy(model, states, targets))
    assert mx.get_peak_memory() - before < rows * vocabulary * 4 / 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_second_derivative_is_refused(training, frozen, make, targets):
    model = make().train(training)
    if frozen:
        model.freeze()

    def slope(x):
        return mx.grad(lambda x: summed_cross_entropy(model, x, targets))(x).sum()

    states = drawn(N, D)
    assert slope(states).item() != 0
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        mx.grad(slope)(states)


def test_a_block_has_enough_rows_for_a_product():
    assert block_rows(256_000) == 128
    assert block_rows(32_000) == 131
    assert block_rows(320) == 13_107
