"""Expert MLPs of an encoder (Mobile V-MoE): the same k for a whole image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mm1_mlx.coreml.activation import ACTIVATIONS
from mm1_mlx.coreml.layout import Value, spell
from mm1_mlx.coreml.nlc import NLC
from mm1_mlx.coreml.tools import mb
from mm1_mlx.errors import ConfigError

if TYPE_CHECKING:
    from mm1_mlx.coreml.encoder import Encoder


def experts(encoder: Encoder, x: Value, path: str) -> Value:
    """The weighted sum of the chosen experts' MLPs of states [1, L, D].

    Raises:
        ConfigError: the layout's weights cannot be chosen while it runs.
    """
    config, moe = encoder.config, encoder.config.moe
    assert moe is not None
    if not isinstance(encoder.layout, NLC):
        raise ConfigError(
            f"{path} chooses its experts by the picture, and the Neural Engine's weights "
            "are fixed; export without --ane"
        )
    indices, shares = _route(encoder, x, path)

    def product(states: Value, name: str, index: Value) -> Value:
        """States times the weights of an expert."""
        chosen = _pick(encoder, f"{path}.{name}.weight", index)
        out = mb.matmul(x=states, y=chosen, transpose_y=True)
        if config.mlp_bias:
            bias = _pick(encoder, f"{path}.{name}.bias", index)
            out = mb.add(x=out, y=mb.expand_dims(x=bias, axes=[1]))
        return out

    total = None
    for j in range(moe.experts_per_image):
        index = mb.slice_by_index(x=indices, begin=[0, j], end=[1, j + 1])
        index = mb.squeeze(x=index, axes=[0])
        y = ACTIVATIONS[config.hidden_act](product(x, "fc1", index))
        if config.gated_mlp:
            y = mb.mul(x=y, y=product(x, "fc3", index))
        share = mb.slice_by_index(x=shares, begin=[0, j], end=[1, j + 1])
        y = mb.mul(x=product(y, "fc2", index), y=mb.expand_dims(x=share, axes=[2]))
        total = y if total is None else mb.add(x=total, y=y)
    return total


def _route(encoder: Encoder, x: Value, path: str) -> tuple[Value, Value]:
    """The experts of the image and their weights, [1, k] both."""
    moe = encoder.config.moe
    assert moe is not None
    # In float32: half precision moves images between nearly tied experts.
    x = mb.cast(x=x, dtype="fp32")
    if moe.router_input == "mean":
        x = mb.reduce_mean(x=x, axes=[1])
    else:
        _, _, D = x.shape
        x = mb.slice_by_index(x=x, begin=[0, 0, 0], end=[1, 1, D])
        x = mb.squeeze(x=x, axes=[1])
    router = np.ascontiguousarray(encoder.weights(f"{path}.router.weight"))
    scores = mb.linear(x=x, weight=router, name=spell(f"{path}.router"))
    shares = mb.softmax(x=scores, axis=-1)
    shares, indices = mb.topk(x=shares, k=moe.experts_per_image, axis=-1)
    if moe.norm_topk_prob:
        total = mb.reduce_sum(x=shares, axes=[-1], keep_dims=True)
        shares = mb.real_div(x=shares, y=total)
    return indices, mb.cast(x=shares, dtype=encoder.layout.numbers.name)


def _pick(encoder: Encoder, name: str, index: Value) -> Value:
    """The part of an expert [1, ...] of the tensor of all."""
    tensor = encoder.layout.numbers(encoder.weights(name), name)
    return mb.gather(x=tensor, indices=index, axis=0)
