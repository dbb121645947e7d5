"""Sources that cannot be had, read or trusted are refused in one sentence."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
import sources
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.numpy import save_file

from mm1_mlx import hub, writer
from mm1_mlx.checkpoint import load_model
from mm1_mlx.convert import SourceInfo, convert, describe
from mm1_mlx.convert.shards import scratch, unpickle, weight_files
from mm1_mlx.convert.source import Source
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.hold import Hold
from mm1_mlx.hub import model_type


def refuse(message: str, folder: Path, out: Path) -> None:
    """Assert that converting the folder fails so, and leaves nothing."""
    with pytest.raises(CheckpointError, match=message):
        convert(str(folder), out)
    assert not list(out.parent.glob(f"{out.name}*"))


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(
        CheckpointError, match=r"'\./nope' is neither a folder nor a hub"
    ):
        Source("./nope")


def test_a_file_is_not_a_source(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        CheckpointError, match="is a file; give the folder of a safetensors"
    ):
        Source(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("file", "kind"), [("m.gguf", "GGUF"), ("weights.npz", "NumPy")]
)
def test_folders_of_other_formats_are_named(
    file: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / file).touch()
    refuse(f"no config.json but {kind} files", tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "config.json").write_text(json.dumps(sources.LLAMA))
    refuse(
        f"no safetensors weights but {kind} files", tmp_path / "in", tmp_path / "out"
    )


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    refuse("has no config.json; give the folder of", tmp_path / "in", tmp_path / "out")


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    folder = sources.write(tmp_path / "in", ["llama"], {})
    refuse("config.json is not a JSON object", folder, tmp_path / "out")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = sources.llama(tmp_path / "in") / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(
        r"model.safetensors is damaged or cut off", tmp_path / "in", tmp_path / "out"
    )


def test_weights_that_mlx_cannot_hold_are_named(tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in")
    tensors = {n: np.zeros(x.shape) for n, x in sources.llama_tensors().items()}
    save_file(tensors, folder / "model.safetensors")
    refuse("cannot be read: .*unsupported dtype F64", folder, tmp_path / "out")


def test_quantized_weights_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    tensors = sources.llama_tensors()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(mx.uint8)
    folder = sources.write(tmp_path / "in", sources.LLAMA, tensors)
    refuse("'lm_head.weight' holds mlx.core.uint8", folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "a\\b", "a\0b"])
def test_an_index_cannot_reach_out_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in")
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse("file name .* is not allowed", folder, tmp_path / "out")


def test_a_shard_cannot_be_a_link_out_of_its_folder(tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refuse("is a link out of its folder", folder, tmp_path / "out")


@pytest.mark.parametrize("content", [[], {"weight_map": {"a": 1}}, {}])
def test_an_index_without_a_map_of_names_is_refused(
    content: Any, tmp_path: Path
) -> None:
    folder = sources.llama(tmp_path / "in")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    refuse("has no weight_map of file names", folder, tmp_path / "out")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in")
    index = {"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse("lacks 1 of 2 weight files, e.g. .*'gone", folder, tmp_path / "out")


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    refuse("chat_template.jinja is not UTF-8 text, as", folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [("attention_bias", "no"), ("mlp_bias", 1), ("tie_word_embeddings", [])],
)
def test_a_switch_is_true_or_false(field: str, value: Any, tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in", **{field: value})
    with pytest.raises(ConfigError, match=f"{field}: expected true or false, got "):
        convert(str(folder), tmp_path / "out")


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    refuse("tensor 'lm_head.weight' is there twice", folder, tmp_path / "out")


def test_a_second_consolidated_copy_is_left_alone(tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "x.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == ["x.safetensors"]


def test_training_state_is_no_weight_file(tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.bin", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == ["pytorch_model.bin"]


class Bomb:
    """A pickle of this writes a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.reference
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder, marker = sources.llama(tmp_path / "in"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    bomb = {"a": Bomb(marker)}
    torch.save(bomb, folder / "pytorch_model.bin")
    refuse("it wants to run code or is damaged", folder, tmp_path / "out")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))
    refuse("it wants to run code or is damaged", folder, tmp_path / "out")
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists(), "the bomb itself works"


