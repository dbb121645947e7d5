"""The training loss: cross-entropy of the assistant's tokens."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mm1_mlx.models import MM1
from mm1_mlx.train.sample import Batch


def next_token_loss(model: MM1, batch: Batch) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy (nats) over the learned tokens, and their number."""
    return answer_loss(model, batch, model.encode(batch.pictures))


def answer_loss(
    model: MM1, batch: Batch, image_tokens: Sequence[mx.array]
) -> tuple[mx.array, mx.array]:
    """``next_token_loss`` for pictures that are encoded already."""
    return states_loss(model, batch, batch_states(model, batch, image_tokens))


def batch_states(
    model: MM1, batch: Batch, image_tokens: Sequence[mx.array]
) -> mx.array:
    """The decoder's last states [B, T, D].

    Right padding needs no mask: causal attention never looks at what follows.
    """
    tokens = mx.array(batch.tokens)
    B, T = tokens.shape
    x = model.embed(tokens.flatten(), image_tokens, batch.spans).reshape(B, T, -1)
    return model.decoder.hidden(tokens, input_embeddings=x)


def states_loss(
    model: MM1, batch: Batch, states: mx.array, adjustment: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """``next_token_loss`` from the decoder's last states [B, T, D].

    ``adjustment`` [learned tokens, V] is added to the scores (logit adjustment,
    arXiv 2007.07314).
    """
    # Logits only where something is learned: the head is a large part of a small model.
    learned = batch.learned[:, 1:]
    if not learned.any():
        return mx.array(0.0), mx.array(0)
    targets = mx.array(batch.tokens[:, 1:][learned])
    places = mx.array(np.flatnonzero(learned))
    logits = model.decoder.logits(states[:, :-1].flatten(0, 1)[places])
    if adjustment is not None:
        logits = logits + adjustment
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    return losses.mean(), mx.array(targets.size)
