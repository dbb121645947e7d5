"""Packed layers: mlx's own on a GPU, and here what a CPU computes quickly.

mlx's CPU backend multiplies packed weights one by one, at 3 GFLOP/s; unpacked, they go
through the BLAS at a hundred. So many rows at once unpack a layer's weights first, a
slice at a time, and few rows, as of a token that is decoded, do not. Where memory allows,
``keep_unpacked`` unpacks them once and for all. Paths of tensors stay those of mlx.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mm1_mlx.config import Packing

# Rows from which unpacking first is the faster, measured with OpenBLAS on one core; the
# widths that do not divide 32 unpack slowly.
MANY_ROWS = {
    ("affine", 2): 4,
    ("affine", 3): 8,
    ("affine", 4): 3,
    ("affine", 5): 15,
    ("affine", 6): 24,
    ("affine", 8): 3,
    ("mxfp4", 4): 17,
    ("mxfp8", 8): 3,
    ("nvfp4", 4): 18,
}
# Unpacked at a time: 64 MB.
SLICE_WEIGHTS = 1 << 24


class PackedLayer(Protocol):
    """What mlx's packed layers have in common."""

    group_size: int
    bits: int
    mode: str

    def __getitem__(self, name: str) -> Any: ...
    def get(self, name: str) -> Any: ...
    def pop(self, name: str) -> Any: ...


class Unpacked(NamedTuple):
    """The weights [..., N, D] that packed arrays stand for, and these arrays."""

    parts: tuple[mx.array | None, ...]
    weights: mx.array


class PackedLinear(nn.QuantizedLinear):
    """``nn.QuantizedLinear`` for a CPU."""

    def __call__(self, x: mx.array) -> mx.array:
        x = product(self, x)
        return x + self.bias if "bias" in self else x


