"""The operations of a program in numpy: float32 from whatever comes in.

Only what this package's programs hold, with only the arguments that they give; any other
is a TypeError. Source: coremltools' documentation of MIL's operations, iOS 18.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]
CASTS = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}


def _wide(x: Array) -> Array:
    return np.asarray(x, np.float32)


def _conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] = (1, 1),
    pad_type: str = "valid",
    groups: int = 1,
    dilations: Sequence[int] = (1, 1),
    pad: Sequence[int] = (0, 0, 0, 0),
) -> Array:
    x, weight = _wide(x), _wide(weight)
    height, width = weight.shape[2:]
    assert pad_type in ("valid", "same")
    assert not any(pad)
    assert tuple(dilations) == (1, 1)
    if pad_type == "same":
        # Odd kernels that step by one: as much on both sides.
        assert height % 2 == width % 2 == 1
        assert tuple(strides) == (1, 1)
        y, z = height // 2, width // 2
        x = np.pad(x, ((0, 0), (0, 0), (y, y), (z, z)))
    seen = sliding_window_view(x, (height, width), axis=(2, 3))
    seen = seen[:, :, :: strides[0], :: strides[1]]
    if groups == 1:
        out = np.tensordot(weight, seen[0], axes=((1, 2, 3), (0, 3, 4)))[None]
    else:
        assert groups == x.shape[1] == weight.shape[0]
        out = np.einsum("bcijkl,ckl->bcij", seen, weight[:, 0])
    return out if bias is None else out + _wide(bias)[None, :, None, None]


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out = _wide(x) @ _wide(weight).T
    return out if bias is None else out + _wide(bias)


def _matmul(
    x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False
) -> Array:
    x, y = _wide(x), _wide(y)
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (
        y.swapaxes(-1, -2) if transpose_y else y
    )


def _einsum(values: Sequence[Array], equation: str) -> Array:
    return np.asarray(np.einsum(equation, *map(_wide, values), optimize=True))


def _softmax(x: Array, axis: int = -1) -> Array:
    x = np.exp(_wide(x) - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


def _attention(query: Array, key: Array, value: Array) -> Array:
    scale = query.shape[-1] ** -0.5
    # Head by head: the scores of all would be large.
    heads = [
        _softmax(_wide(q) @ _wide(k).T * np.float32(scale)) @ _wide(v)
        for q, k, v in zip(query[0], key[0], value[0], strict=True)
    ]
    return np.stack(heads)[None]


def _layer_norm(
    x: Array, axes: Sequence[int], gamma: Array, beta: Array, epsilon: float
) -> Array:
    x, axis = _wide(x), tuple(axes)
    x = x - x.mean(axis, keepdims=True)
    root = np.sqrt((x * x).mean(axis, keepdims=True) + np.float32(epsilon))
    return x / root * _wide(gamma) + _wide(beta)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-_wide(x)))


def _gelu(x: Array, mode: str) -> Array:
    x = _wide(x)
    if mode == "EXACT":
        # numpy has no error function.
        return x * (1 + np.array(mx.erf(mx.array(x * np.float32(0.5**0.5))))) / 2
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    assert mode == "TANH_APPROXIMATION"
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)
    return x * (1 + np.tanh(inner)) / 2


def _slice(x: Array, begin: Sequence[int], end: Sequence[int]) -> Array:
    return x[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]


def _topk(
    x: Array,
    k: int,
    axis: int,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Array, Array]:
    assert sort
    assert return_indices
    assert not ascending
    indices = np.argsort(-_wide(x), axis=axis, kind="stable")
    indices = np.take(indices, range(k), axis=axis)
    return np.take_along_axis(x, indices, axis), indices.astype(output_indices_dtype)


def _gather(
    x: Array,
    indices: Array,
    axis: int,
    batch_dims: int = 0,
    validate_indices: bool = False,  # noqa: ARG001
) -> Array:
    assert batch_dims == 0
    return np.take(x, indices, axis)


def _reduce(
    function: Callable[..., Any],
) -> Callable[..., Array]:
    def reduced(x: Array, axes: Sequence[int], keep_dims: bool = False) -> Array:
        return np.asarray(function(_wide(x), axis=tuple(axes), keepdims=keep_dims))

    return reduced


def _pair(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda x, y: np.asarray(function(_wide(x), _wide(y)))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": _pair(np.add),
    "cast": lambda x, dtype: x.astype(CASTS[dtype]),
    "concat": lambda values, axis, interleave=False: np.concatenate(values, axis),  # noqa: ARG005
    "conv": _conv,
    "einsum": _einsum,
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(axes)),
    "gather": _gather,
    "gelu": _gelu,
    "identity": lambda x: x,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "maximum": _pair(np.maximum),
    "mul": _pair(np.multiply),
    "real_div": _pair(np.divide),
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean),
    "reduce_sum": _reduce(np.sum),
    "reshape": lambda x, shape: x.reshape(shape),
    "rsqrt": lambda x, epsilon: 1 / np.sqrt(_wide(x) + np.float32(epsilon)),
    "scaled_dot_product_attention": _attention,
    "sigmoid": _sigmoid,
    "silu": lambda x: _wide(x) * _sigmoid(x),
    "slice_by_index": _slice,
    "softmax": _softmax,
    "split": lambda x, split_sizes, axis: np.split(
        x, np.cumsum(split_sizes)[:-1], axis
    ),
    "sqrt": lambda x: np.sqrt(_wide(x)),
    "squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "sub": _pair(np.subtract),
    "topk": _topk,
    "transpose": lambda x, perm: x.transpose(perm),
}
