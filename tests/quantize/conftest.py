"""A small model on disk that answers about pictures, and one with experts."""

import pytest

from mm1_mlx.config import MM1Config
from mm1_mlx.models import MM1
from mm1_mlx.writer import CheckpointWriter

# Widths that groups of 64 and 32 divide.
DECODER = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 8}
SPARSE = DECODER | {
    "moe": {"num_experts": 4, "experts_per_token": 2, "every": 2, "offset": 1}
}


@pytest.fixture(scope="session")
def write_model(make_config, reinitialise, byte_folder):
    """A function: the folder of a small model, re-initialised."""

    def write(out, dtype=None, **changes):
        connector = {"output_size": 128}
        config = make_config(**({"decoder": DECODER, "connector": connector} | changes))
        assert isinstance(config, MM1Config)
        model = reinitialise(MM1(config))
        with CheckpointWriter(out, config, {"format": "test"}) as writer:
            for name, tensor in model.tensors().items():
                writer.add(name, tensor.astype(dtype) if dtype else tensor)
            for path in byte_folder.glob("tokenizer*"):
                writer.add_file(path.name, path)
        return out

    return write


@pytest.fixture(scope="session")
def dense(write_model, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def sparse(write_model, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "sparse", decoder=SPARSE)
