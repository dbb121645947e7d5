"""The table of Macs says what was measured on them, and what they let a GPU use."""

import pytest

from mm1_mlx.chips import CHIPS, Chip, gpu_memory, smallest_memory

# Percent of the bandwidth at 16 and at 4 bits, and of the operations with prompts, as
# they were worked out by hand from llama.cpp's table.
SHARES = {
    ("M1", 8): (None, 79, 61),
    ("M1 Pro", 16): (86, 70, 78),
    ("M1 Max", 32): (78, 58, 77),
    ("M1 Ultra", 64): (62, 40, 74),
    ("M2", 10): (91, 84, 75),
    ("M2 Pro", 19): (88, 74, 75),
    ("M2 Max", 38): (83, 63, 75),
    ("M2 Ultra", 76): (69, 45, 69),
    ("M3", 10): (None, 82, 61),
    ("M3 Pro", 18): (89, 78, 64),
    ("M3 Max", 30): (88, 72, 74),
    ("M3 Max", 40): (85, 63, 73),
    ("M3 Ultra", 80): (65, 43, 72),
    ("M4", 10): (83, 77, 67),
    ("M4 Pro", 20): (85, 71, 67),
    ("M4 Max", 32): (80, 65, 67),
    ("M4 Max", 40): (78, 58, 67),
    ("M5 Max", 40): (None, 74, 64),
}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda c: f"{c.name}, {c.gpu_cores}")
def test_shares_follow_from_rates(chip):
    found = chip.decode_share(16), chip.decode_share(4), chip.prefill_share
    expected = SHARES.get((chip.name, chip.gpu_cores), (None, None, None))
    for share, percent in zip(found, expected, strict=True):
        assert (share is None) == (percent is None)
        assert share is None or 100 * share == pytest.approx(percent, abs=1.01)


def test_no_chip_beats_its_own_limits():
    for chip in CHIPS:
        shares = *map(chip.decode_share, (16, 8, 4)), chip.prefill_share
        assert all(0.3 < share < 1 for share in shares if share)
        assert list(chip.memory) == sorted(chip.memory)
        assert chip.flops / chip.bandwidth < 130


@pytest.mark.parametrize(
    ("memory", "megabytes"),
    # What Metal answered, as llama.cpp's logs print it.
    [(8, 5726.63), (16, 11453.25), (24, 17179.89), (32, 22906.50), (36, 28991.03),
     (64, 51539.61)],
)  # fmt: skip
def test_a_gpu_may_use_what_metal_said(memory, megabytes):
    assert gpu_memory(memory) == pytest.approx(megabytes * 1e6, rel=1e-4)


def test_the_smallest_mac_is_found():
    assert smallest_memory(5e9) == 8
    assert smallest_memory(6e9) == 16
    assert smallest_memory(400e9) == 512
    assert smallest_memory(500e9) is None


def test_the_slower_of_bytes_and_operations_counts():
    chip = Chip("x", 1, bandwidth=10, flops=100, memory=(8,))
    assert chip.seconds(100, 50) == 5
    assert chip.seconds(1000, 50) == 10
