"""The training loss: cross-entropy of the assistant's tokens."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mm1_mlx.models import MM1
from mm1_mlx.train.sample import Batch


def next_token_loss(model: MM1, batch: Batch) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy (nats) over the learned tokens, and their number."""
    return answer_loss(model, batch, model.encode(batch.tiles))


def answer_loss(
    model: MM1, batch: Batch, image_tokens: Sequence[mx.array]
) -> tuple[mx.array, mx.array]:
    """``next_token_loss`` for pictures that are encoded already.

    Right padding needs no mask: causal attention never looks at what follows.
    """
    tokens = mx.array(batch.tokens)
    B, T = tokens.shape
    embeddings = model.embed(tokens.flatten(), image_tokens, batch.spans)
    logits = model(tokens, input_embeddings=embeddings.reshape(B, T, -1))
    losses = nn.losses.cross_entropy(logits[:, :-1].astype(mx.float32), tokens[:, 1:])
    learned = mx.array(batch.learned)[:, 1:]
    count = learned.sum()
    return (losses * learned).sum() / mx.maximum(count, 1), count
