"""Better scales for rounded weights: those under which the model predicts as before.

Rounding picks each group's scale and bias by its largest and smallest weight. Here they
move so that the divergence from the unpacked model's predictions falls, on prompts with
pictures, while the packed integers stay. It is mlx-lm's DWQ for a model that takes more
than tokens, and in units of each group's own step, so that one learning rate fits all.

Source: https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/quant/dwq.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from mm1_mlx.models import MM1
from mm1_mlx.models.linear import named_leaves
from mm1_mlx.quantize.cost import Reference, divergence, image_tokens, predict

LEARNING_RATE = 1e-3
EPOCHS = 8
# Samples of one step; one after the other, so that memory holds one.
STEP_SAMPLES = 4


def distil(
    model: MM1,
    reference: Reference,
    *,
    stored: Mapping[str, mx.Dtype] = MappingProxyType({}),
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, mx.array]:
    """Scales and biases by name, learned on the reference; the model has them, too.

    Only affine packing has scales that can move, and only the decoder's learn.

    Args:
        model: packed; its scales are those that rounding gives.
        reference: what the unpacked model predicts.
        stored: the types that scales and biases are written in, by name; what is learned
            is what they can hold.
        epochs: how often each sample is learned from.
        learning_rate: at the beginning, in a group's own steps.
        progress: told that one more sample was learned from.
    """
    layers = _affine_layers(model)
    rounded = {path: (x.scales, x.biases) for path, x in layers.items()}
    shifts = {
        path: mx.zeros((2, *scales.shape)) for path, (scales, _) in rounded.items()
    }

    def loss(
        shifts: dict[str, mx.array], i: int, pictures: Sequence[mx.array]
    ) -> mx.array:
        _apply(layers, rounded, shifts, stored)
        logits = predict(model, reference.samples[i], pictures)
        return divergence(logits, reference.logits[i]).sum()

    gradient, count = mx.value_and_grad(loss), len(reference.samples)
    order = [i for epoch in range(epochs) for i in _shuffled(count, epoch)]
    steps = [order[i : i + STEP_SAMPLES] for i in range(0, len(order), STEP_SAMPLES)]
    schedule = optim.cosine_decay(learning_rate, len(steps))
    optimizer = optim.Adam(schedule, betas=[0.9, 0.99], bias_correction=True)
    for step in steps:
        total = None
        positions = sum(len(reference.samples[i].answer) for i in step)
        for i in step:
            # Encoded again each time: those of all samples would be too many to keep.
            pictures = image_tokens(model, reference.samples[i].prompt)
            _, gradients = gradient(shifts, i, pictures)
            gradients = tree_map(lambda x: x / positions, gradients)  # noqa: B023
            total = tree_map(mx.add, total, gradients) if total else gradients
            mx.eval(total)
            progress()
        shifts = optimizer.apply_gradients(cast(Any, total), shifts)
        mx.eval(shifts, optimizer.state)
    _apply(layers, rounded, shifts, stored)
    learned = {
        f"{path}.{leaf}": layer[leaf]
        for path, layer in layers.items()
        for leaf in ("scales", "biases")
    }
    mx.eval(learned)
    return learned


def _affine_layers(model: MM1) -> dict[str, Any]:
    """The decoder's packed layers whose scales are numbers, by path."""
    return {
        path: layer
        for path, layer in named_leaves(model)
        if path.startswith("decoder.") and getattr(layer, "mode", None) == "affine"
    }


def _apply(
    layers: dict[str, Any],
    rounded: dict[str, tuple[mx.array, mx.array]],
    shifts: dict[str, mx.array],
    stored: Mapping[str, mx.Dtype],
) -> None:
    """Move scales and biases by shares of the scale, to what is stored of them."""
    for path, layer in layers.items():
        scales, biases = rounded[path]
        step = scales.astype(mx.float32)
        moved = {
            "scales": step * (1 + shifts[path][0]),
            "biases": biases.astype(mx.float32) + step * shifts[path][1],
        }
        for leaf, tensor in moved.items():
            kind = stored.get(f"{path}.{leaf}", scales.dtype)
            layer[leaf] = tensor.astype(kind).astype(scales.dtype)


def _shuffled(count: int, seed: int) -> list[int]:
    order = mx.random.permutation(count, key=mx.random.key(seed))
    return cast(list[int], order.tolist())
