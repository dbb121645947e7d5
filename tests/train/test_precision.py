"""Few bits are for computing: what is trained keeps its float32."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.errors import ConfigError
from mm1_mlx.models.recompute import recomputed
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.loss import next_token_loss
from mm1_mlx.train.trainer import Trainer

CONFIG = TrainConfig(
    steps=40, learning_rate=1e-5, warmup_steps=0, decay_steps=0, weight_decay=0.0
)


class Product(nn.Module):
    """Weights near 1, so that a step of the rate is 1e-5 of each."""

    def __init__(self):
        super().__init__()
        self.weight = mx.ones((4, 8))

    def __call__(self, x):
        return x @ self.weight.T


def product_loss(model, x):
    return model(mx.array(x).astype(model.weight.dtype)).astype(
        mx.float32
    ).mean(), mx.array(4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_an_update_of_a_hundred_thousandth_is_not_lost(precision, tmp_path):
    model = Product()
    config = replace(CONFIG, precision=precision)
    trainer = Trainer(model, product_loss, lambda *_: np.ones((4, 8)), config, tmp_path)
    for _ in range(config.steps):
        trainer.train_step()
    assert model.weight.dtype == mx.float32
    # Adam's steps along a gradient that stays are of the rate.
    moved = np.array(1 - model.weight)
    np.testing.assert_allclose(moved, config.steps * 1e-5, rtol=1e-2)


@pytest.mark.parametrize("kind", [mx.bfloat16, mx.float16])
def test_weights_of_few_bits_would_lose_it(kind):
    """Why trained weights are float32: without it nothing at all is learned."""
    weight = {"w": mx.ones(8, kind)}
    optimizer = optim.AdamW(1e-5, weight_decay=0.0)
    for _ in range(40):
        weight = optimizer.apply_gradients({"w": mx.ones(8, kind)}, weight)
    assert mx.array_equal(weight["w"], mx.ones(8, kind))


def test_float16_keeps_the_least_gradients(tmp_path):
    """Of 3e-8, below what float16 can hold; scaled on the way they arrive."""
    model = Product()
    config = replace(CONFIG, precision="float16", clip_norm=1e9)

    def loss(model, _):
        return model.weight.sum().astype(mx.float32) * 3e-8, mx.array(4)

    trainer = Trainer(model, loss, lambda *_: None, config, tmp_path)
    trainer.train_step()
    assert trainer.norm == pytest.approx(3e-8 * 32**0.5, rel=1e-2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_in_few_bits_are_those_of_float32(
    precision, make_model, batches, tmp_path, tolerances
):
    losses, weights = [], []
    for kind in ("float32", precision):
        model = make_model()
        # What is frozen is as it is loaded.
        model.freeze()
        model.connector.unfreeze()
        model.decoder.layers[1].unfreeze()
        frozen = tree_map(
            lambda x, k=kind: x.astype(getattr(mx, k)), model.parameters()
        )
        model.update(frozen)
        config = replace(CONFIG, precision=kind, learning_rate=1e-3)
        trainer = Trainer(model, next_token_loss, batches, config, tmp_path / kind)
        losses.append([trainer.train_step() for _ in range(5)])
        weights.append(dict(tree_flatten(model.trainable_parameters())))
        assert model.decoder.layers[0].mlp.up_proj.weight.dtype == getattr(mx, kind)
        assert all(x.dtype == mx.float32 for x in weights[-1].values())
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerances[precision])


@pytest.mark.parametrize(
    ("precision", "way_out"),
    [
        ("float32", "lower the learning rate, which is 1e-05"),
        ("float16", "float16 holds nothing above 65,504: train in bfloat16"),
    ],
)
def test_what_is_no_number_ends_the_run_in_one_line(precision, way_out, tmp_path):
    def batches(step, _):
        return np.full((4, 8), np.nan if step == 2 else 1.0)

    config = replace(CONFIG, steps=6, precision=precision, save_every=1)
    trainer = Trainer(Product(), product_loss, batches, config, tmp_path)
    with pytest.raises(
        ConfigError,
        match=f"^the loss of step 3 is nan, which nothing can be learned from; the "
        f"checkpoint of step 2 stands; {way_out}, in another folder$",
    ):
        trainer.run(lambda _: None)
    fresh = Trainer(Product(), product_loss, batches, config, tmp_path)
    fresh.resume()
    assert fresh.step == 2
    assert mx.isfinite(fresh.model.weight).all()


def steep_loss(model, x):
    """Of x as the gradient everywhere."""
    return model.weight.sum().astype(mx.float32) * x, mx.array(4)


def test_a_gradient_too_large_for_float16_is_computed_again_smaller(tmp_path):
    moved, norms = [], []
    for precision in ("float16", "float32"):
        config = replace(CONFIG, precision=precision, clip_norm=1e9)
        trainer = Trainer(
            # 1,024 times that is infinite.
            *(Product(), steep_loss, lambda *_: 100.0, config, tmp_path / precision)
        )
        for _ in range(3):
            trainer.train_step()
        assert trainer.step == 3
        moved.append(np.array(trainer.model.weight))
        norms.append(trainer.norm)
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-6)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_what_gradients_were_multiplied_by_goes_on_from_a_checkpoint(tmp_path):
    """Of other multiples rounding is another, so a run would not be the same."""

    def batches(step, _):
        # One is steep; the others, 1.4 of the least number when multiplied, are rounded.
        return 100.0 if step == 1 else 1.4 * 2**-24 / 1024

    config = replace(CONFIG, steps=6, precision="float16", clip_norm=1e9, save_every=3)

    def run(folder, steps):
        trainer = Trainer(Product(), steep_loss, batches, config, tmp_path / folder)
        trainer.resume()
        while trainer.step < steps:
            trainer.train_step()
        if steps == 3:
            trainer.save()
        return trainer

    whole = run("whole", 6)
    run("stopped", 3)
    resumed = run("stopped", 6)
    assert resumed.norm == whole.norm
    assert mx.array_equal(resumed.model.weight, whole.model.weight)
    fresh = Trainer(Product(), steep_loss, batches, config, tmp_path / "fresh")
    fresh.step = 5
    fresh.train_step()
    # Else this could not fail.
    assert fresh.norm != whole.norm


def test_a_gradient_that_is_no_number_is_seen_before_it_is_kept(tmp_path):
    def loss(model, x):
        # The root's gradient at 0 is infinite, and 0 times it no number.
        return mx.sqrt(0 * model.weight.sum()) + x, mx.array(1)

    config = replace(CONFIG, steps=2)
    trainer = Trainer(Product(), loss, lambda *_: 1.0, config, tmp_path)
    with pytest.raises(
        ConfigError, match=r"the gradient of step 1 is (nan|inf), which"
    ):
        trainer.run(lambda _: None)
    assert not list(tmp_path.glob("step-*"))


# Recomputed blocks


def gradients(model, batch, seed=3):
    mx.random.seed(seed)
    weights = model.trainable_parameters()
    (loss, _), found = nn.value_and_grad(model, next_token_loss)(model, batch)
    mx.eval(loss, found)
    model.update(weights)
    return loss.item(), dict(tree_flatten(found))


@pytest.mark.parametrize(
    "decoder", [{}, {"moe": {"num_experts": 4, "every": 2, "offset": 1}}]
)
def test_recomputed_blocks_have_equal_gradients(decoder, make_model, batches):
    model, batch = make_model(decoder=decoder), batches(0, 0)
    loss, expected = gradients(model, batch)
    model.decoder.recompute = model.vision.recompute = True
    again, found = gradients(model, batch)
    assert again == loss
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert mx.array_equal(x, expected[name]), name


def test_what_is_dropped_out_is_dropped_out_again():
    """Two passes through dropout must hide the same, or gradients are of another loss."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(6, 6), nn.Dropout(0.5)

        def __call__(self, x, scale):
            return self.dropout(self.linear(x)) * scale, None

    block, x = Block(), mx.random.normal((5, 6))
    mx.eval(block.parameters(), x)

    def loss(x):
        y, nothing = recomputed(block)(x, 2.0)
        assert nothing is None
        return y.sum()

    mx.random.seed(1)
    _, dx = mx.value_and_grad(loss)(x)
    mx.random.seed(1)
    y = loss(x)
    # The loss is linear in x: its gradient gives it back, if the same was hidden.
    bias = loss_at_zero(loss)
    assert (dx * x).sum().item() + bias == pytest.approx(y.item(), rel=1e-4)


def loss_at_zero(loss):
    mx.random.seed(1)
    return loss(mx.zeros((5, 6))).item()