@pytest.mark.reference
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_both_kinds_give_their_tensors(zipped: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a": shared, "b": shared, "c": shared.T, "d": shared.bfloat16()}
    path = tmp_path / "x.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    (tmp_path / "out").mkdir()
    [shard] = unpickle([path], tmp_path / "out")
    made = mx.load(str(shard), format="safetensors")
    assert isinstance(made, dict)
    assert made["b"].tolist() == shared.tolist()
    assert made["c"].tolist() == shared.T.tolist()
    assert made["d"].dtype == mx.bfloat16


@pytest.mark.reference
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "is not a dict of tensors"),
        (b"PK\3\4 no zip", "is damaged .*not a ZIP archive.; get it"),
    ],
)
def test_pickles_of_other_things_are_refused(
    content: Any, message: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        unpickle([path], tmp_path)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_pickles_are_named_however_torch_stumbles(
    zipped: bool, tmp_path: Path
) -> None:
    """In this process: a child for each would take minutes."""
    torch = pytest.importorskip("torch")
    from mm1_mlx.convert import torch_bin

    path = tmp_path / "pytorch_model.bin"
    tensors = {f"layer.{i}": torch.ones(3, 4) for i in range(4)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            torch_bin._load(torch, str(path))
        except SystemExit as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(str(path) in line and "\n" not in line for line in refused)


@pytest.mark.reference
def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(
        CheckpointError,
        match=r"/gone cannot be written .*needs room there, name an OUT",
    ):
        unpickle([path], tmp_path / "gone")


@pytest.mark.reference
def test_pickles_are_unpacked_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's place for temporary files is often memory."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    folder, out = sources.llama(tmp_path / "in"), tmp_path / "new" / "out"
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    state = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    def look(*_: int) -> None:
        names = sorted(x.name.rpartition("-")[0] for x in out.parent.iterdir())
        raise CheckpointError(f"beside it are {names}")

    with pytest.raises(CheckpointError, match=r"\['out\.mm1', 'out\.mm1-unpacked'\]"):
        convert(str(folder), out, progress=look)
    assert not out.parent.exists()
    convert(str(folder), out)
    assert [x.name for x in out.parent.iterdir()] == ["out"]
    assert len(load_model(out).tensors()) == len(tensors)


def test_room_to_unpack_is_asked_for_and_what_killed_runs_unpacked_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    left = tmp_path / "out.mm1-unpacked-1a2b"
    left.mkdir()
    (left / "shard-00001.safetensors").write_bytes(b"half")
    held = Hold(tmp_path / "out.mm1-unpacked-3c4d")
    monkeypatch.setattr(
        writer.shutil, "disk_usage", lambda _: SimpleNamespace(free=999)
    )
    with (
        pytest.raises(CheckpointError, match=r"out' needs 0\.0 MB"),
        scratch(out, 1000),
    ):
        pass
    with scratch(out, 999) as folder:
        (folder / "file").write_bytes(b"")
        assert {*tmp_path.iterdir()} == {folder, held.folder}
    assert [*tmp_path.iterdir()] == [held.folder]


def test_a_file_is_no_folder_to_work_in(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(
        CheckpointError, match="out' is a file; give the name of a fold"
    ):
        Hold(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_torch_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    folder = sources.llama(tmp_path / "in")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(r'run pip install "mm1-mlx\[torch\]"', folder, tmp_path / "out")


def test_a_torch_in_the_current_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "torch.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    folder = sources.llama(tmp_path / "in")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse("pytorch_model.bin", folder, tmp_path / "out")
    assert not marker.exists()


def test_a_local_source_is_described(tmp_path: Path) -> None:
    folder = sources.llama(tmp_path / "in")
    size = (folder / "model.safetensors").stat().st_size
    assert describe(str(folder)) == SourceInfo(str(folder), size, None)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nHi")
    assert describe(str(folder)).licence == "apache-2.0"


def repository(*files: str, **fields: Any) -> ModelInfo:
    siblings = [{"rfilename": name, "size": 1000} for name in files]
    return ModelInfo(id="a/b", sha="1" * 40, siblings=siblings, tags=[], **fields)


def test_a_repository_is_described_by_its_weights_and_card(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = repository(
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "pytorch_model.bin",
        cardData={"license": "mit"},
    )
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    assert describe("a/b") == SourceInfo("a/b", 2000, "mit")


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (
            ("config.json", "m.safetensors", "pytorch_model.bin", "x.py"),
            "m.safetensors",
        ),
        (
            ("config.json", "pytorch_model.bin", "training_args.bin"),
            "pytorch_model.bin",
        ),
        (
            ("config.json", "pytorch_model.bin", "open_clip_model.safetensors"),
            "pytorch_model.bin",
        ),
    ],
)
def test_only_what_conversion_reads_is_downloaded(
    files: tuple[str, ...],
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot(_: str, **options: Any) -> str:
        calls.append(options)
        return str(tmp_path)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: repository(*files))
    monkeypatch.setattr("mm1_mlx.hub.snapshot_download", snapshot)
    source = Source("a/b")
    assert source.folder == tmp_path
    with pytest.raises(CheckpointError, match="has no safetensors weights"):
        source.tensors  # noqa: B018
    fetched = [
        set(
            huggingface_hub.utils.filter_repo_objects(
                [*files, "deep/config.json"],
                allow_patterns=call["allow_patterns"],
                ignore_patterns=call["ignore_patterns"],
            )
        )
        for call in calls
    ]
    # The config first, so that it can be refused before the weights are fetched.
    assert fetched == [{"config.json"}, {"config.json", weights}]
    assert calls[1]["revision"] == "1" * 40


def test_nothing_large_is_downloaded_for_what_is_refused_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = sources.clip(tmp_path / "small")
    (small / "model.safetensors").unlink()
    monkeypatch.setattr("mm1_mlx.hub.download_small", lambda *_: small)
    monkeypatch.setattr("mm1_mlx.hub.download", pytest.fail)
    out, llama = tmp_path / "out", str(sources.llama(tmp_path / "llama"))
    for options, message in (
        ({"decoder": llama}, "need a connector between them"),
        ({"decoder": llama, "connector": "c-abstractor"}, "needs its number of image"),
        ({"decoder": llama, "connector": "c-abstractor:5"}, "not a square number"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert("a/b", out, **options)
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointError, match="is not a model folder"):
        convert("a/b", tmp_path / "photos", overwrite=True)
    (small / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="model type 'gpt2'"):
        convert("a/b", out)


@pytest.mark.parametrize(
    "trouble", [HTTPError("connection refused"), HfHubHTTPError, OfflineModeIsEnabled]
)
def test_a_local_copy_serves_where_the_hub_does_not(
    trouble: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble is HfHubHTTPError:
        trouble = HfHubHTTPError(
            "503", response=SimpleNamespace(headers={}, request=None)
        )

    def model_info(*_: Any, **__: Any) -> None:
        raise trouble

    # A real cache, in which the hub's list of files names other weights too.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--a--b"
    folder = cache / "snapshots" / ("1" * 40)
    folder.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1" * 40)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(HfApi, "repo_info", model_info)
    with pytest.raises(CheckpointError, match="is not in its local cache"):
        hub.download("a/b")
    (folder / "model.safetensors").touch()
    assert hub.download("a/b") == (folder, None)
    assert Source("a/b").folder == folder
    assert describe("a/b") == SourceInfo("a/b", None, None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, "'a/b' is neither a folder here nor a repository on"),
        (GatedRepoError, "a/b is gated; accept its licence at https://.*hf auth login"),
    ],
)
def test_repositories_that_cannot_be_had_are_explained(
    kind: type[RepositoryNotFoundError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response: Any = SimpleNamespace(headers={}, request=None)

    def model_info(*_: Any, **__: Any) -> None:
        raise kind("no", response=response)

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr("mm1_mlx.hub.snapshot_download", model_info)
    for call in (Source, describe, hub.download):
        with pytest.raises(CheckpointError, match=message):
            call("a/b")


def test_without_a_network_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model_info(*_: Any, **__: Any) -> None:
        raise HTTPError("connection refused")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for call in (Source, hub.download):
        with pytest.raises(CheckpointError, match="check the network, or give a local"):
            call("nobody/nothing")


def test_a_repository_without_a_config_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    response: Any = SimpleNamespace(headers={}, request=None)

    def missing(*_: Any) -> None:
        raise RemoteEntryNotFoundError("404", response=response)

    monkeypatch.setattr("mm1_mlx.hub.hf_hub_download", missing)
    with pytest.raises(CheckpointError, match=r"a/b has no config.json; give the"):
        model_type("a/b")


def test_second_copies_of_weights_are_left_alone(tmp_path: Path) -> None:
    for name in ("open_clip_model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == ["pytorch_model.bin"]


def test_pickles_are_not_fetched_where_nothing_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = repository("config.json", "pytorch_model.bin")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr("mm1_mlx.hub.snapshot_download", pytest.fail)
    with pytest.raises(CheckpointError, match=r"only \.bin weights.*mm1-mlx\[torch\]"):
        hub.download("somebody/old")
