"""Cross-entropy of a head's scores, some rows at a time, with its gradients beside it.

Scores of every row at once would be the largest array of a training step: rows x
vocabulary, and so would be their softmax and its gradients. Where a model is trained, a
block's scores become a loss and what it says of the states and of the head before the
next block's are computed, so that none are kept and none are computed twice.

Source of the idea: Liger Kernel (arXiv 2410.10989), FusedLinearCrossEntropy.
"""

from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mm1_mlx.config import DecoderConfig
from mm1_mlx.kernels.by_blocks import by_blocks
from mm1_mlx.kernels.exponential import LOG2_E, exp2
from mm1_mlx.models import MM1

# Scores of a block, where the vocabulary is small: 16 MB in float32.
SCORES = 1 << 22
# Fewer rows make the matrix products slow.
MIN_ROWS = 128
# What float16 gradients of a block's states are multiplied by until they are float32:
# a probability of 6e-11 counts, and they overflow only beyond weights of 32.
HALF_SCALE = 1024.0


def block_rows(vocab_size: int) -> int:
    """Rows that are scored together."""
    return max(MIN_ROWS, SCORES // vocab_size)


def summed_cross_entropy(model: MM1, states: mx.array, targets: mx.array) -> mx.array:
    """The sum (nats) over all rows of how unlikely their targets are, in float32.

    Gradients reach the states and the head's trainable weights. A model that is
    ``training`` has them computed beside the loss; else they are mlx's own, of all
    scores. They have no gradients of their own.

    Args:
        model: whose decoder's head scores.
        states: the decoder's last [N, D].
        targets: ids [N].

    Raises:
        NotImplementedError: a gradient of a gradient is asked for.
    """
    head = model.decoder.head
    size = block_rows(cast(DecoderConfig, model.config.decoder).vocab_size)
    rows = [slice(start, start + size) for start in range(0, len(targets), size)]

    def loss(x: mx.array, weights: Any, some: slice, scale: float = 1.0) -> mx.array:
        held = head.trainable_parameters()
        head.update(weights)
        scores = model.decoder.logits(x)
        head.update(held)
        losses = _cross_entropy(scores.astype(mx.float32), targets[some])[0]
        return cast(mx.array, losses * scale)

    weights = head.trainable_parameters()
    if not head.training:
        measured: list[mx.array] = []
        for some in rows:
            x = states[some]
            if measured:
                # As below: else mlx would compute all scores before it frees any.
                (x,) = mx.depends([x], [measured[-1]])
            measured.append(loss(x, weights, some))
        return mx.stack(measured).sum()
    gradients: list[Any] = []

    def forward(states: mx.array, weights: Any) -> mx.array:
        # The loss's own scale comes later: until then small gradients must not vanish.
        half, scale = states.dtype == mx.float16, 1.0
        if half and _leaves(weights):
            states, weights = tree_map(
                lambda x: x.astype(mx.float32), (states, weights)
            )
        elif half:
            scale = HALF_SCALE
        sums: list[mx.array] = []
        columns: list[mx.array] = []
        total = tree_map(lambda x: mx.zeros(x.shape), weights)
        for some in rows:
            x = states[some]
            if columns:
                # Or mlx would compute every block's scores before it frees the first's.
                (x,) = mx.depends([x], [columns[-1], *_leaves(total)])
            one, (dx, dweights) = mx.value_and_grad(loss, argnums=(0, 1))(
                x, weights, some, scale
            )
            sums.append(one / scale)
            columns.append(dx.astype(mx.float32) / scale)
            total = tree_map(lambda whole, part: whole + part, total, dweights)
        gradients[:] = [mx.concatenate(columns), total]
        return mx.stack(sums).sum()

    def backward(primals: list[Any], cotangent: mx.array, _: mx.array) -> Any:
        return tree_map(
            lambda x, gradient: (cotangent * _last(gradient)).astype(x.dtype),
            list(primals),
            gradients,
        )

    blocked = mx.custom_function(forward)
    blocked.vjp(backward)
    return cast(mx.array, blocked(states, weights))


def _leaves(tree: Any) -> list[mx.array]:
    named: Any = tree_flatten(tree)
    return [x for _, x in named]


def _summed(scores: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The sum of the rows' losses, and its gradient of the scores [rows, V]."""
    largest = scores.max(axis=-1, keepdims=True)
    weights = _exponentials(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    at = targets[:, None]
    losses = mx.log(total) + largest - mx.take_along_axis(scores, at, axis=-1)
    softmax = weights * (1 / total)
    missing = mx.take_along_axis(softmax, at, axis=-1) - 1
    return losses.sum(), mx.put_along_axis(softmax, at, missing, axis=-1)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError(
        "the head's loss has no second derivatives; differentiate mlx's own "
        "nn.losses.cross_entropy of the decoder's scores"
    )


# A gradient that is none of a function's that could be differentiated again: mlx would
# take it for a constant.
_last: Any = mx.custom_function(lambda x: x)
_last.vjp(_refuse)


def _summed_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    return cotangents[0] * _last(outputs[1]), mx.zeros_like(primals[1])


# Its second result is its own gradient, to be scaled.
_cross_entropy: Any = mx.custom_function(_summed)
_cross_entropy.vjp(_summed_vjp)


def _exponentials(x: mx.array) -> mx.array:
    """Of values that are at most 0."""
    if mx.default_device() != mx.cpu:
        return mx.exp(x)
    return by_blocks(lambda some: exp2(some * LOG2_E), x)