class PackedEmbedding(nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding`` for a CPU."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Scores [..., V] of states [..., D]."""
        return product(self, x)


class PackedSwitchLinear(QuantizedSwitchLinear):
    """``QuantizedSwitchLinear`` for a CPU; ``moe.py`` computes many rows by itself."""

    @classmethod
    def from_switch(cls, layer: SwitchLinear, **way: Any) -> Self:
        """The packed layer of an unpacked one."""
        E, H, D = layer.weight.shape
        packed = cls(D, H, E, False, **way)
        packed.weight, packed.scales, *biases = mx.quantize(layer.weight, **way)
        packed.biases = biases[0] if biases else None
        if "bias" in layer:
            packed.bias = layer.bias
        return packed

    def __call__(
        self, x: mx.array, indices: mx.array, sorted_indices: bool = False
    ) -> mx.array:
        kept = kept_weights(self)
        if kept is None:
            return super().__call__(x, indices, sorted_indices).astype(x.dtype)
        y = mx.gather_mm(x, kept.swapaxes(-1, -2), rhs_indices=indices)
        y = y + self.bias[indices][..., None, :] if "bias" in self else y
        return y.astype(x.dtype)


def pack(module: nn.Module, way: Packing) -> nn.Module:
    """The packed layer of an unpacked one, whose weights are rounded.

    Raises:
        ValueError: its weights cannot be packed so.
    """
    options = way.to_dict()
    if mx.default_device() == mx.cpu:
        if type(module) is nn.Linear:
            return PackedLinear.from_linear(module, **options)
        if type(module) is nn.Embedding:
            return PackedEmbedding.from_embedding(module, **options)
        if type(module) is SwitchLinear:
            return PackedSwitchLinear.from_switch(module, **options)
    return cast(Any, module).to_quantized(**options)


def named_leaves(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules that hold no others, by their paths."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return cast(list[tuple[str, Any]], leaves)


def outer_paths(model: nn.Module) -> dict[str, str]:
    """Of layers that lie in one with low-rank matrices, that one's path, which is theirs.

    So mlx-lm's LoRA and DoRA layers hold the layer that they are beside.
    """
    return {
        f"{path}.{child}": path
        for path, module in model.named_modules()
        if "lora_a" in module
        for child in ("linear", "embedding")
        if child in module
    }


def packed_ways(model: nn.Module) -> dict[str, Packing]:
    """How the modules of a model are packed, by path; the others are not."""
    outer = outer_paths(model)
    return {
        outer.get(path, path): Packing(
            group_size=x.group_size, bits=x.bits, mode=x.mode
        )
        for path, x in named_leaves(model)
        if "scales" in x
    }


def product(layer: PackedLayer, x: mx.array, expert: int | None = None) -> mx.array:
    """X [..., D] times the packed weights [N, D], [..., N], without a bias.

    Of experts' weights [E, N, D], those of one ``expert``.
    """
    # A CPU's halves are slow, too.
    y, kept, D = x.astype(mx.float32), kept_weights(layer), x.shape[-1]
    if kept is not None:
        return (y @ (kept if expert is None else kept[expert]).T).astype(x.dtype)
    weight, scales, biases = layer["weight"], layer["scales"], layer.get("biases")
    if expert is not None:
        weight, scales = weight[expert], scales[expert]
        biases = None if biases is None else biases[expert]
    way: dict[str, Any] = {
        "group_size": layer.group_size,
        "bits": layer.bits,
        "mode": layer.mode,
    }
    if x.size // D < MANY_ROWS[layer.mode, layer.bits]:
        y = mx.quantized_matmul(x, weight, scales, biases, transpose=True, **way)
        # mlx's has the type of the scales where theirs is the wider.
        return y.astype(x.dtype)
    parts: list[mx.array] = []
    step = max(1, SLICE_WEIGHTS // D)
    for i in range(0, scales.shape[0], step):
        rows = slice(i, i + step)
        # One after the other: mlx would else unpack all layers ahead of their turn.
        before = mx.stop_gradient(parts[-1] if parts else y)
        dense = mx.dequantize(
            mx.depends([weight[rows]], [before])[0],
            scales[rows],
            None if biases is None else biases[rows],
            **way,
            dtype=mx.float32,
        )
        parts.append(y @ dense.T)
    return mx.concatenate(parts, axis=-1).astype(x.dtype)


def expert_products(layer: nn.Module) -> Callable[[int, mx.array], mx.array]:
    """A function: rows [R, D] times the weights of an expert, [R, N], for a CPU."""
    if isinstance(layer, QuantizedSwitchLinear):
        return lambda expert, x: product(layer, x, expert)
    # Split, not indexed: the gradient of an index is as large as all experts.
    weights = [w.squeeze(0).T for w in mx.split(layer.weight, layer.num_experts)]
    return lambda expert, x: mx.matmul(x, weights[expert])


def keep_unpacked(model: nn.Module, limit: float) -> int:
    """Keep the float32 weights of a CPU's packed layers beside them, if all have room.

    Returns:
        Bytes that they take, 0 if they would take more than ``limit``.
    """
    kinds = (PackedLinear, PackedEmbedding, PackedSwitchLinear)
    layers = [layer for _, layer in named_leaves(model) if isinstance(layer, kinds)]
    size = 4 * sum(x.scales.size * x.group_size for x in layers)
    if not layers or size > limit:
        return 0
    for layer in layers:
        dense = mx.dequantize(
            layer.weight,
            layer.scales,
            layer.get("biases"),
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
            dtype=mx.float32,
        )
        mx.eval(dense)
        # No parameter: a name that begins so is neither stored nor trained.
        layer._unpacked = Unpacked(_packed_parts(layer), dense)
    return size


def drop_unpacked(model: nn.Module) -> None:
    """Keep no unpacked weights any longer; the model computes the same without them."""
    for _, layer in named_leaves(model):
        layer.pop("_unpacked", None)


def _packed_parts(layer: Any) -> tuple[mx.array | None, ...]:
    return layer.get("weight"), layer.get("scales"), layer.get("biases")


def kept_weights(layer: PackedLayer) -> mx.array | None:
    """The layer's unpacked weights; None if they are not kept.

    Where the layer has got other arrays they end. What is written into the arrays that
    it has (``scales[:8] = 0``, ``scales *= 2``) is not seen: call ``drop_unpacked``.
    """
    unpacked: Unpacked | None = layer.get("_unpacked")
    if unpacked is None:
        return None
    pairs = zip(unpacked.parts, _packed_parts(layer), strict=True)
    if all(then is now for then, now in pairs):
        return unpacked.weights
    layer.pop("_unpacked")
    return None
