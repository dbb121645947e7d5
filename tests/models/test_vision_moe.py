"""Experts of an encoder are chosen once per image, and equal a loop over images."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mm1_mlx.config import VisionConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.block import MLP, SparseMLP
from mm1_mlx.models.vision import VisionEncoder

SIZES = {
    "image_size": 20,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
}
MOE = {"num_experts": 4, "experts_per_image": 2, "num_sparse_layers": 2}


def config(moe=MOE, **changes):
    return VisionConfig.from_dict(SIZES | changes | {"moe": moe})


@pytest.fixture
def tiles():
    return mx.random.normal((6, 20, 20, 3), key=mx.random.key(3))


@pytest.fixture
def states():
    return mx.random.normal((6, 26, 32), key=mx.random.key(4))


def expert(sparse, index, dense_config):
    """One expert as a dense MLP."""
    dense = MLP(dense_config)
    names = [name for name in ("fc1", "fc2", "fc3") if name in sparse]
    dense.load_weights(
        [
            (f"{name}.{leaf}", sparse[name][leaf][index])
            for name in names
            for leaf in sparse[name]
        ]
    )
    return dense


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("router_input", ["mean", "class_token"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_batch_equals_a_loop_over_images_and_their_experts(
    k, normed, router_input, gated, states, reinitialise, assert_close
):
    moe = MOE | {"experts_per_image": k, "norm_topk_prob": normed}
    values = config(moe | {"router_input": router_input}, gated_mlp=gated)
    sparse = reinitialise(SparseMLP(values, values.moe))
    router = np.array(sparse.router.weight)
    results, used = [], set()
    for image in np.array(states):
        pooled = image.mean(axis=0) if router_input == "mean" else image[0]
        scores = router @ pooled
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        chosen = np.argsort(-probabilities)[:k]
        used |= set(chosen.tolist())
        weights = probabilities[chosen]
        weights = weights / weights.sum() if normed else weights
        outputs = [np.array(expert(sparse, i, values)(mx.array(image))) for i in chosen]
        results.append(sum(w * y for w, y in zip(weights, outputs, strict=True)))
    # Else a router that always takes the same ones would pass.
    assert len(used) > 1
    assert_close(sparse(states), np.stack(results))


def test_equal_experts_are_the_dense_block(tiles, reinitialise, assert_close):
    dense = reinitialise(VisionEncoder(config(None)))
    sparse = reinitialise(VisionEncoder(config(MOE | {"norm_topk_prob": True})), 1)
    weights = dict(tree_flatten(dense.parameters()))
    copies = {}
    for name, tensor in tree_flatten(sparse.parameters()):
        if ".router." in name:
            copies[name] = tensor
        elif name in weights and weights[name].shape == tensor.shape:
            copies[name] = weights[name]
        else:
            copies[name] = mx.repeat(weights[name][None], 4, axis=0)
    sparse.load_weights(list(copies.items()))
    assert_close(sparse(tiles), dense(tiles))


def test_the_last_blocks_are_sparse(reinitialise, tiles):
    encoder = reinitialise(VisionEncoder(config()))
    kinds = [type(layer.mlp) for layer in encoder.layers]
    assert kinds == [MLP, MLP, SparseMLP, SparseMLP]
    # Counted from the whole tower's end, which the feature layer may cut off.
    shallow = VisionEncoder(config(feature_layer=-2, apply_post_norm=False))
    assert [type(layer.mlp) for layer in shallow.layers] == [MLP, MLP, SparseMLP]
    assert encoder(tiles).shape == (6, 25, 32)


def test_all_places_of_an_image_pass_the_same_experts(reinitialise, states):
    values = config()
    sparse = reinitialise(SparseMLP(values, values.moe))
    experts, weights = sparse.route(states)
    assert experts.shape == weights.shape == (6, 2)
    order = mx.array(np.random.default_rng(0).permutation(26))
    # Where the router reads the mean, the places' order changes nothing.
    shuffled = sparse(states[:, order])
    assert mx.allclose(shuffled, sparse(states)[:, order], atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_runs_and_compiles_on_the_cpu(
    dtype, gated, reinitialise, states, assert_close
):
    # All experts, so that rounding cannot choose others.
    values = config(MOE | {"experts_per_image": 4}, gated_mlp=gated)
    sparse = reinitialise(SparseMLP(values, values.moe))
    expected = sparse(states)
    sparse.set_dtype(dtype)
    for call in (sparse, mx.compile(sparse)):
        result = call(states.astype(dtype))
        assert result.dtype == dtype
        assert_close(result, expected, str(dtype).removeprefix("mlx.core."))


@pytest.mark.parametrize("router_input", ["mean", "class_token"])
def test_a_router_reads_half_precision_in_float32(router_input, reinitialise, states):
    values = config(MOE | {"router_input": router_input})
    sparse = reinitialise(SparseMLP(values, values.moe))
    sparse.set_dtype(mx.bfloat16)
    rounded = states.astype(mx.bfloat16)
    _, weights = sparse.route(rounded)
    # The same numbers, in float32 from the start.
    sparse.set_dtype(mx.float32)
    _, expected = sparse.route(rounded.astype(mx.float32))
    assert mx.array_equal(weights, expected)


def test_no_more_blocks_are_sparse_than_there_are():
    assert all(map(config(MOE | {"num_sparse_layers": 4}).is_sparse, range(4)))
    message = "moe.num_sparse_layers: 5 is above the 4 num_hidden_layers"
    with pytest.raises(ConfigError, match=message):
        config(MOE | {"num_sparse_layers": 5})


def test_a_router_needs_what_it_reads():
    moe = MOE | {"router_input": "class_token"}
    with pytest.raises(ConfigError, match="no class token for the router to read"):
        config(moe, class_token=False)
    with pytest.raises(ConfigError, match="experts_per_image: 5 is outside"):
        config(MOE | {"experts_per_image": 5})
