"""Models come back bit-equal; a killed or failed writer leaves none."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

import mm1_mlx.writer
from mm1_mlx import files, hold
from mm1_mlx.checkpoint import load_manifest, load_model, verify_digests
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import check_shard, read_header, read_json, read_shard
from mm1_mlx.hold import LOCK, Hold
from mm1_mlx.models import MM1
from mm1_mlx.shard import Deferred, in_order, write_shard
from mm1_mlx.writer import CheckpointWriter, check_place


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_saved_model_loads_bit_equal(dtype, tmp_path, make_model, write, same):
    model = make_model()
    model.set_dtype(dtype)
    loaded = load_model(write(tmp_path / "model", model))
    assert loaded.config == model.config
    assert same(loaded, model)


def test_weights_load_in_another_dtype_on_request(folder, tiny_model):
    loaded = load_model(folder, mx.bfloat16)
    name = "decoder.norm.weight"
    assert loaded.tensors()[name].dtype == mx.bfloat16
    expected = tiny_model.tensors()[name].astype(mx.bfloat16)
    assert mx.array_equal(loaded.tensors()[name], expected)


def test_a_model_of_one_part_survives(tmp_path, make_config, reinitialise, write, same):
    config = make_config(connector=None, decoder=None, prompt=None)
    encoder = reinitialise(MM1(config))
    assert same(load_model(write(tmp_path / "encoder", encoder)), encoder)


def test_several_shards_have_an_index_and_load_bit_equal(
    tmp_path, tiny_model, monkeypatch, write, same
):
    limit = 20_000
    monkeypatch.setattr(mm1_mlx.writer, "MAX_SHARD_BYTES", limit)
    folder = write(tmp_path / "model", tiny_model)
    shards = sorted(folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert shards[0].name == f"model-00001-of-{count:05}.safetensors"
    tensors = tiny_model.tensors()
    for shard in shards:
        sizes = [tensors[name].nbytes for name in check_shard(shard)]
        assert sum(sizes) <= limit or len(sizes) == 1
    index = read_json(folder / "model.safetensors.index.json")
    assert index["weight_map"].keys() == tensors.keys()
    for name, shard in index["weight_map"].items():
        assert name in check_shard(folder / shard)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert same(load_model(folder), tiny_model)


def test_one_shard_needs_no_index(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "manifest.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_the_manifest_lists_every_other_file(folder):
    manifest = load_manifest(folder)
    assert manifest["format_version"] == 1
    assert manifest["source"] == {"format": "test"}
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {
        "manifest.json"
    }
    assert verify_digests(folder) == 3


# Writing


def test_an_error_while_writing_leaves_nothing(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(mm1_mlx.writer, "MAX_SHARD_BYTES", 1000)
    tensors = list(tiny_model.tensors().items())

    def half():
        with CheckpointWriter(tmp_path / "model", tiny_model.config, {}) as writer:
            for name, tensor in tensors[: len(tensors) // 2]:
                writer.add(name, tensor)
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_tensors_left_out_is_not_written(tmp_path, tiny_model, write):
    tensors = tiny_model.tensors()
    del tensors["decoder.norm.weight"]
    with pytest.raises(
        CheckpointError, match=r"1 tensor\(s\) missing, e.g. \['decoder.norm.weight'\]"
    ):
        write(tmp_path / "model", tiny_model, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.surprise", (48,), "decoder.surprise .* does not belong to the model"),
        ("decoder.norm.weight", (49,), r"\[49\] does not belong .* expects \(48,\)"),
    ],
)
def test_a_tensor_that_is_not_the_models_is_refused(
    name, shape, message, tmp_path, tiny_model, write
):
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "model", tiny_model, {name: mx.zeros(shape)})


def test_a_tensor_written_twice_is_refused(tmp_path, tiny_model):
    def twice():
        with CheckpointWriter(tmp_path / "model", tiny_model.config, {}) as writer:
            writer.add("decoder.norm.weight", mx.zeros(48))
            writer.add("decoder.norm.weight", mx.zeros(48))

    with pytest.raises(CheckpointError, match="does not belong"):
        twice()


def test_an_existing_folder_is_kept(folder, tiny_model, write):
    with pytest.raises(
        CheckpointError,
        match=r"already exists; choose another name or pass --overwrite",
    ):
        write(folder, tiny_model)
    assert verify_digests(folder) == 3


def test_a_model_is_overwritten_on_request(folder, make_model, write, same):
    other = make_model(seed=9)
    write(folder, other, overwrite=True)
    assert same(load_model(folder), other)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["folder", "web app", "foreign model", "file"])
def test_what_is_no_model_is_never_overwritten(kind, tmp_path, tiny_model, write):
    out = tmp_path / "holiday"
    if kind == "file":
        out.write_bytes(b"")
    else:
        out.mkdir()
        (out / "photo.png").write_bytes(b"")
    if kind == "web app":
        (out / "manifest.json").write_text('{"name": "mine"}')
    elif kind == "foreign model":
        (out / "manifest.json").write_text('{"files": {}}')
        (out / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CheckpointError, match="is not a model folder and will not be"):
        write(out, tiny_model, overwrite=True)
    assert out.exists()


def test_an_error_while_overwriting_keeps_the_old_model(
    folder, make_model, tiny_model, write, same
):
    with pytest.raises(CheckpointError, match=r"missing, e.g."):
        write(
            folder,
            make_model(seed=9),
            {"decoder.norm.weight": mx.zeros(48)},
            overwrite=True,
        )
    assert same(load_model(folder), tiny_model)


def test_a_rename_that_fails_keeps_the_old_model(
    folder, make_model, tiny_model, write, same, monkeypatch
):
    rename = Path.rename

    def fail(path, target):
        if path.name.endswith(".mm1-partial"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write(folder, make_model(seed=9), overwrite=True)
    assert same(load_model(folder), tiny_model)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_disk_that_is_full_at_any_byte_is_named_and_leaves_nothing(
    tmp_path, make_model, write
):
    model = make_model(vision=None, connector=None, image=None)
    whole = write(tmp_path / "whole", model)
    size = max(path.stat().st_size for path in whole.iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (*range(0, 1200, 300), *range(1200, size, size // 12), size - 1):
        # Python takes the signal: writing past the limit is an error here.
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(
                CheckpointError, match=r"model cannot be written .* is the disk full\?$"
            ):
                write(tmp_path / "model", model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert list(tmp_path.iterdir()) == [whole]


def test_a_shard_is_laid_out_as_safetensors_does(tmp_path):
    tensors = {
        "bytes": mx.arange(5).astype(mx.uint8),
        "half": mx.random.normal((3, 5)).astype(mx.float16),
        "brain": mx.random.normal((2, 2, 2)).astype(mx.bfloat16),
        "integers": mx.arange(7).astype(mx.uint32),
        "number": mx.array(0.5),
        "none": mx.zeros((0, 4)),
        "turned \u00e9": mx.random.normal((3, 4)).T,
    }
    path, told = tmp_path / "x.safetensors", []
    deferred = in_order({name: Deferred.of(x) for name, x in tensors.items()})
    digest = write_shard(path, deferred, lambda: told.append(1))
    assert len(told) == len(tensors)
    assert deferred == {}
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = read_shard(path)
    assert read.keys() == tensors.keys()
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype
        assert mx.array_equal(read[name], x)
    starts = {name: entry.start for name, entry in read_header(path).items()}
    assert all(starts[name] % x.dtype.size == 0 for name, x in tensors.items())
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "mlx"}
        # The parser's own order.
        assert file.offset_keys() == [
            "integers", "none", "number", "turned \u00e9", "brain", "half", "bytes",
        ]  # fmt: skip


def test_a_tensor_in_pieces_is_made_as_it_is_written(tmp_path, make_model):
    model, alive, most = make_model(), [], 0

    def pieces(x):
        nonlocal most
        for row in x:
            alive.append(weakref.ref(piece := np.array(row)))
            most = max(most, sum(ref() is not None for ref in alive))
            yield mx.array(piece)
            del piece

    with CheckpointWriter(tmp_path / "model", model.config, {}) as writer:
        for name, x in model.tensors().items():
            writer.add(name, Deferred(x.shape, x.dtype, partial(pieces, x)))
        assert alive == []
    assert most == 1
    tensors = load_model(tmp_path / "model").tensors()
    assert all(mx.array_equal(tensors[k], x) for k, x in model.tensors().items())


def test_the_folder_one_stands_in_is_overwritten(
    folder, make_model, write, same, monkeypatch
):
    monkeypatch.chdir(folder)
    other = make_model(seed=9)
    write(Path(), other, overwrite=True)
    assert same(load_model(folder), other)


@pytest.mark.parametrize("able", [True, False])
def test_a_macs_drive_is_flushed_where_it_can_be(tmp_path, monkeypatch, able):
    calls = []

    def command(_, number):
        calls.append(number)
        if not able:
            raise OSError("not supported on this volume")

    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", command)
    monkeypatch.setattr(files.os, "fsync", lambda _: calls.append("fsync"))
    files.fsync(tmp_path)
    assert calls == ([51] if able else [51, "fsync"])


# Forks before mlx starts its threads, so that every kill costs no new interpreter.
KILLED = """
import json, os, signal, sys, time
from pathlib import Path
import mm1_mlx.writer
from mm1_mlx.config import MM1Config
config, root = json.loads(sys.argv[1]), Path(sys.argv[2])
mm1_mlx.writer.MAX_SHARD_BYTES = 8_000

