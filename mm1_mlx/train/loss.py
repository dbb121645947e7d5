"""The training loss: cross-entropy of the assistant's tokens, and the gates' losses."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.models.moe import load_balance_loss, router_z_loss
from mm1_mlx.train.cross_entropy import summed_cross_entropy
from mm1_mlx.train.sample import Batch


def next_token_loss(model: MM1, batch: Batch) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy (nats) over the learned tokens, and their number."""
    states = batch_states(model, batch, model.encode(batch.pictures))
    return states_loss(model, batch, states)


def sparse_loss(
    model: MM1, batch: Batch, balance_weight: float = 0.01, z_weight: float = 0.001
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """``next_token_loss`` with what keeps a decoder's experts in balanced use.

    Each of the two gate losses is averaged over the sparse layers, padding left out.

    Returns:
        The loss, the number of learned tokens, and the unweighted parts of the loss:
        ``cross_entropy``, ``load_balance`` and ``router_z``.

    Raises:
        ConfigError: the decoder has no experts.

    Source: MM1 (arXiv 2403.09611), section 3.5, for the weights; axlearn's
    AuxLossMetrics for the average over layers, https://github.com/apple/axlearn/blob/
    34aed43c1b6e581c4753d06d7cbeedd5010ef26b/axlearn/common/causal_lm.py
    """
    states, gates = _routed_states(model, batch, model.encode(batch.pictures))
    if not gates:
        raise ConfigError(
            "the decoder has no experts to balance; train it with next_token_loss"
        )
    real = mx.array(batch.real)
    cross_entropy, count = states_loss(model, batch, states)
    balance = mx.stack([load_balance_loss(logits, real) for logits in gates]).mean()
    z = mx.stack([router_z_loss(logits, real) for logits in gates]).mean()
    loss = cross_entropy + balance_weight * balance + z_weight * z
    parts = {"cross_entropy": cross_entropy, "load_balance": balance, "router_z": z}
    return loss, count, parts


def batch_states(
    model: MM1, batch: Batch, image_tokens: Sequence[mx.array]
) -> mx.array:
    """The decoder's last states [B, T, D].

    Attention needs no mask of the padding on the right: it never looks at what follows.
    Experts with a capacity do: padding takes no place of theirs.
    """
    return _routed_states(model, batch, image_tokens)[0]


def _routed_states(
    model: MM1, batch: Batch, image_tokens: Sequence[mx.array]
) -> tuple[mx.array, list[mx.array]]:
    """The last states, and the gate's logits [B, T, E] of every sparse layer."""
    tokens = mx.array(batch.tokens)
    B, T = tokens.shape
    x = model.embed(tokens.flatten(), image_tokens, batch.spans).reshape(B, T, -1)
    return model.decoder.routed(
        tokens, input_embeddings=x, real=batch.real, segments=batch.segments
    )


def states_loss(
    model: MM1, batch: Batch, states: mx.array
) -> tuple[mx.array, mx.array]:
    """``next_token_loss`` from the decoder's last states [B, T, D]."""
    # Logits only where something is learned: the head is a large part of a small model.
    learned = batch.learned[:, 1:]
    if not learned.any():
        return mx.array(0.0), mx.array(0)
    targets = mx.array(batch.tokens[:, 1:][learned])
    places = mx.array(np.flatnonzero(learned))
    read = states[:, :-1].flatten(0, 1)[places]
    total = summed_cross_entropy(model, read, targets)
    return total / targets.size, mx.array(targets.size)
