"""Conversions hold little at a time, and a killed one goes on where it was."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import sources

from mm1_mlx import pieces, writer
from mm1_mlx.checkpoint import load_config, load_manifest, load_model, verify_digests
from mm1_mlx.convert import convert
from mm1_mlx.errors import CheckpointError
from mm1_mlx.hold import LOCK, Hold
from mm1_mlx.partial import JOURNAL
from mm1_mlx.pieces import TensorInfo
from mm1_mlx.shard import write_shard
from mm1_mlx.writer import CheckpointWriter

SHARD_BYTES = 3000
PARTIAL = "out.mm1-partial"

# Forks before mlx starts its threads, so that every run costs no new interpreter.
RUNS = """
import json, os, signal, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mm1_mlx import files, partial, writer
from mm1_mlx.convert import convert
from mm1_mlx.errors import CheckpointError

source, root, shard_bytes, stride = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
writer.MAX_SHARD_BYTES = shard_bytes
steps, recorded = 0, []

def counted(function):
    def call(*args, **kwargs):
        global steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def run(out, last_step):
    "What a process of its own says of a conversion: its steps, and the shards it wrote."
    global last
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        last = last_step
        for module in (files, partial, writer):
            module.fsync = counted(module.fsync)
        Path.rename, record = counted(Path.rename), partial.Partial.record
        def noted(self, name, shard):
            record(self, name, shard)
            recorded.append(name)
        partial.Partial.record = noted
        convert(source, out, progress=counted(lambda *_: None))
        os.write(writing, json.dumps([steps, recorded]).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    said = os.read(reading, 100_000)
    os.close(reading)
    return json.loads(said) if said else None

total, shards = run(root / "whole", 0)
print(json.dumps([total, shards]))
for last_step in range(1, total + 1, stride):
    assert run(root / "out", last_step) is None
    there = (root / "out").exists()
    left = [json.loads(x.read_text())["shards"] for x in root.glob("out.*/journal.json")]
    kept = list(left[0]) if left else []
    again = None if there else run(root / "out", 0)[1]
    same = all(
        (root / "out" / x.name).read_bytes() == x.read_bytes()
        for x in (root / "whole").iterdir()
    )
    clean = {x.name for x in root.iterdir()} - {"whole", "out"} == set()
    print(json.dumps([last_step, kept, again, same, clean or there]), flush=True)
    import shutil
    for path in root.glob("out*"):
        shutil.rmtree(path)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.drill)])
