"""Rows behind a shared prefix are what they would be behind one of their own."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.shapes.rows import Behind, Recorder, layer_states
from mm1_mlx.config import DecoderConfig
from mm1_mlx.models.decoder import Decoder

PREFIXES, ROWS, P, T, D = 3, 7, 5, 4, 32
OWNERS = mx.array([0, 0, 1, 2, 2, 2, 1])


@pytest.fixture
def decoder():
    mx.random.seed(0)
    config = DecoderConfig(
        vocab_size=40, hidden_size=D, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
        rope_theta=1e4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return Decoder(config)


def shared(decoder, prefixes, rows):
    caches = [Recorder() for _ in decoder.layers]
    layer_states(decoder, prefixes, caches)
    return layer_states(decoder, rows, [Behind(kept, OWNERS) for kept in caches])


def whole(decoder, prefixes, rows):
    x = mx.concatenate([prefixes[OWNERS], rows], axis=1)
    return [states[:, P:] for states in layer_states(decoder, x)]


def test_states_are_those_of_whole_rows(decoder):
    prefixes = mx.random.normal((PREFIXES, P, D))
    rows = mx.random.normal((ROWS, T, D))
    for ours, expected in zip(
        shared(decoder, prefixes, rows), whole(decoder, prefixes, rows), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-5)
    plain = decoder.norm(layer_states(decoder, rows)[-1])
    np.testing.assert_allclose(
        plain, decoder.hidden(None, input_embeddings=rows), atol=1e-6
    )


def test_gradients_are_those_of_whole_rows(decoder):
    prefixes = mx.random.normal((PREFIXES, P, D))
    rows = mx.random.normal((ROWS, T, D))
    weights = mx.random.normal((ROWS, T, D))
    gradients = [
        nn.value_and_grad(
            decoder, lambda x, way=way: (way(decoder, x, rows)[-1] * weights).sum()
        )(prefixes)[1]
        for way in (shared, whole)
    ]
    found, expected = (dict(tree_flatten(g)) for g in gradients)
    for name, gradient in expected.items():
        scale = max(1e-3, mx.abs(gradient).max().item())
        np.testing.assert_allclose(found[name] / scale, gradient / scale, atol=1e-4)
    by_prefix = [
        mx.grad(lambda x, way=way: (way(decoder, x, rows)[-1] * weights).sum())(
            prefixes
        )
        for way in (shared, whole)
    ]
    np.testing.assert_allclose(*by_prefix, atol=1e-3)
