"""An adapter's folder: written whole, read strictly."""

import json
import shutil

import mlx.core as mx
import pytest

from mm1_mlx.adapters import Adapter, AdapterConfig, base_of, load, save
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.hold import Hold

PATH = "decoder.layers.0.self_attn.q_proj"


@pytest.fixture
def kept(keep, folder, tmp_path):
    """A folder that a test may damage."""
    return shutil.copytree(keep(folder)[0], tmp_path / "kept")


def damaged(adapter, **tensors):
    return Adapter(adapter.config, {**adapter.tensors, **tensors}, adapter.base)


def test_it_comes_back_as_it_was(train, folder, tmp_path):
    _, adapter = train(folder, full=["connector"])
    save(tmp_path / "a", adapter)
    back = load(tmp_path / "a")
    assert back.config == adapter.config
    assert back.base == adapter.base == base_of(folder)
    assert back.training == {"steps": 3}
    assert back.tensors.keys() == adapter.tensors.keys()
    assert all(mx.array_equal(back.tensors[k], x) for k, x in adapter.tensors.items())
    assert back.digest == adapter.digest
    assert "connector.stage1.0.conv2.weight" in back.full
    assert back.nbytes == sum(x.nbytes for x in adapter.tensors.values())
    assert sorted(x.name for x in (tmp_path / "a").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]
    assert [x.name for x in tmp_path.iterdir()] == ["a"]


def test_it_replaces_another_only_if_asked_and_never_anything_else(
    train, folder, tmp_path
):
    _, adapter = train(folder)
    save(tmp_path / "a", adapter)
    with pytest.raises(CheckpointError, match=r"already exists; .*pass --overwrite"):
        save(tmp_path / "a", adapter)
    _, other = train(folder, seed=1)
    save(tmp_path / "a", other, overwrite=True)
    assert load(tmp_path / "a").digest == other.digest
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="is no adapter"):
        save(tmp_path / "b", adapter, overwrite=True)


def test_where_another_run_is_at_work_that_is_said(train, folder, tmp_path):
    _, adapter = train(folder)
    held = Hold(tmp_path / "a.mm1-partial")
    with pytest.raises(CheckpointError, match="another run is at work in"):
        save(tmp_path / "a", adapter)
    held.remove()
    save(tmp_path / "a", adapter)


def test_the_digest_tells_weights_scales_and_configs_apart(train, folder):
    _, adapter = train(folder)
    tensors, base = adapter.tensors, adapter.base
    others = [
        Adapter(AdapterConfig(rank=4, scale=1.0), tensors, base),
        Adapter(adapter.config, tensors, base, {PATH: 0.5}),
        damaged(adapter, **{f"{PATH}.lora_b": tensors[f"{PATH}.lora_b"] + 1}),
    ]
    assert len({adapter.digest, *(x.digest for x in others)}) == 4


def test_weights_that_changed_are_refused(kept, train, folder):
    _, other = train(folder, seed=7)
    mx.save_safetensors(str(kept / "adapter.safetensors"), dict(other.tensors))
    with pytest.raises(CheckpointError, match="does not have the sha256"):
        load(kept)


def test_a_file_that_is_cut_off_is_refused(kept):
    weights = kept / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged or cut off"):
        load(kept)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"format_version": 2},
            CheckpointError,
            "format version 2, this program reads",
        ),
        ({"extra": 1}, CheckpointError, "is not an adapter of this program"),
        ({"peft_type": "LORA"}, CheckpointError, "PEFT adapter; .*mm1 adapter import"),
        ({"scales": {PATH: "1"}}, ConfigError, "scale '1' of .* is not a number"),
        ({"scales": {"decoder.x": 1.0}}, CheckpointError, "'decoder.x', which has no"),
        ({"scales": []}, ConfigError, "must be objects"),
        ({"base": {"name": "x"}}, ConfigError, "missing field"),
        ({"adapter": {"rank": 1e9}}, ConfigError, "rank: expected int"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(kept, rewrite, fields, error, message):
    rewrite(kept, **fields)
    with pytest.raises(error, match=message):
        load(kept)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{PATH}.lora_b": mx.full((4, 64), mx.nan)}, "a number that is not finite"),
        ({f"{PATH}.lora_a": mx.zeros((64, 2000))}, r"not within 1\.\.1024"),
        ({f"{PATH}.lora_a": mx.zeros(64)}, r"not within 1\.\.1024"),
        ({"decoder.layers.1.x.lora_b": mx.zeros((4, 4))}, "half of a pair"),
        ({f"{PATH}.lora_b": mx.zeros((4, 64), mx.int32)}, "expected floating point"),
    ],
)
def test_matrices_that_are_none_are_refused(train, folder, tmp_path, tensors, message):
    _, adapter = train(folder)
    save(tmp_path / "a", damaged(adapter, **tensors))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "a")


def test_links_out_of_the_folder_are_not_followed(kept, tmp_path):
    weights = kept / "adapter.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link out of its folder"):
        load(kept)


def test_a_name_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder; give the folder of an"):
        load(tmp_path / "nothing")


def test_it_says_which_model_it_is_of(folder, packed_folder):
    assert base_of(folder).name == "tiny"
    assert base_of(folder).digest != base_of(packed_folder).digest
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]


def test_of_a_repository_two_files_are_fetched(kept, monkeypatch):
    """The hub is played: what is asked of it, and that nothing else is."""
    asked = []

    def fetched(repository, **options):
        asked.append((repository, options["allow_patterns"], options["revision"]))
        return str(kept)

    info = type("Info", (), {"sha": "abc"})
    monkeypatch.setattr("mm1_mlx.hub._ask", lambda _: info)
    monkeypatch.setattr("mm1_mlx.hub.snapshot_download", fetched)
    assert load("owner/pirate").name == "owner/pirate"
    assert asked == [
        ("owner/pirate", ["adapter_config.json", "adapter.safetensors"], "abc")
    ]
