"""The gates' losses stand beside the cross-entropy, and reach the gates."""

import json
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mm1_mlx.errors import ConfigError
from mm1_mlx.models.moe import load_balance_loss, router_z_loss
from mm1_mlx.train.config import TrainConfig
from mm1_mlx.train.loss import batch_states, next_token_loss, sparse_loss
from mm1_mlx.train.trainer import Trainer

CONFIG = TrainConfig(
    steps=6,
    learning_rate=3e-3,
    warmup_steps=0,
    decay_steps=0,
    micro_batches=2,
    save_every=3,
    log_every=2,
)
MOE = {"num_experts": 4, "every": 1, "offset": 0}


@pytest.fixture
def sparse_model(make_model):
    return make_model(decoder={"moe": MOE})


@pytest.fixture
def batch(make_batch, conversation):
    talks = [conversation("red"), conversation("a blue star", "two circles")]
    return make_batch(talks, [[0], [1]])


def test_the_loss_is_cross_entropy_and_the_weighted_means_over_layers(
    sparse_model, batch, tolerances
):
    loss, count, parts = sparse_loss(sparse_model, batch)
    expected, targets = next_token_loss(sparse_model, batch)
    assert count.item() == targets.item()
    assert parts["cross_entropy"].item() == expected.item()
    tokens = mx.array(batch.tokens)
    x = sparse_model.embed(
        tokens.flatten(), sparse_model.encode(batch.pictures), batch.spans
    )
    x = x.reshape(*tokens.shape, -1)
    _, gates = sparse_model.decoder.routed(tokens, input_embeddings=x)
    real = mx.array(batch.real)
    assert len(gates) == 2
    for name, function in (
        ("load_balance", load_balance_loss),
        ("router_z", router_z_loss),
    ):
        layers = [function(logits, real).item() for logits in gates]
        assert layers[0] != pytest.approx(layers[1], rel=1e-3)
        assert parts[name].item() == pytest.approx(np.mean(layers))
    total = expected + 0.01 * parts["load_balance"] + 0.001 * parts["router_z"]
    assert loss.item() == pytest.approx(total.item(), rel=tolerances["op"])
    heavy, _, _ = sparse_loss(sparse_model, batch, balance_weight=2.0, z_weight=3.0)
    total = expected + 2 * parts["load_balance"] + 3 * parts["router_z"]
    assert heavy.item() == pytest.approx(total.item(), rel=tolerances["op"])


def test_states_are_those_without_the_gates_losses(sparse_model, batch):
    states = batch_states(sparse_model, batch, sparse_model.encode(batch.pictures))
    assert states.shape == (*batch.tokens.shape, 48)


def test_real_tokens_are_all_but_the_padding(batch):
    assert batch.lengths[0] < batch.lengths[1] == batch.tokens.shape[1]
    assert batch.real.sum(axis=1).tolist() == list(batch.lengths)
    assert not batch.real[0, batch.lengths[0] :].any()
    assert batch.tokens[0, batch.lengths[0] - 1] != 0
    assert not batch.learned[~batch.real].any()


@pytest.mark.parametrize("factor", [None, 1.0])
def test_padding_changes_no_part_of_the_loss(
    factor, make_model, make_batch, conversation, tolerances
):
    sparse_model = make_model(decoder={"moe": MOE | {"capacity_factor": factor}})
    talks = [conversation("red"), conversation("a blue star", "two circles")]
    _, count, together = sparse_loss(sparse_model, make_batch(talks, [[0], [1]]))
    batches = [make_batch([t], [[i]]) for i, t in enumerate(talks)]
    alone = [sparse_loss(sparse_model, batch) for batch in batches]
    lengths = [batch.lengths[0] for batch in batches]
    weights = {
        "cross_entropy": [n.item() for _, n, _ in alone],
        "load_balance": [1, 1],
        "router_z": lengths,
    }
    assert count.item() == sum(weights["cross_entropy"])
    for name, weight in weights.items():
        values = [parts[name].item() for _, _, parts in alone]
        mean = np.average(values, weights=weight)
        assert together[name].item() == pytest.approx(mean, rel=tolerances["op"]), name


def test_each_part_reaches_the_gates_and_only_the_cross_entropy_the_experts(
    sparse_model, make_batch, conversation
):
    # Nothing is learned: what is left are the gates' losses.
    batch = make_batch([[("user", ["What is it?"])]], [[]])
    for weights in ({"z_weight": 0.0}, {"balance_weight": 0.0}):
        loss = partial(sparse_loss, sparse_model, batch, **weights)
        _, gradients = nn.value_and_grad(sparse_model, lambda f=loss: f()[0])()
        gradients = dict(tree_flatten(gradients))
        last = "decoder.layers.1.mlp"
        assert mx.abs(gradients[f"{last}.gate.weight"]).max() > 1e-7
        assert not gradients[f"{last}.switch_mlp.up_proj.weight"].any()
    _, gradients = nn.value_and_grad(
        sparse_model,
        lambda: sparse_loss(sparse_model, make_batch([conversation("red")], [[0]]))[0],
    )()
    for name, gradient in tree_flatten(gradients["decoder"]):
        assert mx.abs(gradient).max() > 1e-7, name


def test_a_dense_decoder_has_nothing_to_balance(tiny_model, batch):
    with pytest.raises(ConfigError, match="no experts to balance; train it with next_"):
        sparse_loss(tiny_model, batch)


@pytest.fixture
def make_trainer(make_model, batches, tmp_path):
    def make_trainer(loss=sparse_loss, **changes):
        model = make_model(decoder={"moe": MOE})
        return Trainer(model, loss, batches, replace(CONFIG, **changes), tmp_path)

    return make_trainer


def test_a_run_logs_the_parts_of_its_loss(make_trainer):
    trainer, lines = make_trainer(), []
    trainer.run(lines.append)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        total = (
            line["cross_entropy"]
            + 0.01 * line["load_balance"]
            + 0.001 * line["router_z"]
        )
        assert line["loss"] == pytest.approx(total, abs=2e-5)
    written = (trainer.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines


def test_a_stopped_sparse_run_goes_on_to_the_same_weights(make_trainer, tmp_path):
    whole = make_trainer()
    whole.folder = tmp_path / "whole"
    whole.run([].append)
    stopped = make_trainer()
    stopped.folder = tmp_path / "stopped"
    stopped.folder.mkdir()
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    resumed = make_trainer()
    resumed.folder = stopped.folder
    resumed.run([].append)
    ours, theirs = resumed.model.tensors(), whole.model.tensors()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_training_balances_and_shrinks_what_the_losses_ask_for(make_trainer):
    def parts(**weights):
        trainer = make_trainer(
            partial(sparse_loss, **weights), steps=25, learning_rate=1e-2
        )
        for _ in range(25):
            trainer.train_step()
        return trainer.parts

    free = parts(balance_weight=0.0, z_weight=0.0)
    assert parts(balance_weight=1.0)["load_balance"] < free["load_balance"] - 0.05
    assert parts(z_weight=0.1)["router_z"] < 0.5 * free["router_z"]
    assert parts()["cross_entropy"] < 1.0
