"""Exports of the embedded model and of small ones with any tokenizer."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest

# Modules beside this one.
sys.path.insert(0, str(Path(__file__).parent))

from mm1_mlx.config import MM1Config
from mm1_mlx.mlxfn import export
from mm1_mlx.models import MM1
from mm1_mlx.quantize import quantize
from mm1_mlx.recipe import find_recipe
from mm1_mlx.runtime import TINY, load
from mm1_mlx.writer import CheckpointWriter

# Functions run on the stream of the thread that first uses mlx: before any test, this one.
mx.eval(mx.zeros(1))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The embedded model's functions, in float32."""
    out = tmp_path_factory.mktemp("mlxfn") / "tiny"
    export(TINY, out, prefill=(8, 32))
    return out


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """The embedded model in 4 bits."""
    out = tmp_path_factory.mktemp("packed") / "tiny"
    quantize(TINY, out, find_recipe("4bit"), measured=False)
    return out


@pytest.fixture(scope="session")
def packed_exported(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("mlxfn") / "packed"
    export(packed, out, prefill=(8, 32))
    return out


@pytest.fixture(scope="session")
def tiny():
    with load(TINY) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def write_model(make_config, reinitialise, byte_folder):
    """A function: the folder of a small model with a tokenizer, re-initialised."""

    def write(out, tokenizer=byte_folder, connector_fields=None, **changes):
        sections = make_config(**changes).to_dict()
        if connector_fields:
            sections["connector"] = connector_fields
        config = MM1Config.from_dict(sections)
        with CheckpointWriter(out, config, {"format": "test"}) as writer:
            for name, tensor in reinitialise(MM1(config)).tensors().items():
                writer.add(name, tensor)
            for path in tokenizer.iterdir():
                writer.add_file(path.name, path)
        return out

    return write
