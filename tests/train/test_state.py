"""Checkpoints are whole or not there, and a damaged one is passed over for the other."""

import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from mm1_mlx.errors import CheckpointError
from mm1_mlx.train import state


def tensors(step):
    return {
        "model.weight": mx.full((4, 3), float(step)),
        "model.half": mx.full((2,), step, mx.bfloat16),
        "optimizer.step": mx.array(step, mx.uint64),
    }


@pytest.fixture
def folder(tmp_path):
    for step in (100, 200, 300):
        state.save(tmp_path, step, tensors(step))
    return tmp_path


def test_the_last_two_are_kept_and_the_newest_is_read(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["step-000200", "step-000300"]
    step, found = state.load(folder)
    assert step == 300
    expected = tensors(300)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype
        assert mx.array_equal(x, expected[name])


def test_where_there_is_none_nothing_is_read(tmp_path):
    assert state.load(tmp_path) is None
    assert state.load(tmp_path / "nowhere") is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("name", [state.STATE, state.DIGEST])
@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_a_damaged_one_is_passed_over_in_one_line(name, damage, folder):
    damage(folder / "step-000300" / name)
    said = []
    step, found = state.load(folder, said.append)
    assert step == 200
    assert found["model.weight"].max() == 200
    assert len(said) == 1
    assert "step-000300 is damaged" in said[0]
    assert said[0].endswith("; going on from step 200")


def test_two_damaged_ones_are_named(folder):
    for step in (200, 300):
        flip(folder / f"step-000{step}" / state.STATE)
    with pytest.raises(CheckpointError, match=r"step-000300 is .*step-000200 is dam"):
        state.load(folder)


def test_what_a_kill_left_is_cleared_away(folder):
    """As it came behind a new one's renaming, before or while an old one went."""
    shutil.copytree(folder / "step-000200", folder / "step-000100")
    shutil.copytree(folder / "step-000200", folder / "step-000050.gone")
    (folder / "step-000400.partial").mkdir()
    state.tidy(folder, 300)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000200", "step-000300"]


def test_one_that_was_passed_over_is_none_of_the_last_two(folder):
    flip(folder / "step-000300" / state.STATE)
    step, _ = state.load(folder)
    state.tidy(folder, step)
    assert state.saved_steps(folder) == [200]
    # Where the run comes by again, and between.
    for step in (250, 300):
        state.save(folder, step, tensors(step))
        assert len(state.saved_steps(folder)) == state.KEPT
        for kept in state.saved_steps(folder):
            assert state._read(folder / f"step-{kept:06}")
    assert (folder / "step-000300.damaged").is_dir()


def test_one_damaged_checkpoint_is_kept_of_many(folder):
    (folder / "step-000050.damaged").mkdir()
    (folder / "step-000400").mkdir()
    flip(folder / "step-000300" / state.STATE)
    assert state.load(folder)[0] == 200
    state.tidy(folder, 200)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["step-000200", "step-000400.damaged"]


def test_what_is_set_aside_is_no_room(folder, monkeypatch):
    free = shutil.disk_usage(folder)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    held = sum(path.stat().st_size for path in folder.glob("*/*"))
    state.check_room(folder, held // 3, 0, "nothing")
    (folder / "step-000300").rename(folder / "step-000300.damaged")
    with pytest.raises(CheckpointError, match=r"needs .*, but its disk has"):
        state.check_room(folder, held // 3, 0, "nothing")


def test_every_flipped_bit_is_seen(folder):
    path = folder / "step-000300" / state.STATE
    intact = path.read_bytes()
    for place in range(0, len(intact), 7):
        content = bytearray(intact)
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        assert state.load(folder)[0] == 200
    path.write_bytes(intact)
    assert state.load(folder)[0] == 300


def test_what_a_killed_save_left_is_cleared_away(folder):
    left = folder / "step-000400.partial"
    left.mkdir()
    (left / state.STATE).write_bytes(b"half")
    assert state.load(folder)[0] == 300
    state.save(folder, 400, tensors(400))
    assert sorted(p.name for p in folder.iterdir()) == ["step-000300", "step-000400"]


def test_what_somebody_keeps_beside_it_stays(folder):
    kept = folder / "step-000300.best"
    kept.mkdir()
    (folder / "step-000200.gone").mkdir()
    state.save(folder, 400, tensors(400))
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["step-000300", "step-000300.best", "step-000400"]


def test_a_step_that_comes_again_takes_the_place(folder):
    state.save(folder, 300, tensors(7))
    assert state.load(folder)[1]["model.weight"].max() == 7


def test_a_full_disk_is_one_line_and_the_old_one_stands(folder):
    """A limit on the size of files fails a write as a full disk does."""
    program = f"""
import resource, signal
from pathlib import Path
import mlx.core as mx
from mm1_mlx.errors import CheckpointError
from mm1_mlx.train import state

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    state.save(Path({str(folder)!r}), 400, {{"x": mx.zeros((100_000,))}})
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert "the checkpoint of step 400 cannot be written to" in done.stdout, done.stderr
    assert "(File too large); the checkpoint of step 300 stands; free" in done.stdout
    assert done.stdout.count("\n") == 1
    assert sorted(p.name for p in folder.iterdir()) == ["step-000200", "step-000300"]
    assert state.load(folder)[0] == 300
