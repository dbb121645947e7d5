"""The image encoder in a layout's operations: an image [1, 3, S, S] to patch features.

The counterpart of ``models.vision``, for one picture of a fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mm1_mlx.config import ImageConfig, VisionConfig
from mm1_mlx.coreml.activation import ACTIVATIONS
from mm1_mlx.coreml.experts import experts
from mm1_mlx.coreml.layout import Layout, Value, spell
from mm1_mlx.coreml.tools import mb
from mm1_mlx.coreml.weights import Array, Weights
from mm1_mlx.models.resample import stretch
from mm1_mlx.models.vision import sincos


class Encoder:
    """Writes the encoder's operations.

    Args:
        layout: what they are.
        weights: of the model.
    """

    def __init__(self, layout: Layout, weights: Weights) -> None:
        assert weights.config.vision is not None
        assert weights.config.image is not None
        self.layout = layout
        self.weights = weights
        self.config: VisionConfig = weights.config.vision
        self.image: ImageConfig = weights.config.image

    def centre(self, image: Value) -> Value:
        """Pixels less their usual mean, [1, 3, S, S].

        Before they are rounded to half precision: around 0 that rounds them least, and no
        bias has to take back what a convolution made of all their means.

        Args:
            image: red, green and blue between 0 and 1, float32.
        """
        return mb.sub(x=image, y=_channels(self.image.mean))

    def embed(self, image: Value) -> Value:
        """States of the patches at their places, behind the class token.

        Args:
            image: what ``centre`` gives, in what is computed in.
        """
        config, layout = self.config, self.layout
        weight, bias = self._patch_weights()
        x = layout.patches(image, weight, bias, "vision_patch_embedding")
        if config.patch_norm:
            x = self.norm(x, "vision.patch_layernorm")
        places, classes = self._positions(image.shape[-1] // config.patch_size)
        x = mb.add(x=x, y=layout.rows(places), name="vision_positions")
        if config.class_token:
            token = self.weights("vision.class_embedding") + classes
            x = layout.join([layout.rows(token[None]), x])
        return self.norm(x, "vision.pre_layernorm") if config.pre_norm else x

    def block(self, x: Value, index: int) -> Value:
        """States after a block; its two sums are named by its path."""
        path = f"vision.layers.{index}"
        y = self.norm(x, f"{path}.layer_norm1")
        y = self._attention(y, f"{path}.self_attn")
        x = mb.add(x=x, y=y, name=spell(f"{path}.attended"))
        y = self.norm(x, f"{path}.layer_norm2")
        sparse = self.config.moe and self.config.is_sparse(index)
        mlp = f"{path}.mlp"
        y = experts(self, y, mlp) if sparse else self._mlp(y, mlp)
        return mb.add(x=x, y=y, name=spell(path))

    def finish(self, x: Value) -> Value:
        """Patch features of the last block's states."""
        if self.config.apply_post_norm:
            x = self.norm(x, "vision.post_layernorm")
        drops = self.config.class_token and self.config.drop_cls
        return self.layout.cut(x, 1, "vision_features") if drops else x

    def norm(self, x: Value, path: str) -> Value:
        """States after one of the tower's norms."""
        weight, eps = self.weights(f"{path}.weight"), self.config.layer_norm_eps
        if self.config.norm == "rms":
            return self.layout.rms_norm(x, weight, eps, spell(path))
        bias = self.weights(f"{path}.bias")
        return self.layout.layer_norm(x, weight, bias, eps, spell(path))

    def linear(self, x: Value, path: str) -> Value:
        """States after one of the tower's linear layers."""
        weight, bias = self.weights(f"{path}.weight"), self.weights.get(f"{path}.bias")
        return self.layout.linear(x, weight, bias, spell(path))

    def _attention(self, x: Value, path: str) -> Value:
        q, k, v = (self.linear(x, f"{path}.{name}_proj") for name in "qkv")
        heads = self.config.num_attention_heads
        x = self.layout.attend(q, k, v, heads, spell(f"{path}.heads"))
        return self.linear(x, f"{path}.out_proj")

    def _mlp(self, x: Value, path: str) -> Value:
        y = ACTIVATIONS[self.config.hidden_act](self.linear(x, f"{path}.fc1"))
        if self.config.gated_mlp:
            y = mb.mul(x=y, y=self.linear(x, f"{path}.fc3"))
        return self.linear(y, f"{path}.fc2")

    def _patch_weights(self) -> tuple[Array, Array]:
        """The patch convolution of pixels that are centred, not divided by their deviation.

        The division by 255 stays outside: in half precision weights would underflow.
        """
        weight = self.weights("vision.patch_embedding.weight").transpose(0, 3, 1, 2)
        bias = self.weights.get("vision.patch_embedding.bias")
        weight = weight / _channels(self.image.std)
        return weight, np.zeros(len(weight), np.float32) if bias is None else bias

    def _positions(self, grid_size: int) -> tuple[Array, Array | float]:
        """What is added at every place [g * g, D], and to the class token [D]."""
        config = self.config
        if config.position == "sincos":
            return sincos(grid_size, config.hidden_size), 0.0
        table = self.weights("vision.position_embedding")
        first = int(config.class_token)
        places = stretch(mx.array(table[first:]), grid_size, config.interpolation)
        return np.array(places), table[0] if first else 0.0


def _channels(values: Sequence[float]) -> Array:
    """A number for each colour, [1, 3, 1, 1]."""
    return np.asarray(values, np.float32)[None, :, None, None]