def write(out):
    import mlx.core as mx
    with mm1_mlx.writer.CheckpointWriter(
        out, MM1Config.from_dict(config), {}, overwrite=out.exists()
    ) as writer:
        os.write(started, b"x")
        for name, shape in writer.expected.items():
            writer.add(name, mx.ones(shape))

for i in range(int(sys.argv[3]) + 1):
    reading, started = os.pipe()
    out = root / ("old" if i % 2 else f"new-{i}")
    child = os.fork()
    if child == 0:
        write(out)
        os._exit(0)
    os.read(reading, 1)
    start = time.perf_counter()
    if i:
        time.sleep(seconds * (i % 16 / 15))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if i == 0:
        seconds = time.perf_counter() - start
    print(out.name, os.WIFSIGNALED(status), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.drill)])
def test_a_killed_writer_leaves_no_half_model(
    kills, tmp_path, make_config, make_model, write, same
):
    old = make_model(seed=5)
    write(tmp_path / "old", old)
    config = json.dumps(make_config().to_dict())
    arguments = [sys.executable, "-c", KILLED, config, str(tmp_path), str(kills)]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in out.splitlines()]
    assert len(rows) == kills + 1
    assert rows[0] == ["new-0", "False"]
    assert sum(killed == "True" for _, killed in rows) >= 5
    assert len(load_model(tmp_path / "new-0").tensors()) == len(old.tensors())
    for name, killed in rows:
        path = tmp_path / name
        if path.exists():
            assert verify_digests(path) >= 2
            load_model(path)
        else:
            # The one moment of an overwrite in which the old model stands aside.
            assert killed == "True"
            assert name != "old" or same(
                load_model(next(tmp_path.glob("old.mm1-old-*"))), old
            )
    for left in tmp_path.glob("*.mm1-partial"):
        with contextlib.suppress(CheckpointError):
            assert len(load_model(left).tensors()) == len(old.tensors())


