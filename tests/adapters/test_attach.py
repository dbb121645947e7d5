"""Low-rank matrices beside layers: where, how they begin, what they leave alone."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mm1_mlx.adapters import AdapterConfig, attach, tensors_of
from mm1_mlx.adapters.attach import wrapped
from mm1_mlx.checkpoint import load_model
from mm1_mlx.config import Packing
from mm1_mlx.errors import ConfigError
from mm1_mlx.models.linear import named_leaves, pack, packed_ways

MOE = {"num_experts": 4, "experts_per_token": 2, "every": 1, "offset": 0}
BLOCK = [f"self_attn.{x}_proj" for x in "qkvo"] + [
    f"mlp.{x}_proj" for x in ("gate", "up", "down")
]


@pytest.fixture
def model(make_model):
    return make_model()


def names(paths):
    return sorted(path.removeprefix("decoder.layers.") for path in paths)


def test_by_default_every_linear_layer_of_the_decoders_blocks_has_some(model):
    expected = sorted(f"{i}.{leaf}" for i in (0, 1) for leaf in BLOCK)
    assert names(attach(model, AdapterConfig())) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layers": 1}, [f"1.{leaf}" for leaf in sorted(BLOCK)]),
        ({"where": ("decoder.mlp",), "layers": 1},
         ["1.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]),
        ({"where": (r"decoder\.layers\.0\..*\.q_proj",)}, ["0.self_attn.q_proj"]),
        ({"where": ("head",)}, ["decoder.embed_tokens", "decoder.lm_head"]),
        ({"where": ("vision.mlp",), "layers": 1},
         ["vision.layers.1.mlp.fc1", "vision.layers.1.mlp.fc2"]),
    ],
)  # fmt: skip
def test_where_names_places_and_layers_the_last_blocks(model, fields, expected):
    assert names(attach(model, AdapterConfig(**fields))) == expected


def test_the_router_has_none_and_experts_have_their_own(make_model):
    model = make_model(decoder={"moe": MOE})
    paths = attach(model, AdapterConfig(rank=3))
    assert not [path for path in paths if path.endswith("gate")]
    up = wrapped(model)["decoder.layers.0.mlp.switch_mlp.up_proj"]
    assert up.lora_a.shape == (4, 3, 48)
    assert up.lora_b.shape == (4, 64, 3)


def test_convolutions_of_the_connector_stay_what_they_are(model):
    paths = attach(model, AdapterConfig(where=("connector",)))
    assert "connector.stage1.0.conv1" in paths
    assert "connector.stage1.0.conv2" not in paths
    assert "connector.readout.0" in paths


@pytest.mark.parametrize("where", ["decoder", "vision", "head"])
def test_nothing_changes_at_the_beginning(model, where, tokens):
    pixels = mx.random.normal((1, 16, 16, 3))
    logits, features = model(tokens), model.vision(pixels)
    mx.eval(logits, features)
    attach(model, AdapterConfig(where=(where,)))
    assert mx.array_equal(model(tokens), logits)
    assert mx.array_equal(model.vision(pixels), features)


def test_of_experts_and_dora_nothing_changes_but_the_order_of_sums(
    make_model, assert_close, tokens
):
    model = make_model(decoder={"moe": MOE})
    logits = model(tokens)
    attach(model, AdapterConfig())
    assert_close(model(tokens), logits, "op")
    model = make_model(decoder={"qkv_bias": True})
    logits = model(tokens)
    attach(model, AdapterConfig(kind="dora"))
    assert_close(model(tokens), logits, "op")


def test_a_beginning_depends_on_seed_and_path_alone(make_model):
    every = wrapped_after(make_model(), AdapterConfig(), seed=3)
    mx.random.seed(99)
    few = wrapped_after(make_model(), AdapterConfig(where=("decoder.mlp",)), seed=3)
    other = wrapped_after(make_model(), AdapterConfig(), seed=4)
    for path, layer in few.items():
        assert mx.array_equal(layer.lora_a, every[path].lora_a)
        assert not mx.array_equal(layer.lora_a, other[path].lora_a)
    first, second = (every[f"decoder.layers.{i}.mlp.up_proj"].lora_a for i in (0, 1))
    assert not mx.array_equal(first, second)
    bound = np.abs(np.array(first)).max()
    assert 0.9 * 48**-0.5 < bound <= 48**-0.5


def wrapped_after(model, config, seed):
    attach(model, config, seed)
    return wrapped(model)


def test_what_has_matrices_is_frozen_and_the_rest_as_it_was(model):
    model.freeze()
    model.connector.unfreeze()
    attach(model, AdapterConfig(rank=2))
    found = set(tensors_of(model))
    assert "decoder.layers.0.self_attn.q_proj.lora_a" in found
    assert "connector.readout.0.weight" in found
    assert not {n for n in found if n.startswith("decoder.") and "lora_" not in n}
    assert not {n for n in found if n.startswith("vision.")}


@pytest.mark.parametrize(
    ("bits", "mode"), [(4, "affine"), (3, "affine"), (6, "affine"), (8, "mxfp8")]
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_packed_layers_can_have_some_and_only_these_learn(
    make_model, assert_close, bits, mode, kind, tokens, strengthen
):
    model = make_model(
        decoder={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
        connector={"output_size": 64},
    )
    way = Packing(group_size=32, bits=bits, mode=mode)
    mlp = model.decoder.layers[0].mlp
    mlp.up_proj = pack(mlp.up_proj, way)
    logits = model(tokens)
    model.freeze()
    path = "decoder.layers.0.mlp.up_proj"
    attach(model, AdapterConfig(kind=kind, where=(path,)))
    # mxfp8 gives bfloat16, which DoRA multiplies in.
    assert_close(model(tokens), logits, "bfloat16" if mode == "mxfp8" else "op")
    assert packed_ways(model) == {path: way}

    def loss(parameters):
        model.update(parameters)
        return (model(tokens) ** 2).mean()

    strengthen(model, 0)
    gradients = mx.grad(loss)(model.trainable_parameters())
    flat = dict(tree_flatten(gradients))
    leaves = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    assert {name.rpartition(".")[2] for name in flat} == leaves
    assert all(mx.abs(x).max().item() > 0 for x in flat.values())


def test_gradients_are_those_of_the_formula(model, assert_close, strengthen):
    """Against the layer written out: y = W x + b + scale (x A) B."""
    path = "vision.layers.0.mlp.fc1"
    attach(model, AdapterConfig(where=(path,), rank=3, scale=1.5))
    strengthen(model, 0)
    layer = wrapped(model)[path]
    x = mx.random.normal((5, 32))
    weight, bias = layer.linear.weight, layer.linear.bias

    def plain(a, b):
        return ((x @ (weight.T + 1.5 * (a @ b)) + bias) ** 2).sum()

    def ours(a, b):
        layer.lora_a, layer.lora_b = a, b
        return (layer(x) ** 2).sum()

    a, b = layer.lora_a, layer.lora_b
    expected = mx.grad(plain, (0, 1))(a, b)
    for one, other in zip(mx.grad(ours, (0, 1))(a, b), expected, strict=True):
        assert_close(one, other, "op")


def test_dropout_acts_in_training_alone(model, tokens, strengthen):
    attach(model, AdapterConfig(dropout=0.5))
    strengthen(model, 0)
    assert mx.array_equal(model(tokens), model(tokens))
    model.train()
    assert not mx.array_equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"AdapterConfig.rank: 0 is outside 1..1024"),
        ({"scale": 0.0}, "AdapterConfig.scale: 0.0 is 0 or beyond"),
        ({"dropout": 1.0}, "AdapterConfig.dropout: 1.0 is not a share"),
        ({"where": ()}, "AdapterConfig.where: names no place"),
        ({"where": ("decodr",)}, "'decodr' is not one of .*'decoder.mlp'"),
        ({"where": ("(",)}, r"'\(' cannot be read"),
        ({"where": ("a.b" * 100,)}, "longer than 200"),
    ],
)
def test_a_config_that_says_nothing_sensible_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**fields)


def test_what_cannot_have_matrices_is_refused(make_model, model):
    with pytest.raises(ConfigError, match="names no layer of the model"):
        attach(model, AdapterConfig(where=(r"decoder\.layers\.7\..*",)))
    sparse = make_model(decoder={"moe": MOE})
    with pytest.raises(
        ConfigError, match=r"not for experts; .*--adapter-targets decoder\.attention"
    ):
        attach(sparse, AdapterConfig(kind="dora"))


def test_every_layer_of_every_part_can_be_named(model, tokens):
    linear = [p for p, x in named_leaves(model) if type(x).__name__ == "Linear"]
    paths = attach(model, AdapterConfig(where=(r"[\w.]+\.\w+",)))
    assert set(linear) < set(paths)
    mx.eval(model(tokens))


def test_a_model_read_from_disk_takes_them(folder, tokens):
    model = load_model(folder, mx.float32)
    logits = model(tokens)
    attach(model, AdapterConfig())
    assert mx.array_equal(model(tokens), logits)
