"""Schedules and updates are those of the papers, whatever library computes them."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.optimizer import is_matrix, make_optimizer, schedule

CONFIG = TrainConfig(steps=8, learning_rate=3e-3, warmup_steps=2, decay_steps=4)


def test_the_schedule_warms_up_stays_and_falls():
    config = replace(
        CONFIG, steps=100, warmup_steps=10, decay_steps=40, final_fraction=0.1
    )
    rate = schedule(config, 1.0)
    rates = [rate(mx.array(step)).item() for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1)
    assert rates[10:61] == pytest.approx([1] * 51)
    assert rates[80] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[60:]))


def test_a_schedule_may_stay_at_its_peak():
    rate = schedule(replace(CONFIG, steps=10, decay_steps=0), 1.0)
    assert [rate(mx.array(step)).item() for step in range(2, 11)] == [1] * 9


def test_the_schedule_before_the_decay_does_not_depend_on_the_number_of_steps():
    short, long = (
        schedule(replace(CONFIG, steps=n, decay_steps=4), 1.0) for n in (20, 50)
    )
    for step in range(17):
        assert short(mx.array(step)).item() == long(mx.array(step)).item()


def test_a_schedule_may_begin_at_its_peak():
    rate = schedule(replace(CONFIG, warmup_steps=0), 1.0)
    assert rate(mx.array(0)).item() == 1.0


def test_muon_takes_the_matrices_and_no_table(tiny_model):
    matrices = {k for k, v in tiny_model.tensors().items() if is_matrix(k, v)}
    assert "decoder.layers.0.mlp.up_proj.weight" in matrices
    assert "vision.patch_embedding.weight" in matrices
    for name in ("decoder.embed_tokens.weight", "vision.position_embedding"):
        assert name not in matrices
    assert not any(name.endswith(("bias", "norm.weight")) for name in matrices)


def steps_of(config, weights, gradients):
    """The weights behind every step, by our optimizer."""
    optimizer, weights = make_optimizer(config), {"decoder": dict(weights)}
    seen = []
    for gradient in gradients:
        weights = optimizer.apply_gradients({"decoder": dict(gradient)}, weights)
        seen.append({k: np.array(v) for k, v in weights["decoder"].items()})
    return seen


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    shapes = {"matrix": (6, 4), "vector": (5,), "experts": (3, 4, 2)}

    def draw(scale):
        return {
            name: scale * rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes.items()
        }

    as_arrays = lambda x: {k: mx.array(v) for k, v in x.items()}  # noqa: E731
    weights, gradients = draw(1.0), [draw(0.1) for _ in range(7)]
    return weights, gradients, as_arrays


def rates(config):
    """The schedule, written down once more."""
    w, d, n = config.warmup_steps, config.decay_steps, config.steps
    for t in range(n):
        if t < w:
            yield config.learning_rate * t / w
        elif t < n - d:
            yield config.learning_rate
        else:
            share = 0.5 * (1 + np.cos(np.pi * (t - (n - d)) / d))
            f = config.final_fraction
            yield config.learning_rate * (f + share * (1 - f))


def test_adamw_decays_what_the_paper_does_and_no_more(problem, assert_close):
    """Lambda = 0.1 eta, scaled by the schedule alone, is a weight decay of 0.1."""
    weights, gradients, as_arrays = problem
    config = replace(CONFIG, weight_decay=0.1)
    seen = steps_of(config, as_arrays(weights), [as_arrays(g) for g in gradients])
    peak = config.learning_rate
    for name, w in weights.items():
        w, m, v = w.astype(np.float64), 0.0, 0.0
        for t, (gradient, rate) in enumerate(
            zip(gradients, rates(config), strict=False)
        ):
            g = gradient[name].astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            unbiased = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.95 ** (t + 1))
            update = unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
            # Algorithm 2 of arXiv 1711.05101: eta_t (alpha * update + lambda * w).
            w = w - rate / peak * (peak * update + 0.1 * peak * w)
            assert_close(seen[t][name], w, "op")


def test_adafactor_is_the_papers(problem, assert_close):
    """Algorithm 4 of arXiv 1804.04235, with a rate of its own."""
    weights, gradients, as_arrays = problem
    config = replace(CONFIG, optimizer="adafactor", weight_decay=0.1)
    seen = steps_of(config, as_arrays(weights), [as_arrays(g) for g in gradients])
    for name, w in weights.items():
        w = w.astype(np.float64)
        rows = columns = whole = 0.0
        for t, (gradient, rate) in enumerate(
            zip(gradients, rates(config), strict=False)
        ):
            g = gradient[name].astype(np.float64)
            beta, square = 1 - (t + 1) ** -0.8, g**2 + 1e-30
            if g.ndim >= 2:
                rows = beta * rows + (1 - beta) * square.mean(-1)
                columns = beta * columns + (1 - beta) * square.mean(-2)
                mean = rows.mean(-1, keepdims=True)[..., None]
                estimate = rows[..., None] * columns[..., None, :] / mean
            else:
                estimate = whole = beta * whole + (1 - beta) * square
            update = g / np.sqrt(estimate)
            update /= max(1.0, np.sqrt((update**2).mean()))
            w = w - rate * update - 0.1 * rate * w
            assert_close(seen[t][name], w, "op")


def test_muons_matrices_have_their_parts_rates_and_a_decay_of_their_own():
    config = replace(
        CONFIG,
        optimizer="muon",
        warmup_steps=0,
        weight_decay=0.5,
        connector_learning_rate=3e-4,
    )
    rng = np.random.default_rng(1)
    weight, gradient = (mx.array(rng.standard_normal((4, 6))) for _ in range(2))
    weight, gradient = weight.astype(mx.float32), gradient.astype(mx.float32)

    def moved(config):
        parts = {part: {"weight": weight} for part in ("connector", "decoder")}
        gradients = {part: {"weight": gradient} for part in parts}
        after = make_optimizer(config).apply_gradients(gradients, parts)
        return {part: np.array(after[part]["weight"] - weight) for part in parts}

    steps = moved(config)
    # A tenth of the others' rate, but for what weights of about 1 are rounded by; and
    # weight_decay is not of matrices.
    np.testing.assert_allclose(10 * steps["connector"], steps["decoder"], atol=3e-6)
    assert np.abs(steps["decoder"]).max() > 0.01
    undecayed = moved(replace(config, weight_decay=0.0))
    np.testing.assert_array_equal(steps["decoder"], undecayed["decoder"])
    decayed = moved(replace(config, matrix_decay=0.5))
    for part, rate in (("decoder", 0.02), ("connector", 0.002)):
        lost = decayed[part] - steps[part]
        np.testing.assert_allclose(lost, -rate * 0.5 * np.array(weight), atol=1e-6)


def test_to_muon_every_expert_is_a_matrix_of_its_own():
    config = replace(CONFIG, optimizer="muon", warmup_steps=0, matrix_decay=0.1)
    rng = np.random.default_rng(2)
    shape = (3, 6, 4)
    experts = mx.array(rng.standard_normal(shape).astype(np.float32))
    steps = [mx.array(rng.standard_normal(shape).astype(np.float32)) for _ in range(2)]

    def moved(weights, gradients):
        optimizer = make_optimizer(config)
        for gradient in gradients:
            weights = optimizer.apply_gradients(gradient, weights)
        return weights

    together = moved({"stack": experts}, [{"stack": step} for step in steps])
    apart = moved(
        {name: experts[i] for i, name in enumerate("abc")},
        [{name: step[i] for i, name in enumerate("abc")} for step in steps],
    )
    for i, name in enumerate("abc"):
        np.testing.assert_array_equal(together["stack"][i], apart[name])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_each_part_has_a_rate_of_its_own(optimizer):
    config = replace(
        CONFIG,
        optimizer=optimizer,
        warmup_steps=0,
        weight_decay=0.0,
        vision_learning_rate=6e-3,
        connector_learning_rate=1e-5,
    )
    parts = ("vision", "connector", "decoder")
    weights = {part: {"bias": mx.ones(3)} for part in parts}
    gradients = {part: {"bias": mx.array([0.1, -0.2, 0.3])} for part in parts}
    moved = make_optimizer(config).apply_gradients(gradients, weights)
    steps = {part: np.abs(np.array(moved[part]["bias"]) - 1).max() for part in parts}
    # Of one size: the first step is the rate in the direction of the gradient's sign.
    assert steps["vision"] == pytest.approx(2 * steps["decoder"], rel=1e-3)
    assert steps["connector"] == pytest.approx(steps["decoder"] / 300, rel=2e-2)
