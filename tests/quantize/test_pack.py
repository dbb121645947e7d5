"""Weights are rounded as mlx rounds them, whether they come whole or in pieces."""

import mlx.core as mx
import pytest

from mm1_mlx.config import Packing
from mm1_mlx.config.quantization import MODES
from mm1_mlx.quantize.pack import pack_deferred, pack_tensors
from mm1_mlx.shard import Deferred

WAYS = [
    Packing(group_size=groups[0], bits=bits, mode=mode)
    for mode, (groups, widths) in MODES.items()
    for bits in widths
]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.mode}-{w.bits}")


def joined(tensor):
    values = [piece.flatten() for piece in tensor.pieces()]
    return mx.concatenate(values).reshape(tensor.shape)


@each_way
@pytest.mark.parametrize("shape", [(6, 64), (3, 4, 64)])
@pytest.mark.parametrize("piece", [1, 50, 64, 200, 10_000])
def test_pieces_give_what_the_whole_gives(way, shape, piece):
    mx.random.seed(0)
    weight = mx.random.normal(shape).astype(mx.float16)
    tensors = [("a.weight", weight), ("a.bias", weight[0]), ("b.weight", weight)]
    expected = dict(pack_tensors(tensors, {"a": way}))
    flat = weight.flatten()
    cut = Deferred(
        shape,
        weight.dtype,
        lambda: [flat[i : i + piece] for i in range(0, flat.size, piece)],
    )
    deferred = [
        ("a.weight", cut),
        ("a.bias", Deferred.of(weight[0])),
        ("b.weight", cut),
    ]
    found = dict(pack_deferred(deferred, {"a": way}))
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (
            tuple(expected[name].shape),
            expected[name].dtype,
        )
        # In whatever order, and again where a writer asks again.
        assert mx.array_equal(joined(tensor), expected[name])
    assert mx.array_equal(joined(found["a.scales"]), expected["a.scales"])


def test_a_weight_is_rounded_once():
    asked = []

    def pieces():
        asked.append(1)
        return [mx.ones((4, 64))]

    tensors = [("a.weight", Deferred((4, 64), mx.float32, pieces))]
    for _, tensor in pack_deferred(tensors, {"a": WAYS[2]}):
        list(tensor.pieces())
    assert len(asked) == 1
