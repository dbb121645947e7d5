"""Packed layers on a CPU compute what mlx's own do, and their gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mm1_mlx.config import Packing
from mm1_mlx.config.quantization import MODES
from mm1_mlx.models import linear
from mm1_mlx.models.linear import (
    MANY_ROWS,
    PackedEmbedding,
    PackedLinear,
    PackedSwitchLinear,
    drop_unpacked,
    expert_products,
    keep_unpacked,
    pack,
    product,
)

LIMIT = 1_000_000
WAYS = [
    Packing(group_size=groups[0], bits=bits, mode=mode)
    for mode, (groups, widths) in MODES.items()
    for bits in widths
]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.mode}-{w.bits}")


def rows(count, width=64):
    mx.random.seed(count)
    return mx.random.normal((2, count, width))[:1]


def plain(layer, x):
    """mlx's own product."""
    return mx.quantized_matmul(
        x, layer.weight, layer.scales, layer.get("biases"), transpose=True,
        group_size=layer.group_size, bits=layer.bits, mode=layer.mode,
    )  # fmt: skip


def packed_linear(way, seed=0):
    mx.random.seed(seed)
    layer = nn.Linear(64, 96)
    layer.bias = mx.random.normal((96,))
    return pack(layer, way)


@each_way
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_a_packed_layer_computes_what_mlx_does(way, count, assert_close):
    layer, x = packed_linear(way), rows(count)
    assert type(layer) is PackedLinear
    assert_close(layer(x), plain(layer, x) + layer.bias, "op")


@each_way
def test_a_kept_layer_computes_what_mlx_does(way, assert_close):
    layer, x = packed_linear(way), rows(5)
    assert keep_unpacked(nn.Sequential(layer), LIMIT) == 4 * 64 * 96
    assert_close(layer(x), plain(layer, x) + layer.bias, "op")
    assert (
        {"weight", "scales"}
        <= set(layer.parameters())
        <= {
            *("weight", "scales", "biases", "bias"),
        }
    )


@pytest.mark.parametrize("step", [1, 7, 96, 1000])
def test_slices_give_the_whole(step, assert_close, monkeypatch):
    monkeypatch.setattr(linear, "SLICE_WEIGHTS", 64 * step)
    layer, x = packed_linear(WAYS[2]), rows(20)
    assert_close(product(layer, x), plain(layer, x), "op")