def test_a_killed_conversion_goes_on_where_it_was(stride: int, tmp_path: Path) -> None:
    llava = sources.llava(tmp_path / "in")
    (tmp_path / "runs").mkdir()
    arguments = [llava, tmp_path / "runs", SHARD_BYTES, stride]
    out = subprocess.run(
        [sys.executable, "-c", RUNS, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (total, shards), *kills = map(json.loads, out.splitlines())
    assert len(shards) > 5
    assert total > 60
    went_on = 0
    for last, kept, again, same, clean in kills:
        assert same, last
        assert clean, last
        if again is not None:
            assert again == [x for x in shards if x not in kept], last
            went_on += len(again) < len(shards)
    assert went_on >= len(kills) // 2


def stop(count: int, total: int) -> None:
    """What a user does half-way."""
    if count > total // 2:
        raise KeyboardInterrupt


@pytest.fixture
def stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, set[str]]]:
    """A function: what a run stopped half-way leaves beside ``out``, and its shards."""
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", SHARD_BYTES)

    def stopped(source: Path | None, **options: Any) -> tuple[Path, set[str]]:
        with pytest.raises(KeyboardInterrupt) as caught:
            convert(
                str(source) if source else None,
                tmp_path / "out",
                progress=stop,
                **options,
            )
        left = tmp_path / PARTIAL
        shards = json.loads((left / JOURNAL).read_text())["shards"]
        assert len(shards) > 2
        assert {x.name for x in left.iterdir()} == {JOURNAL, LOCK, *shards}
        (said,) = caught.value.__notes__
        assert f"MB of the model stay in '{left}': the same command goes on" in said
        return left, {*shards}

    return stopped


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are written."""
    names: list[str] = []

    def noted(path: Path, *rest: Any) -> str:
        names.append(path.name)
        return write_shard(path, *rest)

    monkeypatch.setattr(writer, "write_shard", noted)
    return names


def test_every_tensor_is_told_of_when_some_are_there_already(
    tmp_path: Path, stopped: Any, written: list[str]
) -> None:
    llama = sources.llama(tmp_path / "in")
    _, shards = stopped(llama)
    written.clear()
    calls: list[tuple[int, int]] = []
    convert(str(llama), tmp_path / "out", progress=lambda *call: calls.append(call))
    assert written
    assert not shards & {*written}
    assert calls == [(i + 1, 21) for i in range(21)]
    assert verify_digests(tmp_path / "out") > len(shards)
    assert {x.name for x in tmp_path.iterdir()} == {"in", "out"}


def tuned(model: Path, out: Path) -> Path:
    """A model of ours with other weights, whose manifest says the same of it."""
    source = load_manifest(model)["source"]
    with CheckpointWriter(out, load_config(model), source) as writer:
        for name, tensor in load_model(model).tensors().items():
            writer.add(name, tensor * 1.5)
    return out


def test_parts_of_models_that_were_one_are_told_apart(
    tmp_path: Path, stopped: Any
) -> None:
    """Fine-tunes of one base differ in nothing but which of them gives a part."""
    convert(str(sources.llava(tmp_path / "in")), tmp_path / "a")
    one, other = str(tmp_path / "a"), str(tuned(tmp_path / "a", tmp_path / "b"))
    stopped(None, vision=one, connector=one, decoder=other)
    swapped = {"vision": other, "connector": other, "decoder": one}
    convert(None, tmp_path / "out", **swapped)
    convert(None, tmp_path / "fresh", **swapped)
    found, expected = (
        load_model(tmp_path / name).tensors() for name in ("out", "fresh")
    )
    assert all(mx.array_equal(found[name], x) for name, x in expected.items())


def test_a_run_that_another_holds_is_left_alone(tmp_path: Path, stopped: Any) -> None:
    llama = sources.llama(tmp_path / "in")
    left, _ = stopped(llama)
    there = sorted(left.iterdir())
    hold = Hold(left)
    message = rf"another run is at work in '.*{PARTIAL}'; wait for its end, or choose a"
    with pytest.raises(CheckpointError, match=message):
        convert(str(llama), tmp_path / "out")
    assert sorted(left.iterdir()) == there
    hold.release()
    convert(str(llama), tmp_path / "out")
    assert {x.name for x in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.drill)])
def test_of_two_threads_one_writes(
    rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", SHARD_BYTES)
    llama, out = str(sources.llama(tmp_path / "in")), tmp_path / "out"
    convert(llama, tmp_path / "whole")

    def run() -> str:
        mx.set_default_device(mx.cpu)
        try:
            convert(llama, out)
        except CheckpointError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        for _ in range(rounds):
            said = sorted(x.result() for x in [pool.submit(run) for _ in range(2)])
            assert said[0] == ""
            assert "another run is at work" in said[1] or "already exists" in said[1]
            for path in (tmp_path / "whole").iterdir():
                assert (out / path.name).read_bytes() == path.read_bytes()
            assert {x.name for x in tmp_path.iterdir()} == {"in", "out", "whole"}
            shutil.rmtree(out)


STOPPED = """
import os, signal, sys
from mm1_mlx import writer
from mm1_mlx.apps.cli import main

writer.MAX_SHARD_BYTES = 3000
tell, number = writer.CheckpointWriter._tell, int(sys.argv.pop(1))

def told(self):
    tell(self)
    if self.written == 12:
        os.kill(os.getpid(), number)

