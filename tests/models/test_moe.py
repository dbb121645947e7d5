"""A sparse layer equals a loop over its tokens, and its losses the formulas."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRASwitchLinear

from mm1_mlx.config import DecoderConfig, MoEConfig
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.moe import (
    SparseMLP,
    choose,
    load_balance_loss,
    router_z_loss,
    within_capacity,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def sizes(**moe):
    fields = {"num_experts": 6, "every": 1, "offset": 0} | moe
    return DecoderConfig.from_dict(SIZES | {"moe": fields})


@pytest.fixture
def make_layer(reinitialise):
    def make(**moe):
        return reinitialise(SparseMLP(sizes(**moe), 0))

    return make


def inputs(*shape, seed=1):
    return mx.random.normal((*shape, 24), key=mx.random.key(seed))


def loop(layer, x):
    """The layer, a token at a time; experts and capacity in plain Python."""
    moe, glu = layer.moe, layer.switch_mlp
    B, T, _ = x.shape
    k, E = moe.experts_per_token, moe.num_experts
    p = mx.softmax(x @ layer.gate.weight.T, axis=-1)
    best = [np.argsort(-row, axis=-1)[:, :k].tolist() for row in np.array(p)]
    capacity = T
    if moe.capacity_factor is not None:
        capacity = max(1, int(T * moe.capacity_factor / E))
    rows = []
    for b in range(B):
        taken, kept = [0] * E, set()
        for rank in range(k):
            for t in range(T):
                e = best[b][t][rank]
                if taken[e] < capacity:
                    kept.add((t, rank))
                taken[e] += 1
        for t in range(T):
            total = sum(p[b, t, e] for e in best[b][t]) if moe.norm_topk_prob else 1
            y = mx.zeros(24)
            for rank, e in enumerate(best[b][t]):
                if (t, rank) in kept:
                    hidden = nn.silu(x[b, t] @ glu.gate_proj.weight[e].T)
                    hidden = hidden * (x[b, t] @ glu.up_proj.weight[e].T)
                    y = y + p[b, t, e] / total * (hidden @ glu.down_proj.weight[e].T)
            rows.append(y)
    return mx.stack(rows).reshape(x.shape)


def paths(layer, x):
    """The layer's output by each way of computing it."""
    experts, _ = choose(layer.gate(x), layer.moe)
    return {
        "sorted": layer._sorted(x, np.array(experts)),
        "switch": layer.switch_mlp(x, experts),
    }


@pytest.mark.parametrize("length", [1, 2, 3, 40])
@pytest.mark.parametrize("moe", [{}, {"experts_per_token": 3}, {"num_experts": 64}])
def test_sorting_by_expert_equals_mlx_lm_s_layer(length, moe, make_layer, assert_close):
    made = paths(layer := make_layer(**moe), x := inputs(2, length))
    assert made["sorted"].shape == (2, length, layer.moe.experts_per_token, 24)
    assert_close(made["sorted"], made["switch"], "op")
    assert_close(layer(x), loop(layer, x), "op")


def test_many_tokens_are_computed_expert_by_expert(make_layer, monkeypatch):
    """One dense product of each of three matrices per expert, over its rows alone."""
    layer, x, rows = make_layer(), inputs(2, 20), []
    product = mx.matmul
    monkeypatch.setattr(
        mx, "matmul", lambda a, b: rows.append(a.shape[0]) or product(a, b)
    )
    layer(x)
    experts, _ = choose(layer.gate(x), layer.moe)
    counts = [n for n in np.bincount(np.array(experts).ravel()) if n]
    assert rows == [n for n in counts for _ in range(3)]
    assert sum(rows) == 3 * 2 * 40
    rows.clear()
    layer(inputs(1, 1))
    assert not rows


def test_quantized_experts_stay_mlx_lm_s(assert_close, reinitialise):
    config = DecoderConfig.from_dict(
        SIZES
        | {"hidden_size": 64, "intermediate_size": 64}
        | {"moe": {"num_experts": 6, "every": 1, "offset": 0}}
    )
    layer = reinitialise(SparseMLP(config, 0))
    x = mx.random.normal((1, 9, 64), key=mx.random.key(1))
    expected = layer(x)
    nn.quantize(layer.switch_mlp, group_size=32, bits=8)
    assert_close(layer(x), expected, "bfloat16")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_the_gate_is_computed_in_float32(dtype, make_layer):
    layer = make_layer(num_experts=64)
    layer.set_dtype(dtype)
    x = inputs(2, 200).astype(dtype)
    _, logits = layer.routed(x)
    exact = x.astype(mx.float32) @ layer.gate.weight.astype(mx.float32).T
    assert logits.dtype == mx.float32
    assert mx.allclose(logits, exact, rtol=0, atol=1e-5)
    # What half precision would make of it moves some tokens to other experts.
    rounded = layer.gate(x).astype(mx.float32)
    best, other = (choose(y, layer.moe)[0] for y in (logits, rounded))
    assert not mx.array_equal(best, other)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("length", [1, 30])
