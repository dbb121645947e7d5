"""Model folders, and ways to change them."""

import json

import mlx.core as mx
import pytest

from mm1_mlx.writer import CheckpointWriter


@pytest.fixture(scope="session")
def write():
    """A function: the folder of a model, or of other tensors under its config."""

    def write(out, model, tensors=None, **options):
        with CheckpointWriter(
            out, model.config, {"format": "test"}, **options
        ) as writer:
            for name, tensor in (tensors or model.tensors()).items():
                writer.add(name, tensor)
            writer.add_file("tokenizer.json", b"{}")
        return out

    return write


@pytest.fixture
def folder(tmp_path, tiny_model, write):
    return write(tmp_path / "model", tiny_model)


@pytest.fixture(scope="session")
def same():
    """A function: whether two models are bit-equal."""

    def same(model, expected):
        left, right = model.tensors(), expected.tensors()
        assert left.keys() == right.keys()
        return all(
            left[k].dtype == right[k].dtype and mx.array_equal(left[k], right[k])
            for k in left
        )

    return same


@pytest.fixture(scope="session")
def rewrite():
    """A function: replace a JSON file by what ``change`` makes of its content."""

    def rewrite(path, change):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return rewrite


@pytest.fixture(scope="session")
def record_size(rewrite):
    """A function: make the manifest agree with a file's new size."""

    def record_size(folder, name="model.safetensors"):
        def change(manifest):
            manifest["files"][name]["bytes"] = (folder / name).stat().st_size
            return manifest

        rewrite(folder / "manifest.json", change)

    return record_size
