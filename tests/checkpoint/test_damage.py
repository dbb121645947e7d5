"""What was cut, changed or mixed up is refused, and named."""

import json
import random

import mlx.core as mx
import pytest

from mm1_mlx import files
from mm1_mlx.checkpoint import (
    load_config,
    load_model,
    verify_digests,
)
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.files import (
    read_json,
    read_shard,
)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"model folder '.*/none' does not exist"):
        load_model(tmp_path / "none")


def test_a_model_of_another_kind_is_sent_to_convert(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(
        CheckpointError,
        match=r"is a 'llava' model, not 'mm1'; convert it with 'mm1 conv",
    ):
        load_config(tmp_path)


def test_a_model_without_manifest_is_not_finished(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no manifest.json, so it is not a finished model"
    ):
        load_model(folder)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_format_version_is_refused(version, folder, rewrite):
    rewrite(folder / "manifest.json", lambda m: m | {"format_version": version})
    with pytest.raises(
        CheckpointError, match=f"format version {version!r}, this program reads 1"
    ):
        load_model(folder)


@pytest.mark.parametrize("manifest", [[], {}, {"files": []}, {"files": None}, 3])
def test_a_manifest_that_lists_nothing_is_refused(manifest, folder):
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest.json lists no files"):
        load_model(folder)


@pytest.mark.parametrize("record", [None, [], {}, {"bytes": "3"}, {"bytes": -1}])
def test_a_manifest_with_an_unreadable_record_is_refused(record, folder, rewrite):
    rewrite(
        folder / "manifest.json", lambda m: m | {"files": {"tokenizer.json": record}}
    )
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json has 2 bytes, the manifest"
    ):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing, the manifest says"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"NaN,"])
def test_damaged_json_is_named(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=rf"{name} is not valid JSON \(.*\); mend it, or get it again",
    ):
        load_model(folder)


def test_json_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"bytes, more than the 10 allowed"):
        read_json(folder / "config.json")


def test_a_truncated_shard_is_refused_before_it_is_read(folder):
    path = folder / "model.safetensors"
    content, rng = path.read_bytes(), random.Random(0)
    for offset in [0, 1, 7, 8, len(content) - 1, *rng.sample(range(len(content)), 20)]:
        path.write_bytes(content[:offset])
        message = rf"model.safetensors has {offset:,} bytes, the manifest says {len(content):,}"
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)
        # And by its own header, where a manifest was made to agree.
        with pytest.raises(CheckpointError, match="damaged or cut off"):
            read_shard(path)


def test_a_grown_shard_is_refused(folder, record_size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="the manifest says"):
        load_model(folder)
    record_size(folder)
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        load_model(folder)


def test_a_flipped_bit_is_found_by_the_digests(folder):
    path, rng = folder / "model.safetensors", random.Random(0)
    content = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match="does not have the sha256 of the mani"
        ):
            verify_digests(folder)
    path.write_bytes(content)
    assert verify_digests(folder) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"decoder.surprise": mx.zeros(1)},
            r"1 tensor\(s\) unknown, e.g. \['decoder.surprise'\]; config.json and",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "norm1" not in k},
            r"tensor\(s\) missing, e.g. \['connector.stage1.0.norm1.bias'",
        ),
        (
            lambda t: t | {"decoder.norm.weight": mx.zeros((1, 48))},
            r"decoder.norm.weight has shape \[1, 48\], config.json says \[48\]",
        ),
        (
            lambda t: t | {"decoder.norm.weight": mx.zeros(48, mx.int32)},
            r"decoder.norm.weight holds mlx.core.int32, expected floating point",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_named(
    change, message, folder, tiny_model, record_size
):
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), change(tiny_model.tensors()))
    record_size(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_config_and_weights_must_belong_together(folder, make_config, record_size):
    config = make_config(decoder={"num_hidden_layers": 3}).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    record_size(folder, "config.json")
    with pytest.raises(
        CheckpointError, match=r"tensor\(s\) missing, e.g. \['decoder.la"
    ):
        load_model(folder)


def test_a_config_that_is_no_model_is_refused_before_the_weights(folder, rewrite):
    rewrite(
        folder / "config.json", lambda c: c | {"vision": c["vision"] | {"colour": 1}}
    )
    with pytest.raises(
        ConfigError, match=r"VisionConfig: unknown field\(s\) \['colour'"
    ):
        load_model(folder)
