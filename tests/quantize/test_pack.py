"""Weights are rounded as mlx rounds them, whether they come whole or in pieces."""

import mlx.core as mx
import pytest

from mm1_mlx.config import Packing
from mm1_mlx.config.quantization import MODES
from mm1_mlx.quantize.pack import LEAVES, pack_deferred
from mm1_mlx.shard import Deferred, in_order, write_shard

WAYS = [
    Packing(group_size=groups[0], bits=bits, mode=mode)
    for mode, (groups, widths) in MODES.items()
    for bits in widths
]
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda w: f"{w.mode}-{w.bits}")


@each_way
@pytest.mark.parametrize("shape", [(6, 64), (3, 4, 64)])
@pytest.mark.parametrize("piece", [1, 50, 64, 200, 10_000])
def test_pieces_give_what_the_whole_gives(way, shape, piece):
    mx.random.seed(0)
    weight = mx.random.normal(shape).astype(mx.float16)
    parts = mx.quantize(weight, **way.to_dict())
    expected = {f"a.{leaf}": x for leaf, x in zip(LEAVES, parts, strict=False)}
    expected |= {"a.bias": weight[0], "b.weight": weight}
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
        assert mx.array_equal(tensor.whole(), expected[name])
    assert mx.array_equal(found["a.scales"].whole(), expected["a.scales"])


@pytest.mark.parametrize(("dtype", "times"), [(mx.float16, 1), (mx.float32, 2)])
def test_a_weight_is_rounded_once_for_small_scales(dtype, times, tmp_path):
    """Float32 ones lie before the integers in a file."""
    asked = []

    def pieces():
        asked.append(1)
        return [mx.ones((4, 64), dtype)]

    tensors = [("a.weight", Deferred((4, 64), dtype, pieces))]
    found = in_order(dict(pack_deferred(tensors, {"a": WAYS[2]})))
    write_shard(tmp_path / "x.safetensors", found, lambda: None)
    assert len(asked) == times


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_the_integers_are_never_whole(dtype, tmp_path):
    """Of a weight of 64 pieces no more than a few are alive, whatever comes first."""
    rows, width, count = 64, 1024, 64
    size = rows * width * dtype.size

    def pieces():
        for _ in range(count):
            yield mx.ones((rows, width), dtype)

    tensors = [("a.weight", Deferred((count * rows, width), dtype, pieces))]
    way = Packing(group_size=64, bits=8, mode="affine")
    found = in_order(dict(pack_deferred(tensors, {"a": way})))
    small = sum(x.nbytes for name, x in found.items() if name != "a.weight")
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    write_shard(tmp_path / "x.safetensors", found, lambda: None)
    assert mx.get_peak_memory() - before < 8 * size + 2 * small