writer.CheckpointWriter._tell = told
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_in_one_line_what_it_leaves(
    number: int, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, out = sources.llama(tmp_path / "in"), tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", STOPPED, *map(str, (number, "convert", llama, out))],
        # What a shell runs in the background ignores the signal, as would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (128 + number, "")
    first, said = run.stderr.split("\n", 1)
    assert "licence" in first
    assert said.strip().startswith("0.0 MB of the model stay in")
    assert "\n" not in said.strip()
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", SHARD_BYTES)
    convert(str(llama), out)
    assert written[0] != "shard-1.safetensors"
    assert verify_digests(out) > 5


def test_an_error_of_its_own_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", SHARD_BYTES)

    def fail(count: int, total: int) -> None:
        if count > total // 2:
            raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no") as caught:
        convert(str(sources.llama(tmp_path / "in")), tmp_path / "out", progress=fail)
    assert not hasattr(caught.value, "__notes__")
    assert {x.name for x in tmp_path.iterdir()} == {"in"}


def test_what_a_disk_failed_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]
) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", SHARD_BYTES)
    llama = sources.llama(tmp_path / "in")

    def full(path: Path, *rest: Any) -> str:
        if path.name == "shard-5.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", full)
        message = (
            r"out cannot be written \(No space left on device\); is the disk full\?"
        )
        with pytest.raises(CheckpointError, match=message) as caught:
            convert(str(llama), tmp_path / "out")
    assert len(caught.value.__notes__) == 1
    convert(str(llama), tmp_path / "out")
    assert written[0] == "shard-5.safetensors"
    assert verify_digests(tmp_path / "out") > 5


def touch(source: Path, _: Path) -> dict[str, Any]:
    os.utime(source / "model.safetensors", ns=(1, 1))
    return {}


def cast(_: Path, __: Path) -> dict[str, Any]:
    return {"dtype": mx.float16}


def write_to_journal(text: str) -> Callable[[Path, Path], dict[str, Any]]:
    def change(_: Path, left: Path) -> dict[str, Any]:
        (left / JOURNAL).write_text(text)
        return {}

    return change


@pytest.mark.parametrize(
    "change",
    [touch, cast, *map(write_to_journal, ("", "[]", "7", '{"fingerprint": null}'))],
    ids=["source", "dtype", "empty", "list", "number", "fingerprint"],
)
def test_what_was_made_of_something_else_is_not_taken_over(
    change: Any, tmp_path: Path, stopped: Any, written: list[str]
) -> None:
    llama = sources.llama(tmp_path / "in")
    left, _ = stopped(llama)
    options = change(llama, left)
    written.clear()
    convert(str(llama), tmp_path / "out", **options)
    assert written == [f"shard-{i + 1}.safetensors" for i in range(len(written))]
    assert verify_digests(tmp_path / "out") > 2
    assert {x.name for x in tmp_path.iterdir()} == {"in", "out"}


def test_a_shard_that_is_not_whole_is_written_again(
    tmp_path: Path, stopped: Any, written: list[str]
) -> None:
    llama = sources.llama(tmp_path / "in")
    left, shards = stopped(llama)
    short, *_ = sorted(shards)
    os.truncate(left / short, 100)
    written.clear()
    convert(str(llama), tmp_path / "out")
    assert {*written} & shards == {short}
    assert verify_digests(tmp_path / "out") > len(shards)


def test_one_that_is_lost_is_written_again(
    tmp_path: Path, stopped: Any, written: list[str]
) -> None:
    llama = sources.llama(tmp_path / "in")
    left, shards = stopped(llama)
    lost, *_ = sorted(shards)
    (left / lost).unlink()
    written.clear()
    convert(str(llama), tmp_path / "out")
    assert {*written} & shards == {lost}
    assert verify_digests(tmp_path / "out") > len(shards)


@pytest.mark.parametrize("other", [False, True])
def test_what_is_there_already_needs_no_room(
    other: bool, tmp_path: Path, stopped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used, or cleared away."""
    llama = sources.llama(tmp_path / "in")
    left, _ = stopped(llama)
    whole = sum(x.nbytes for x in sources.llama_tensors().values())
    there = sum(x.stat().st_size for x in left.iterdir())
    if other:
        touch(llama, left)
    # The model's other files take some, too.
    room = SimpleNamespace(free=whole - there - 1)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: room)
    with pytest.raises(CheckpointError, match="but its disk has"):
        convert(str(llama), tmp_path / "out")
    assert left.exists() is not other
    room.free = whole
    convert(str(llama), tmp_path / "out")


RACE = """
import os, shutil, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mm1_mlx import writer
from mm1_mlx.convert import convert
from mm1_mlx.errors import CheckpointError
writer.MAX_SHARD_BYTES = 3000
source, root = sys.argv[1], Path(sys.argv[2])
left = root / "out.mm1-partial"
kept = left.rename(root / "kept")
for _ in range(int(sys.argv[3])):
    shutil.copytree(kept, left)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                convert(source, root / "out")
            except CheckpointError as error:
                said = ("already exists", "another run is at work")
                assert any(x in str(error) for x in said), error
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(x, 0)[1]) for x in children)
    print(codes == [0, 1, 1], sorted(x.name for x in root.glob("out*")), flush=True)
    (root / "out").rename(root / "last")
    shutil.rmtree(root / "last")