def test_half_precision_runs_on_the_cpu(dtype, length, make_layer, assert_close):
    layer, x = make_layer(experts_per_token=6), inputs(1, length)
    expected = layer(x)
    layer.set_dtype(dtype)
    result = layer(x.astype(dtype))
    assert result.dtype == dtype
    assert_close(result, expected, str(dtype).removeprefix("mlx.core."))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_adapters_run_in_half_precision_on_the_cpu(dtype, make_layer, assert_close):
    layer, x = make_layer(), inputs(1, 9)
    glu = layer.switch_mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        glu[name] = LoRASwitchLinear.from_base(glu[name], r=2)
    expected = layer(x)
    layer.set_dtype(dtype)
    result = layer(x.astype(dtype))
    assert result.dtype == dtype
    assert_close(result, expected, str(dtype).removeprefix("mlx.core."))


def test_a_compiled_layer_equals_the_plain_one(make_layer, assert_close):
    layer = make_layer(capacity_factor=1.5)
    compiled = mx.compile(layer)
    for seed in (1, 2):
        assert_close(compiled(inputs(2, 9, seed=seed)), layer(inputs(2, 9, seed=seed)))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("length", [1, 30])
def test_a_decoder_in_half_precision_compiles_on_the_cpu(
    dtype, length, reinitialise, assert_close
):
    moe = {"num_experts": 6, "experts_per_token": 6, "every": 2, "offset": 1}
    decoder = reinitialise(Decoder(DecoderConfig.from_dict(SIZES | {"moe": moe})))
    tokens = mx.arange(length)[None]
    expected = decoder(tokens)
    decoder.set_dtype(dtype)
    result = mx.compile(decoder)(tokens)
    assert result.dtype == dtype
    assert_close(result, expected, str(dtype).removeprefix("mlx.core."))


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize(
    "moe", [{}, {"norm_topk_prob": False}, {"capacity_factor": 1.0}]
)
def test_gradients_equal_those_of_a_loop(length, moe, make_layer, assert_close):
    layer, x = make_layer(**moe), inputs(2, length)
    target = inputs(2, length, seed=2)

    def gradients(function):
        def loss(weights, x):
            layer.update(weights)
            return (function(layer, x) * target).sum()

        weights = layer.parameters()
        found = mx.grad(loss, argnums=(0, 1))(weights, x)
        layer.update(weights)
        return dict(tree_flatten(found))

    ours, expected = gradients(lambda layer, x: layer(x)), gradients(loop)
    assert len(ours) == 5
    for name, gradient in expected.items():
        assert_close(ours[name], gradient, "op")


def test_gradients_pass_through_checkpointing(make_layer, assert_close):
    layer, x = make_layer(), inputs(1, 9)

    def loss(x, call):
        return call(x).square().sum()

    plain = mx.grad(lambda x: loss(x, layer))(x)
    assert_close(mx.grad(lambda x: loss(x, mx.checkpoint(layer)))(x), plain, "op")


@pytest.mark.parametrize("chosen", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 2.0, 6.0])
def test_capacity_equals_a_loop_in_sequence_order(
    factor, chosen, make_layer, assert_close
):
    layer = make_layer(capacity_factor=factor, experts_per_token=chosen)
    x = inputs(3, 21)
    assert_close(layer(x), loop(layer, x), "op")


def test_capacity_drops_something_and_enough_of_it_nothing(make_layer, assert_close):
    x = inputs(2, 21)
    free = make_layer()(x)
    assert_close(make_layer(capacity_factor=6.0)(x), free, "op")
    dropped = make_layer(capacity_factor=1.0)(x)
    assert mx.abs(dropped - free).max() > 0.1 * mx.abs(free).max()


def test_first_choices_take_places_before_any_second_one():
    # Tokens 0 and 1 want expert 0 second; tokens 2 and 3 want it first.
    experts = mx.array([[[1, 0], [2, 0], [0, 1], [0, 2]]])
    real = np.ones((1, 4), bool)
    kept = within_capacity(experts, 3, 1.5, real).tolist()
    assert kept == [[[True, False], [True, False], [True, True], [True, True]]]
    kept = within_capacity(experts, 3, 0.75, real).tolist()
    assert kept == [[[True, False], [True, False], [True, False], [False, False]]]


def test_padding_takes_no_place_and_adds_none():
    # All want expert 0 first; the middle one is padding.
    experts = mx.array([[[0, 1], [0, 2], [0, 1]]])
    real = np.array([[True, False, True]])
    kept = np.array(within_capacity(experts, 3, 3.0, real))  # 2 places
    assert kept[real].tolist() == [[True, True], [True, True]]
    kept = np.array(within_capacity(experts, 3, 1.5, real))  # 1 place; 3 tokens had 1.5
    assert kept[real].tolist() == [[True, True], [False, False]]
    full = np.array(within_capacity(experts, 3, 2.0, np.ones((1, 3), bool)))
    assert full.tolist() == [[[True, True], [True, True], [False, True]]]