def test_few_rows_are_not_unpacked(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    layer = packed_linear(WAYS[2])
    many = MANY_ROWS["affine", 4]
    expected = layer(rows(many - 1))
    monkeypatch.setattr(mx, "dequantize", refuse)
    assert mx.array_equal(layer(rows(many - 1)), expected)
    with pytest.raises(AssertionError):
        layer(rows(many))


def test_what_is_kept_ends_where_other_weights_are_loaded(assert_close):
    layer, other, x = packed_linear(WAYS[2]), packed_linear(WAYS[2], seed=1), rows(9)
    keep_unpacked(nn.Sequential(layer), LIMIT)
    layer.load_weights(list(other.parameters().items()))
    assert_close(layer(x), other(x), "op")


@pytest.mark.parametrize("leaf", ["weight", "scales", "biases"])
def test_what_is_kept_ends_where_one_array_is_another(leaf, assert_close):
    layer, x = packed_linear(WAYS[2]), rows(9)
    keep_unpacked(nn.Sequential(layer), LIMIT)
    layer[leaf] = layer[leaf] + 1
    assert_close(product(layer, x), plain(layer, x), "op")
    # And is freed.
    assert "_unpacked" not in layer


def test_what_is_kept_can_be_dropped(assert_close):
    layer, x = packed_linear(WAYS[2]), rows(9)
    model = nn.Sequential(layer, nn.Linear(96, 8))
    keep_unpacked(model, LIMIT)
    expected = model(x)
    drop_unpacked(model)
    assert "_unpacked" not in layer
    assert_close(model(x), expected, "op")


def test_nothing_is_kept_beyond_the_limit():
    layer = packed_linear(WAYS[2])
    assert keep_unpacked(nn.Sequential(layer), 4 * 64 * 96 - 1) == 0
    assert "_unpacked" not in layer
    assert keep_unpacked(nn.Sequential(nn.Linear(8, 8)), LIMIT) == 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("count", [1, 9])
def test_half_precision_comes_out_as_it_went_in(dtype, keep, count, assert_close):
    layer, x = packed_linear(WAYS[2]), rows(count)
    if keep:
        keep_unpacked(nn.Sequential(layer), LIMIT)
    kind = "float16" if dtype == mx.float16 else "bfloat16"
    expected = plain(layer, x)
    result = product(layer, x.astype(dtype))
    assert result.dtype == dtype
    assert_close(result, expected, kind)


@each_way
def test_a_packed_embedding_is_a_head_as_well(way, assert_close):
    mx.random.seed(0)
    table = pack(nn.Embedding(96, 64), way)
    assert type(table) is PackedEmbedding
    for count in (1, 40):
        assert_close(table.as_linear(rows(count)), plain(table, rows(count)), "op")
    assert table(mx.array([3])).shape == (1, 64)


def packed_experts(way):
    mx.random.seed(0)
    experts = SwitchLinear(64, 32, 4)
    experts.bias = mx.random.normal((4, 32))
    return experts, pack(experts, way)


@each_way
@pytest.mark.parametrize("keep", [False, True])
def test_packed_experts_compute_what_mlx_lm_s_do(way, keep, assert_close):
    experts, layer = packed_experts(way)
    theirs = experts.to_quantized(**way.to_dict())
    assert type(layer) is PackedSwitchLinear
    assert type(theirs) is QuantizedSwitchLinear
    if keep:
        assert keep_unpacked(nn.Sequential(layer), LIMIT) == 4 * 4 * 32 * 64
    x, chosen = rows(3)[0][:, None], mx.array([[2, 0], [1, 1], [3, 2]])
    assert_close(layer(x[:, None], chosen), theirs(x[:, None], chosen), "op")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
def test_experts_give_halves_for_halves(dtype, keep):
    _, layer = packed_experts(WAYS[2])
    if keep:
        keep_unpacked(nn.Sequential(layer), LIMIT)
    x, chosen = rows(3)[0][:, None], mx.array([[2, 0], [1, 1], [3, 2]])
    assert layer(x[:, None].astype(dtype), chosen).dtype == dtype


@each_way
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("count", [1, 40])
def test_one_expert_s_rows_go_through_its_weights(way, keep, count, assert_close):
    _, layer = packed_experts(way)
    if keep:
        keep_unpacked(nn.Sequential(layer), LIMIT)
    x = rows(count)[0]
    dense = mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), **way.to_dict(),
        dtype=mx.float32,
    )  # fmt: skip
    multiply = expert_products(layer)
    for expert in range(4):
        assert_close(multiply(expert, x), x @ dense[expert].T, "op")


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("keep", [False, True])
def test_gradients_pass_through_packed_layers(count, keep, assert_close):
    layer, x = packed_linear(WAYS[2]), rows(count)
    if keep:
        keep_unpacked(nn.Sequential(layer), LIMIT)
    goal = mx.random.normal((1, count, 96))
    ours = mx.grad(lambda x: (layer(x) * goal).sum())(x)
    theirs = mx.grad(lambda x: (plain(layer, x) * goal).sum())(x)
    assert_close(ours, theirs, "op")


def test_gradients_reach_scales_even_where_weights_are_kept(assert_close):
    layer, x = packed_linear(WAYS[2]), rows(40)
    keep_unpacked(nn.Sequential(layer), LIMIT)
    scales, goal = layer.scales, mx.random.normal((1, 40, 96))

    def loss(scales, forward):
        layer.scales = scales
        return (forward(layer, x) * goal).sum()

    ours = mx.grad(loss)(scales, product)
    theirs = mx.grad(loss)(scales, plain)
    assert np.abs(np.array(theirs)).max() > 1
    assert_close(ours, theirs, "op")


def test_on_a_gpu_the_layers_are_mlx_s_own(monkeypatch):
    layers = nn.Linear(64, 8), nn.Embedding(8, 64), SwitchLinear(64, 8, 2)
    kinds = nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    packed = [pack(layer, WAYS[2]) for layer in layers]
    assert tuple(type(layer) for layer in packed) == kinds
    assert keep_unpacked(nn.Sequential(*packed), LIMIT) == 0
