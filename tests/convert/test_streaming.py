"""Conversions hold little at a time, and a killed one goes on where it was."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import sources

from mm1_mlx import writer
from mm1_mlx.checkpoint import load_model, verify_digests
from mm1_mlx.convert import convert, step
from mm1_mlx.convert.tensors import TensorInfo
from mm1_mlx.partial import JOURNAL, Partial
from mm1_mlx.shard import write_shard

SHARD_BYTES = 3000
# Above every process number.
DEAD = 2**22 + 1

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
            # A shard that has its last name already is written again.
            renamed = last > total - 2 * len(shards)
            assert again == [x for x in shards if x not in kept] or renamed, last
            went_on += 0 < len(again) < len(shards)
    assert went_on >= len(kills) // 2


@pytest.fixture
def killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], tuple[Path, set[str]]]:
    """A function: what a run killed half-way leaves beside ``out``, and its shards."""
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", SHARD_BYTES)

    def killed(source: Path) -> tuple[Path, set[str]]:
        def stop(count: int, total: int) -> None:
            if count > total // 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Partial, "remove", lambda _: None)
            with pytest.raises(KeyboardInterrupt):
                convert(str(source), tmp_path / "out", progress=stop)
        (left,) = tmp_path.glob("out.mm1-partial-*")
        shards = json.loads((left / JOURNAL).read_text())["shards"]
        assert len(shards) > 3
        return left.rename(tmp_path / f"out.mm1-partial-{DEAD}"), {*shards}

    return killed


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
    tmp_path: Path, killed: Any, written: list[str]
) -> None:
    llama = sources.llama(tmp_path / "in")
    _, shards = killed(llama)
    written.clear()
    calls: list[tuple[int, int]] = []
    convert(str(llama), tmp_path / "out", progress=lambda *call: calls.append(call))
    assert written
    assert not shards & {*written}
    assert calls == [(i + 1, 21) for i in range(21)]
    assert verify_digests(tmp_path / "out") > len(shards)
    assert {x.name for x in tmp_path.iterdir()} == {"in", "out"}


def test_a_process_of_the_same_number_goes_on(
    tmp_path: Path, killed: Any, written: list[str]
) -> None:
    """In a container every run may have the number that the killed one had."""
    llama = sources.llama(tmp_path / "in")
    left, shards = killed(llama)
    left.rename(tmp_path / f"out.mm1-partial-{os.getpid()}")
    written.clear()
    convert(str(llama), tmp_path / "out")
    assert written
    assert not shards & {*written}
    assert {x.name for x in tmp_path.iterdir()} == {"in", "out"}


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
    change: Any, tmp_path: Path, killed: Any, written: list[str]
) -> None:
    llama = sources.llama(tmp_path / "in")
    left, _ = killed(llama)
    options = change(llama, left)
    written.clear()
    convert(str(llama), tmp_path / "out", **options)
    assert written == [f"shard-{i + 1}.safetensors" for i in range(len(written))]
    assert verify_digests(tmp_path / "out") > 2
    assert {x.name for x in tmp_path.iterdir()} == {"in", "out"}


def test_a_shard_that_is_not_whole_is_written_again(
    tmp_path: Path, killed: Any, written: list[str]
) -> None:
    llama = sources.llama(tmp_path / "in")
    left, shards = killed(llama)
    short, *_ = sorted(shards)
    os.truncate(left / short, 100)
    written.clear()
    convert(str(llama), tmp_path / "out")
    assert {*written} & shards == {short}
    assert verify_digests(tmp_path / "out") > len(shards)


def test_what_is_there_already_needs_no_room(
    tmp_path: Path, killed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = sources.llama(tmp_path / "in")
    left, shards = killed(llama)
    whole = sum(x.nbytes for x in sources.llama_tensors().values())
    there = sum((left / name).stat().st_size for name in shards)
    sizes: list[int] = []
    monkeypatch.setattr(writer, "check_space", lambda _, size: sizes.append(size))
    convert(str(llama), tmp_path / "out")
    assert sizes == [whole - there]


RACE = """
import os, shutil, sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mm1_mlx import writer
from mm1_mlx.convert import convert
from mm1_mlx.errors import CheckpointError
writer.MAX_SHARD_BYTES = 3000
# Above every process number.
DEAD = 2**22 + 1
source, root = sys.argv[1], Path(sys.argv[2])
left = next(root.glob("out.mm1-partial-*"))
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
                assert "already exists" in str(error) or "meanwhile" in str(error), error
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
    rounds: int, tmp_path: Path, killed: Any
) -> None:
    llama = sources.llama(tmp_path / "in")
    killed(llama)
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

    def noted(info: TensorInfo, rows: slice = step.ALL) -> mx.array:
        x = read(info, rows)
        row = x.nbytes // x.shape[0]
        reads.append((x.nbytes, row))
        return x

    llama = sources.llama(tmp_path / "in")
    convert(str(llama), tmp_path / "whole")
    monkeypatch.setattr(step, "PIECE_BYTES", piece)
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
import sys, threading, time
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mm1_mlx.convert import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) * 1024

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.002)

convert(sys.argv[1], Path(sys.argv[3]) / "first")
before, peaks = anonymous(), []
threading.Thread(target=watch, daemon=True).start()
convert(sys.argv[2], Path(sys.argv[3]) / "second", dtype=getattr(mx, sys.argv[4], None))
print(max(peaks) - before)
"""


@pytest.mark.drill
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["", "float32"])
def test_a_large_checkpoint_takes_little_memory(dtype: str, tmp_path: Path) -> None:
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
        [sys.executable, "-c", MEMORY, str(small), str(large), str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert int(out) < 10 * step.PIECE_BYTES
    assert len(load_model(tmp_path / "second").tensors()) == len(tensors)
