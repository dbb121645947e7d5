"""What is free: of a system, of a container's control group, of a GPU."""

import mmap
import time

import mlx.core as mx
import pytest

from mm1_mlx import room

GB = 10**9
# In kB, as the kernel counts there.
MEMINFO = """MemTotal:       32000000 kB
MemFree:         1000000 kB
MemAvailable:    8000000 kB
SwapFree:        4000000 kB
"""
RAM, SWAP = 8_000_000 * 1024, 4_000_000 * 1024
NO_LIMIT = 9_223_372_036_854_771_712


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function: what is free, without swap and with, on a Linux with such files."""
    monkeypatch.setattr(room, "PROC", tmp_path / "proc")
    monkeypatch.setattr(room, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(room.mx, "get_cache_memory", lambda: 0)

    def machine(group="", files=None):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(MEMINFO)
        (tmp_path / "proc/self/cgroup").write_text(group)
        for name, text in (files or {}).items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return room.unswapped(), room.allowed()

    return machine


def second(folder, limit, used, stat="anon 0", **swap):
    """The files of a group of version 2."""
    files = {"max": limit, "current": used, "stat": stat}
    files |= {f"swap.{name}": value for name, value in swap.items()}
    return {f"{folder}/memory.{name}": value for name, value in files.items()}


def first(folder, limit, used, stat="anon 0"):
    """And of one of version 1."""
    files = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"memory/{folder}/memory.{name}": value for name, value in files.items()}


def test_the_system_says_what_is_available_and_swapped(machine):
    assert machine() == (RAM, RAM + SWAP)


def test_what_mlx_keeps_of_freed_arrays_is_free(machine, monkeypatch):
    monkeypatch.setattr(room.mx, "get_cache_memory", lambda: 500)
    assert machine() == (RAM + 500, RAM + SWAP + 500)


@pytest.mark.parametrize("limit", ["max", str(100 * GB)])
def test_a_group_with_more_than_the_system_limits_nothing(machine, limit):
    files = second("app", limit, GB)
    assert machine("0::/app", files) == (RAM, RAM + SWAP)


def test_a_containers_limit_counts(machine):
    files = second("app", 4 * GB, 3 * GB, "anon 9\nactive_file 100\ninactive_file 20")
    # Of version 2, without a limit of its own the system's swap may be used.
    assert machine("0::/app", files) == (GB + 120, GB + 120 + SWAP)


def test_a_containers_swap_counts(machine):
    files = second("app", 4 * GB, 3 * GB, max=300, current=100)
    assert machine("0::/app", files) == (GB, GB + 200)


def test_the_narrowest_of_the_groups_around_counts(machine):
    files = second("a", 2 * GB, GB) | second("a/b", 9 * GB, GB) | second("a/b/c", 5, 1)
    assert machine("0::/a/b", files)[0] == GB


def test_a_container_sees_its_own_group_at_the_top(machine):
    """The path is the host's, of which nothing is mounted."""
    files = second(".", 2 * GB, GB)
    assert machine("0::/docker/0123", files)[0] == GB


def test_the_first_version_counts_and_swaps_nothing(machine):
    files = first("app", 2 * GB, GB, "active_file 7\ntotal_active_file 5")
    groups = "9:cpu:/\n4:cpuset,memory:/app\n0::/"
    assert machine(groups, files) == (GB + 5, GB + 5)


def test_the_first_version_has_a_number_for_no_limit(machine):
    files = first("app", NO_LIMIT, GB)
    assert machine("4:memory:/app", files) == (RAM, RAM + SWAP)


def test_a_group_beyond_its_limit_has_nothing_left(machine):
    files = second("app", GB, 2 * GB, max=0, current=0)
    assert machine("0::/app", files) == (0, 0)


@pytest.mark.skipif(not room.PROC.joinpath("meminfo").is_file(), reason="reads /proc")
def test_what_is_taken_is_no_longer_free():
    def taken():
        before = room.allowed()
        # An array might take what the heap of this process keeps.
        with mmap.mmap(-1, 400_000_000) as memory:
            for page in range(0, len(memory), mmap.PAGESIZE):
                memory[page] = 1
            return before - room.allowed()

    # What else runs here takes and gives, too, at times for seconds.
    tries, end = [taken()], time.monotonic() + 60
    while tries[-1] < 200_000_000 and time.monotonic() < end:
        time.sleep(0.5)
        tries.append(taken())
    assert tries[-1] > 200_000_000, tries


@pytest.mark.metal
@pytest.mark.skipif(not mx.metal.is_available(), reason="asks a Mac's GPU")
def test_a_gpu_says_what_it_allows():
    limit = mx.device_info()["max_recommended_working_set_size"]
    assert limit - mx.get_active_memory() == room.allowed()


def test_a_gpus_working_set_counts_where_there_is_one(monkeypatch):
    info = {"max_recommended_working_set_size": 10_000}
    monkeypatch.setattr(room.mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(room.mx, "device_info", lambda: info)
    monkeypatch.setattr(room.mx, "get_active_memory", lambda: 3000)
    assert room.allowed() == 7000
    info.clear()
    assert room.allowed() is None