@pytest.mark.parametrize("factor", [0.7, 1.0, 2.0])
def test_with_capacity_a_padded_row_equals_itself_alone(
    factor, make_layer, assert_close
):
    layer, x = make_layer(capacity_factor=factor), inputs(2, 21)
    real = np.arange(21) < np.array([13, 21])[:, None]
    made, _ = layer.routed(x, real)
    alone = layer(x[:1, :13])
    assert_close(made[:1, :13], alone, "op")
    assert_close(made[1:], layer(x[1:]), "op")
    # Else padding that took places would pass.
    wrong = mx.abs(layer(x)[:1, :13] - alone).max()
    assert wrong > 0.1 * mx.abs(alone).max()


def test_a_token_over_capacity_loses_its_weight_and_the_rest_keep_theirs():
    logits = mx.log(mx.array([[[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]]))
    moe = MoEConfig(num_experts=3, every=1, offset=0, capacity_factor=1.5)
    experts, weights = choose(logits, moe)
    assert experts.tolist() == [[[0, 1], [0, 1]]]
    # One place each: 2 tokens x 1.5 / 3.
    assert np.array(weights) == pytest.approx(np.array([[[2 / 3, 1 / 3], [0, 0]]]))


def test_of_equal_experts_the_first_is_chosen():
    moe = MoEConfig(num_experts=64, every=1, offset=0, experts_per_token=3)
    experts, weights = choose(mx.zeros((1, 2, 64)), moe)
    assert experts.tolist() == [[[0, 1, 2]] * 2]
    assert np.array(weights) == pytest.approx(1 / 3)


def test_a_decoder_returns_its_gates_logits_and_the_same_states(reinitialise):
    moe = {"num_experts": 6, "every": 2, "offset": 1}
    decoder = reinitialise(Decoder(DecoderConfig.from_dict(SIZES | {"moe": moe})))
    tokens = mx.array([[3, 4, 5, 6, 7]])
    states, gates = decoder.routed(tokens)
    assert mx.array_equal(states, decoder.hidden(tokens))
    assert [logits.shape for logits in gates] == [(1, 5, 6)] * 2
    assert not mx.allclose(gates[0], gates[1])
    dense = Decoder(DecoderConfig.from_dict(SIZES))
    assert dense.routed(tokens)[1] == []


def everything(logits):
    return mx.ones(logits.shape[:2], mx.bool_)


def test_the_balance_loss_of_hand_made_cases():
    def loss(probabilities):
        logits = mx.log(mx.array(probabilities) + 1e-30)
        return load_balance_loss(logits, everything(logits)).item()

    # First choices in equal shares; probabilities equal; spec's two experts.
    assert loss([[[0.9, 0.1], [0.2, 0.8]]]) == pytest.approx(1)
    assert loss([[[0.25] * 4] * 3]) == pytest.approx(1)
    assert loss([[[1, 0], [0.49, 0.51], [0.49, 0.51]]]) == pytest.approx(
        2 * (1 / 3 * 0.66 + 2 / 3 * 0.34)
    )
    assert round(loss([[[1, 0], [0.49, 0.51], [0.49, 0.51]]]), 3) == 0.893
    # Everything to one expert: as many as there are.
    assert loss([[[1, 0, 0, 0]] * 3]) == pytest.approx(4)
    # Every row is a group of its own.
    assert loss([[[1, 0]] * 2, [[0.9, 0.1], [0.1, 0.9]]]) == pytest.approx(1.5)


@pytest.mark.parametrize(("experts", "expected"), [(64, 17.30), (32, 12.01)])
def test_the_z_loss_of_zero_logits(experts, expected):
    logits = mx.zeros((2, 3, experts))
    loss = router_z_loss(logits, everything(logits)).item()
    assert loss == pytest.approx(math.log(experts) ** 2)
    assert round(loss, 2) == expected


def test_losses_equal_the_formulas():
    logits = np.random.default_rng(0).standard_normal((2, 7, 5)) * 2
    lengths = [7, 4]
    balance, squares = [], []
    for row, length in zip(logits, lengths, strict=True):
        f, P = np.zeros(5), np.zeros(5)
        for token in row[:length]:
            f[token.argmax()] += 1 / length
            P += np.exp(token) / np.exp(token).sum() / length
            squares.append(np.log(np.exp(token).sum()) ** 2)
        balance.append(5 * (f * P).sum())
    given = mx.array(logits.astype(np.float32))
    real = mx.arange(7) < mx.array(lengths)[:, None]
    assert load_balance_loss(given, real).item() == pytest.approx(np.mean(balance))
    assert router_z_loss(given, real).item() == pytest.approx(np.mean(squares))


def test_padding_does_not_reach_the_losses():
    logits = mx.random.normal((2, 6, 4), key=mx.random.key(0))
    other = mx.where((mx.arange(6) < 4)[:, None], logits, 9 * logits[:, ::-1])
    real = mx.broadcast_to(mx.arange(6) < 4, (2, 6))
    for loss in (load_balance_loss, router_z_loss):
        assert loss(logits, real).item() == loss(other, real).item()
        alone = loss(logits[:, :4], everything(logits[:, :4])).item()
        assert loss(logits, real).item() == pytest.approx(alone, rel=1e-5)