def test_the_next_writer_clears_what_a_killed_one_left(tmp_path, make_model, write):
    for name in ("new.mm1-partial", "newer.mm1-partial", "new.old-20240601"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-1.safetensors").write_bytes(b"half")
    write(tmp_path / "new.mm1-old-1a2b", make_model(seed=5))
    with pytest.raises(CheckpointError, match="already exists; choose another name"):
        write(tmp_path / "new", make_model())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"new", "newer.mm1-partial", "new.old-20240601"}
    load_model(tmp_path / "new")


HOLDS = """
import sys, time
from pathlib import Path
from mm1_mlx.hold import Hold
hold = Hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_by_one_run_until_it_ends(tmp_path, make_model, write):
    arguments = [sys.executable, "-c", HOLDS, tmp_path / "model.mm1-partial"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            CheckpointError, match=r"another run is at work in .*partial"
        ):
            write(tmp_path / "model", make_model())
        assert [x.name for x in tmp_path.iterdir()] == ["model.mm1-partial"]
        other.kill()
    write(tmp_path / "model", make_model())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_hold_that_was_taken_away_clears_nothing_of_the_next(tmp_path):
    folder = tmp_path / "folder"
    first = Hold(folder)
    folder.rename(tmp_path / "elsewhere")
    second = Hold(folder)
    (folder / "file").write_bytes(b"")
    first.clear()
    first.remove()
    first.release()
    assert sorted(x.name for x in folder.iterdir()) == ["file", LOCK]
    second.remove()
    assert [x.name for x in tmp_path.iterdir()] == ["elsewhere"]


def test_a_disk_without_locks_holds_what_is_made(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(hold.fcntl, "flock", fail)
    held = Hold(tmp_path / "folder")
    message = (
        r"cannot say whether a run is at work in it \(No locks available\); if none"
    )
    with pytest.raises(CheckpointError, match=message):
        Hold(tmp_path / "folder")
    held.remove()
    Hold(tmp_path / "folder").remove()


@pytest.mark.parametrize(
    ("of", "name", "found"),
    [
        (hold.Path, "mkdir", False),
        (hold.os, "open", False),
        (hold.fcntl, "flock", False),
        (hold.os, "open", True),
        (hold.fcntl, "flock", True),
    ],
)
def test_one_that_is_stopped_while_it_takes_a_folder_leaves_none_that_it_made(
    of, name, found, tmp_path, monkeypatch
):
    real = getattr(of, name)

    def stopped(*arguments, **named):
        monkeypatch.setattr(of, name, real)
        real(*arguments, **named)
        raise KeyboardInterrupt

    folder = tmp_path / "folder"
    if found:
        folder.mkdir()
    monkeypatch.setattr(of, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        Hold(folder)
    assert folder.exists() == found
    Hold(folder).remove()


@pytest.mark.parametrize("working", [True, False])
def test_one_that_is_stopped_takes_nothing_of_the_next(working, tmp_path, monkeypatch):
    real = hold.Path.mkdir
    others = []

    def stopped(*_, **__):
        monkeypatch.setattr(hold.Path, "mkdir", real)
        others.append(Hold(tmp_path / "folder"))
        (tmp_path / "folder" / "file").write_bytes(b"")
        if not working:
            others[0].release()
        raise KeyboardInterrupt

    monkeypatch.setattr(hold.Path, "mkdir", stopped)
    with pytest.raises(KeyboardInterrupt):
        Hold(tmp_path / "folder")
    assert sorted(x.name for x in (tmp_path / "folder").iterdir()) == ["file", LOCK]


def test_a_full_disk_keeps_no_empty_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hold.os, "open", full)
    with pytest.raises(OSError, match="No space left"):
        Hold(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_only_a_full_disk_is_said_to_be_full(
    number, tmp_path, make_model, write, monkeypatch
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mm1_mlx.writer, "write_shard", fail)
    message = (
        rf"written \({os.strerror(number)}\); check its disk and who may write there$"
    )
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "model", make_model())


def test_what_lies_under_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    message = (
        r"model' cannot be made, for '.*file' is not a folder that can be written in"
    )
    with pytest.raises(CheckpointError, match=message):
        check_place(tmp_path / "file" / "model", overwrite=False)


def test_leftovers_of_a_name_with_brackets_are_cleared(tmp_path, make_model, write):
    write(tmp_path / "my[1]", make_model())
    (tmp_path / "my[1].mm1-old-1a2b").mkdir()
    write(tmp_path / "my[1]", make_model(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["my[1]"]


def test_a_failure_leaves_no_new_parents(tmp_path, make_model):
    model = make_model()
    (tmp_path / "there").mkdir()
    writer = CheckpointWriter(tmp_path / "there/new/deep/model", model.config, {})
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
