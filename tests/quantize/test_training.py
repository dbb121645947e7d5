"""Gradients pass through a packed base: to a connector, and to LoRA on packed layers."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import named_leaves
from mm1_mlx.prompt import Prompt
from mm1_mlx.quantize import find_recipe, quantize
from mm1_mlx.quantize.calibration import examples
from mm1_mlx.quantize.cost import Sample, predict
from mm1_mlx.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(dense, out, find_recipe("4bit"), measured=False)
    return out


def unpacked(model):
    """The twin whose weights are what the packed ones stand for."""
    twin = MM1(model.config)
    weights = dict(model.tensors())
    for path, layer in named_leaves(model):
        if "scales" in layer:
            parts = [weights.pop(f"{path}.{x}") for x in ("weight", "scales", "biases")]
            dense = mx.dequantize(*parts, layer.group_size, layer.bits)
            weights[f"{path}.weight"] = dense
    twin.load_weights(list(weights.items()))
    return twin.eval()


def sample_of(folder):
    config = load_config(folder)
    tokenizer = load_tokenizer(folder, config.prompt)
    example = examples(None, 4, sees=True)[1][0]
    prompt = Prompt.build(example.prompt, example.pictures, config, tokenizer)
    return Sample(prompt, (7, 9, 11, 13))


def connector_gradients(model, sample):
    model.freeze()
    model.connector.unfreeze()

    def loss(model):
        targets = mx.array(sample.answer)
        return nn.losses.cross_entropy(predict(model, sample), targets).mean()

    value, gradients = nn.value_and_grad(model, loss)(model)
    return value, dict(tree_flatten(gradients))


def test_a_connector_learns_through_packed_layers(packed, assert_close):
    model = load_model(packed)
    sample = sample_of(packed)
    value, gradients = connector_gradients(model, sample)
    expected, twins = connector_gradients(unpacked(model), sample)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert set(gradients) == set(twins)
    assert all(name.startswith("connector.") for name in gradients)
    for name, gradient in gradients.items():
        assert_close(gradient, twins[name])


def test_lora_learns_on_packed_layers(packed):
    model = load_model(packed)
    sample = sample_of(packed)
    before = predict(model, sample)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    assert mx.allclose(predict(model, sample), before, atol=1e-5)
    names = dict(tree_flatten(model.trainable_parameters()))
    assert names
    assert all("lora" in name for name in names)

    def loss(model):
        targets = mx.array(sample.answer)
        return nn.losses.cross_entropy(predict(model, sample), targets).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    norms = {n: float(x.square().sum()) for n, x in tree_flatten(gradients)}
    assert all(norms[name] > 0 for name in norms if name.endswith("lora_b"))
    assert isinstance(model.decoder.layers[-1].self_attn.q_proj, LoRALinear)
