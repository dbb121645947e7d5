"""The encoder treats tiles alike, and stops at the feature layer."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.config import VisionConfig
from mm1_mlx.models.vision import PatchEmbedding, VisionEncoder

SIZES = {
    "image_size": 20,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
}


@pytest.fixture
def make_encoder(reinitialise):
    return lambda **changes: reinitialise(
        VisionEncoder(VisionConfig(**SIZES | changes))
    )


@pytest.fixture
def tiles():
    return mx.random.normal((5, 20, 20, 3), key=mx.random.key(3))


def test_the_patch_embedding_is_a_convolution(tiles, assert_close):
    embedding = PatchEmbedding(VisionConfig(**SIZES))
    expected = mx.conv2d(tiles, embedding.weight, stride=4).reshape(5, 25, 32)
    assert_close(embedding(tiles), expected, "op")


def test_permuting_tiles_permutes_features(make_encoder, tiles, assert_close):
    encoder, order = make_encoder(), mx.array([3, 0, 4, 1, 2])
    assert_close(encoder(tiles[order]), encoder(tiles)[order])


def test_a_batch_equals_its_tiles_alone(make_encoder, tiles, assert_close):
    encoder = make_encoder()
    alone = mx.concatenate([encoder(tiles[i : i + 1]) for i in range(5)])
    assert_close(encoder(tiles), alone)


def test_different_tiles_have_different_features(make_encoder, tiles):
    features = np.array(make_encoder()(tiles))
    assert np.abs(features[0] - features[1]).max() > 0.1


@pytest.mark.parametrize("layer", [-1, -2, -3, -4])
def test_feature_layer_k_is_the_output_of_the_encoder_with_k_blocks(
    layer, make_encoder, tiles
):
    options = {"apply_post_norm": False}
    encoder = make_encoder(feature_layer=layer, **options)
    depth = 5 + layer
    assert len(encoder.layers) == depth
    shallow = make_encoder(num_hidden_layers=depth, **options)
    deep = make_encoder(**options)
    expected = shallow(tiles)
    assert mx.array_equal(encoder(tiles), expected)
    deep.layers = deep.layers[:depth]
    shallow.update(deep.parameters())
    assert mx.array_equal(shallow(tiles), deep(tiles))


def test_the_class_token_comes_first_and_can_be_kept(make_encoder, tiles):
    kept, dropped = make_encoder(drop_cls=False)(tiles), make_encoder()(tiles)
    assert kept.shape == (5, 26, 32)
    assert mx.array_equal(kept[:, 1:], dropped)


def test_the_final_norm_is_applied_where_the_config_says_so(make_encoder, tiles):
    plain = make_encoder(apply_post_norm=False)
    normed = make_encoder(apply_post_norm=True)
    normed.update(plain.parameters())
    assert "post_layernorm" not in plain
    assert mx.array_equal(normed(tiles), normed.post_layernorm(plain(tiles)))


def test_features_keep_the_raster_order_of_patches(make_encoder, tiles, assert_close):
    encoder = make_encoder()
    embedded = encoder.patch_embedding(tiles)
    # Patch 7 of a 5 x 5 grid: second row, third column.
    patch = tiles[:, 4:8, 8:12].reshape(5, -1)
    expected = patch @ encoder.patch_embedding.weight.reshape(32, -1).T
    assert_close(embedded[:, 7], expected, "op")


@pytest.mark.parametrize("shape", [(1, 24, 20, 3), (1, 20, 20, 1), (1, 22, 22, 3)])
def test_a_tile_that_is_no_square_of_patches_is_an_error(shape, make_encoder):
    with pytest.raises(ValueError, match="multiple of 4"):
        make_encoder()(mx.zeros(shape))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_features_are_nearly_equal_in_half_precision(
    dtype, make_encoder, tiles, assert_close
):
    encoder = make_encoder()
    expected = encoder(tiles)
    encoder.set_dtype(dtype)
    features = encoder(tiles)
    assert features.dtype == dtype
    assert_close(features, expected, str(dtype).removeprefix("mlx.core."))
