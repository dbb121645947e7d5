"""Files made to harm are refused before they can."""

import ast
import json
import random
import shutil
import struct
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from mm1_mlx import checkpoint
from mm1_mlx.checkpoint import (
    load_manifest,
    load_model,
    model_shapes,
)
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import (
    check_shard,
    read_shard,
    safe_join,
)

GGUF = b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + b"\0" * 50
NPY = (
    b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f4', 'shape': (99999999999,)}"
    + b" " * 80
)


@pytest.mark.parametrize(
    "content", [GGUF, NPY, b"PK\x03\x04" + b"\0" * 99, b"", b"\x80\x04."]
)
def test_other_formats_under_our_suffix_are_refused(content, folder, record_size):
    (folder / "model.safetensors").write_bytes(content)
    record_size(folder)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors is damaged or cut off"
    ):
        load_model(folder)


def test_our_format_under_another_suffix_is_not_parsed_by_it(folder, tiny_model):
    for name in ("evil.gguf", "evil.npz", "evil.npy"):
        shutil.copy(folder / "model.safetensors", folder / name)
        tensors = read_shard(folder / name)
        assert mx.array_equal(
            tensors["decoder.norm.weight"], tiny_model.tensors()["decoder.norm.weight"]
        )


NAMES = [
    "", ".", "..", "../x", "../../etc/passwd", "a/../../x", "a/b", "./x", "x/", "/x",
    "/etc/passwd", "//x", "\\x", "..\\x", "a\\b", "C:\\x", "C:x", "C:/x", "\\\\host\\x",
    "//host/share/x", "x\0", "\0", "x\0.json", "x\n", "\nx", "x\ty", "~", "~/x", "x" * 300,
    "e\u0301.json", "..\u2044x", "\u202e.json", "%2e%2e%2fx", "x:stream", "-x", ".hidden",
    " x", "x ", "CON\r", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=map(ascii, NAMES))
def test_names_that_could_reach_outside_are_refused(name, tmp_path):
    root = tmp_path / "model"
    root.mkdir()
    with pytest.raises(CheckpointError, match=r"file name .* is not allowed"):
        safe_join(root, name)
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "a_b+c.1"],
)
def test_plain_names_are_joined(name, tmp_path):
    assert safe_join(tmp_path, name) == tmp_path / name


def test_a_traversal_in_the_manifest_is_refused(folder, rewrite):
    rewrite(
        folder / "manifest.json",
        lambda m: m | {"files": {"../secret": {"bytes": 1, "sha256": ""}}},
    )
    with pytest.raises(CheckpointError, match=r"file name '../secret' is not allowed"):
        load_manifest(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    secret = tmp_path / "secret"
    shutil.move(folder / "tokenizer.json", secret)
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json is a link out of its fol"
    ):
        load_model(folder)


def test_a_link_in_a_circle_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is"):
        load_model(folder)


def test_links_of_a_hub_snapshot_into_its_blobs_are_followed(
    folder, tmp_path, tiny_model, same
):
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert same(load_model(snapshot), tiny_model)


def shard_bytes(entries, data, prefix=b""):
    header = prefix or json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_overlapping_tensors_are_refused_without_memory(tmp_path):
    size = 2**21
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(shard_bytes({f"t{i}": entry for i in range(2000)}, bytes(size)))
    start = time.perf_counter()
    with pytest.raises(
        CheckpointError, match=r"bomb.safetensors is damaged or cut off"
    ):
        read_shard(path)
    assert time.perf_counter() - start < 0.5


GOOD = {
    "__metadata__": {"format": "mlx"},
    "a": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    "b": {"dtype": "F16", "shape": [3], "data_offsets": [32, 38]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [38, 46]},
}
DATA = bytes(range(46))
NUMBERS = [
    -1,
    0,
    1,
    3,
    7,
    31,
    38,
    46,
    47,
    2**31,
    2**32 + 4,
    2**63,
    2**64 - 16,
    1.5,
    None,
    "4",
]
DTYPES = [
    "F64",
    "BF16",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "C64",
    "F4",
    "X",
    "",
    None,
    3,
]


def mutate_header(rng):
    """A damaged shard's bytes: one of several kinds of damage."""
    entries = json.loads(json.dumps(GOOD))
    entry = entries[rng.choice("abc")]
    data, kind = DATA, rng.randrange(10)
    if kind == 0:
        entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
    elif kind == 1:
        entry["data_offsets"] = [
            rng.choice(NUMBERS) for _ in range(rng.choice([1, 2, 2, 3]))
        ]
    elif kind == 2:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 3:
        del entry[rng.choice(list(entry))]
    elif kind == 4:
        entries["__metadata__"] = rng.choice([[], 3, {"a": 1}, {"a": {}}, None, {}])
    elif kind == 5:
        data = rng.choice([DATA + b"\0", DATA[:-1], b"", DATA * 3])
    elif kind == 6:
        text = json.dumps(entries)
        twice = text[:-1] + ', "a": ' + json.dumps(entries["a"]) + "}"
        return shard_bytes(None, data, twice.encode())
    elif kind == 7:
        header = bytearray(json.dumps(entries).encode())
        for _ in range(rng.randint(1, 3)):
            header[rng.randrange(len(header))] = rng.randrange(256)
        return shard_bytes(None, data, bytes(header))
    elif kind == 8:
        good = shard_bytes(entries, data)
        return (
            struct.pack("<Q", rng.choice([0, 1, 10**8 + 1, 2**63, 2**64 - 1]))
            + good[8:]
        )
    else:
        entries[rng.choice(["a", "\ud800", "x" * 999])] = entries.pop("b")
    return shard_bytes(entries, data)


def accepted_by_rust(path):
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except SafetensorError:
        return None


def test_mutated_headers_are_refused_or_safe(tmp_path):
    rng, path = random.Random(0), tmp_path / "mutated.safetensors"
    refused = 0
    for _ in range(200):
        path.write_bytes(mutate_header(rng))
        start = time.perf_counter()
        tensors, message = None, ""
        try:
            tensors = read_shard(path)
        except CheckpointError as error:
            message = str(error)
        if tensors is None:
            refused += 1
            assert "mutated.safetensors" in message
            assert "\n" not in message
        else:
            mx.eval(tensors)
            assert accepted_by_rust(path) == set(tensors)
            assert sum(x.nbytes for x in tensors.values()) <= path.stat().st_size
        assert time.perf_counter() - start < 1
    assert 120 < refused < 200


def test_shapes_are_known_without_the_weights(tiny_config, tiny_model):
    shapes = model_shapes(tiny_config)
    assert shapes == {k: v.shape for k, v in tiny_model.tensors().items()}


def test_the_tensors_of_a_shard_are_those_that_were_saved(tmp_path):
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"x": mx.array(expected)})
    assert check_shard(tmp_path / "x.safetensors") == {"x": (2, 3)}
    assert np.array_equal(read_shard(tmp_path / "x.safetensors")["x"], expected)
    with pytest.raises(CheckpointError, match=r"y.safetensors does not exist"):
        check_shard(tmp_path / "y.safetensors")


def test_nothing_in_the_runtime_unpickles():
    for path in Path(checkpoint.__file__).parent.rglob("*.py"):
        imported = {
            name.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [
                getattr(node, "module", None) or "",
                *(a.name for a in node.names),
            ]
        }
        assert not imported & {"pickle", "torch", "marshal", "shelve", "dill", "joblib"}