convert(source, root / "out")
"""


@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.drill)])
def test_of_several_at_once_one_goes_on(
    rounds: int, tmp_path: Path, stopped: Any
) -> None:
    llama = sources.llama(tmp_path / "in")
    stopped(llama)
    out = subprocess.run(
        [sys.executable, "-c", RACE, str(llama), str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines() == ["True ['out']"] * rounds
    assert verify_digests(tmp_path / "out") > 2


def test_no_more_is_read_at_a_time_than_a_piece_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, read = 200, TensorInfo.read
    reads: list[tuple[int, int]] = []

    def noted(info: TensorInfo, rows: slice = pieces.ALL) -> mx.array:
        x = read(info, rows)
        row = x.nbytes // x.shape[0]
        reads.append((x.nbytes, row))
        return x

    llama = sources.llama(tmp_path / "in")
    convert(str(llama), tmp_path / "whole")
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
    monkeypatch.setattr(TensorInfo, "read", noted)
    convert(str(llama), tmp_path / "out")
    assert max(size for size, _ in reads) == piece - piece % 64
    # Nothing is read twice.
    assert sum(size for size, _ in reads) == sum(
        x.nbytes for x in sources.llama_tensors().values()
    )
    name = "model.safetensors"
    whole = (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "out" / name).read_bytes() == whole


MEMORY = """
import json, sys, threading, time
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mm1_mlx.convert import convert
from mm1_mlx.recipe import find_recipe

small, large, out = *sys.argv[1:3], Path(sys.argv[3])
options = json.loads(sys.argv[4])
if "dtype" in options:
    options["dtype"] = getattr(mx, options["dtype"])
if "recipe" in options:
    options["recipe"] = find_recipe(options["recipe"])

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) * 1024

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.002)

convert(small, out / "first")
before, peaks = anonymous(), []
threading.Thread(target=watch, daemon=True).start()
convert(large, out / "second", **options)
print(max(peaks) - before)
"""


@pytest.mark.drill
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32"},
        {"recipe": "8bit"},
        {"recipe": "8bit", "dtype": "float32"},
        {"recipe": "8bit", "upcycle": "experts=8,every=1"},
    ],
    ids=lambda options: " ".join(options.values()) or "as it is",
)
def test_a_large_checkpoint_takes_little_memory(
    options: dict[str, str], tmp_path: Path
) -> None:
    """600 MB; what is held besides the piece in hand is the program's own."""
    wide = {"hidden_size": 1024, "intermediate_size": 16384, "vocab_size": 100_000}
    tensors = sources.llama_tensors()
    sizes = {64: 100_000, 16: 1024, 24: 16384, 8: 512}
    tensors = {
        name: mx.ones([sizes[n] for n in x.shape], mx.float16)
        for name, x in tensors.items()
    }
    large = sources.write(tmp_path / "large", sources.LLAMA | wide, tensors)
    assert sum(x.nbytes for x in tensors.values()) > 600e6
    small = sources.llama(tmp_path / "small")
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            MEMORY,
            *map(str, (small, large, tmp_path)),
            json.dumps(options),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert int(out) < 10 * pieces.PIECE_BYTES
    # As large as it would be if it were held whole.
    config, files = load_config(tmp_path / "second"), load_manifest(tmp_path / "second")
    assert (config.quantization is None) == ("recipe" not in options)
    assert sum(x["bytes"] for x in files["files"].values()) > 300e6
