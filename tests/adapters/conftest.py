"""A tiny model on disk, and adapters of it that have an effect."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mm1_mlx.adapters import Adapter, AdapterConfig, attach, base_of, save
from mm1_mlx.adapters.attach import wrapped
from mm1_mlx.checkpoint import load_model
from mm1_mlx.config import QuantizationConfig
from mm1_mlx.quantize import find_recipe
from mm1_mlx.quantize.pack import pack_deferred
from mm1_mlx.recipe import plan
from mm1_mlx.shard import Deferred
from mm1_mlx.writer import CheckpointWriter

TOKENS = [[5, 9, 44, 7, 130, 261, 12, 3]]
# Widths that groups of 32 divide, so that it can be packed.
WIDE = {
    "decoder": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96},
    "connector": {"output_size": 64},
}


@pytest.fixture(scope="session")
def write_model(make_model):
    """A function: a model in a folder, re-initialised, some of its config changed."""

    def write(folder, packing=None, name="tiny", **changes):
        model = make_model(**(changes or WIDE))
        tensors = [(k, Deferred.of(x)) for k, x in model.tensors().items()]
        config, packed = model.config, {}
        if packing:
            packed = plan(packing, config).packed
            ways = QuantizationConfig.of_modules(packed)
            config = replace(config, quantization=ways)
        source = {"name": name, "licence": "MIT"}
        with CheckpointWriter(folder, config, source, packed=packed) as writer:
            for key, tensor in pack_deferred(tensors, packed):
                writer.add(key, tensor)
        return folder

    return write


@pytest.fixture(scope="session")
def folder(write_model, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="session")
def packed_folder(write_model, tmp_path_factory):
    return write_model(
        tmp_path_factory.mktemp("models") / "packed", find_recipe("4bit")
    )


def _strengthen(model, seed=0):
    """Matrices that were learned, as it were: B is no longer zero."""
    mx.random.seed(seed)
    for layer in wrapped(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=0.3)
        if "m" in layer:
            layer.m = layer.m * mx.random.uniform(0.8, 1.2, layer.m.shape)
    mx.eval(model.parameters())


@pytest.fixture(scope="session")
def strengthen():
    """A function: give a model's matrices an effect."""
    return _strengthen


@pytest.fixture(scope="session")
def tokens():
    return mx.array(TOKENS)


@pytest.fixture(scope="session")
def wide():
    """Changes of the tiny config that make it one that can be packed."""
    return WIDE


@pytest.fixture(scope="session")
def train():
    """A function: a model of a folder with matrices that have an effect, and them."""

    def train(folder, seed=0, full=(), **fields):
        model = load_model(folder, mx.float32)
        model.freeze()
        config = AdapterConfig(**({"rank": 4} | fields))
        attach(model, config, seed)
        _strengthen(model, seed)
        for path in full:
            module = dict(model.named_modules())[path]
            module.unfreeze()
            flat = tree_flatten(module.trainable_parameters())
            module.update(tree_unflatten([(k, x + 0.1) for k, x in flat]))
        return model, Adapter.of(model, config, base_of(folder), {"steps": 3})

    return train


@pytest.fixture(scope="session")
def keep(train, tmp_path_factory):
    """A function: an adapter's folder, and the logits that the trained model gives."""

    def keep(folder, **fields):
        model, adapter = train(folder, **fields)
        out = tmp_path_factory.mktemp("adapters") / "adapter"
        save(out, adapter)
        return out, model(mx.array(TOKENS))

    return keep


@pytest.fixture
def rewrite():
    """A function: change fields of an adapter's adapter_config.json."""

    def rewrite(folder, **fields):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return rewrite
