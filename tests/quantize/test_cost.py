"""What packing costs is measured where the unpacked model answers."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.errors import CheckpointError
from mm1_mlx.prompt import Prompt
from mm1_mlx.quantize.calibration import examples
from mm1_mlx.quantize.cost import ask, divergence, measure, predict
from mm1_mlx.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def asked(dense):
    """A model, and what it says about two drawn pictures."""
    model = load_model(dense)
    tokenizer = load_tokenizer(dense, load_config(dense).prompt)
    prompts = [
        Prompt.build(x.prompt, x.pictures, model.config, tokenizer)
        for x in examples(None, 8, sees=True)[1]
    ]
    return model, ask(model, tokenizer, prompts)


def test_what_is_kept_costs_nothing(asked):
    model, reference = asked
    cost = measure(model, reference)
    assert (cost.kl_mean, cost.kl_p99, cost.top1) == (0, 0, 1)
    assert cost.positions == sum(len(x.answer) for x in reference.samples)


def test_every_token_of_the_answer_is_the_likeliest_before_it(asked):
    _, reference = asked
    for sample, logits in zip(reference.samples, reference.logits, strict=True):
        assert tuple(mx.argmax(logits, axis=-1).tolist()) == sample.answer
        assert sample.prompt.pictures


def test_pictures_at_hand_are_the_same_pictures(asked):
    model, reference = asked
    sample = reference.samples[0]
    tokens = model.encode(sample.prompt.pictures)
    assert mx.array_equal(predict(model, sample, tokens), reference.logits[0])
    other = [x + 1 for x in tokens]
    assert not mx.allclose(predict(model, sample, other), reference.logits[0])


def test_the_divergence_is_the_sum_of_p_log_p_by_q():
    rng = np.random.default_rng(0)
    q, p = rng.dirichlet(np.ones(7), 5), rng.dirichlet(np.ones(7), 5)
    expected = (p * np.log(p / q)).sum(axis=-1)
    # Logits are logarithms up to a constant.
    logits, others = mx.array(np.log(q) + 3), mx.array(np.log(p) - 2)
    np.testing.assert_allclose(divergence(logits, others), expected, rtol=1e-4)


def test_predictions_that_are_no_numbers_have_no_cost(asked):
    model, reference = asked
    layer = model.decoder.layers[0].mlp.down_proj
    weight, layer.weight = layer.weight, layer.weight * mx.nan
    try:
        with pytest.raises(
            CheckpointError, match=r"at (\d+) of \1 positions the predic"
        ):
            measure(model, reference)
    finally:
        layer.weight = weight


def test_figures_are_those_of_all_positions(asked):
    model, reference = asked
    layer = model.decoder.layers[0].mlp.down_proj
    weight = layer.weight
    layer.weight = weight * 1.2
    cost = measure(model, reference)
    pairs = zip(reference.samples, reference.logits, strict=True)
    kl = np.concatenate([np.array(divergence(predict(model, s), x)) for s, x in pairs])
    layer.weight = weight
    assert cost.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert cost.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-5)
    assert cost.kl_mean > 0
