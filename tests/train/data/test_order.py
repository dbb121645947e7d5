"""Orders are permutations, mixtures hold their shares, and both know any position."""

import random
import time

import numpy as np
import pytest

from mm1_mlx.train.data.mixture import SPECS, read_mixture
from mm1_mlx.train.data.order import WINDOW, Order, Picks, _floor_sum, permute, scramble

TABLE_5 = [spec.weight for spec in read_mixture(SPECS / "mm1-sft.json").datasets]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 100, 1025])
def test_every_index_is_met_once(size):
    for key in range(3):
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_of_few_are_all_as_frequent():
    counts = {}
    for key in range(2400):
        order = tuple(permute(i, 4, scramble(key)) for i in range(4))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    # 100 each are expected; their spread is 10.
    assert max(abs(count - 100) for count in counts.values()) < 45


def test_rows_near_each_other_do_not_stay_near():
    size = 10_000
    order = np.array([permute(i, size, 5) for i in range(size)])
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.04
    # The mean distance of two numbers drawn from 0..n is n / 3.
    assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.04)


@pytest.mark.parametrize("blocks", [None, [3, 10, 1, 8, 5, 7, 2, 1, 4], [41]])
def test_every_row_comes_once_an_epoch_in_another_order_each_time(blocks):
    order = Order(41, 7, None if blocks is None else np.array(blocks))
    epochs = [[order[e * 41 + i] for i in range(41)] for e in range(3)]
    assert all(sorted(epoch) == list(range(41)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order[41 * 2 + 5] == epochs[2][5]


def test_an_order_stays_within_a_few_blocks():
    blocks = np.full(20, 50)
    order = Order(1000, 3, blocks)
    rows = np.array([order[i] for i in range(1000)])
    windows = (rows // 50).reshape(-1, 50 * WINDOW)
    assert [len(set(window)) for window in windows] == [WINDOW] * 5
    # Within them rows are mixed.
    assert np.abs(np.diff(rows)).mean() > 50


def test_the_sum_of_floors_is_the_sum_of_floors():
    draw = random.Random(1)
    for _ in range(2000):
        count, divisor = draw.randrange(30), draw.randrange(1, 30)
        step, first = draw.randrange(60), draw.randrange(-60, 60)
        expected = sum((first + step * i) // divisor for i in range(count))
        assert _floor_sum(count, divisor, step, first) == expected


@pytest.mark.parametrize("weights", [[1], [45, 45, 10], TABLE_5, [1e-6, 1]])
def test_a_position_knows_how_many_came_before(weights):
    picks = Picks(weights, seed=3)
    seen = [0] * len(weights)
    for position in range(3000):
        chosen, before = picks[position]
        assert before == seen[chosen]
        seen[chosen] += 1
    assert [picks.count(3000, k) for k in range(len(weights))] == seen


@pytest.mark.parametrize("weights", [[45, 45, 10], TABLE_5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shares_hold_in_every_window(weights, seed):
    picks = Picks(weights, seed)
    chosen = np.array([picks[i][0] for i in range(10_000)])
    for number, weight in enumerate(weights):
        expected = np.arange(1, 10_001) * weight / sum(weights)
        excess = np.cumsum(chosen == number) - expected
        # What a window from a to b has too many is excess[b] - excess[a].
        assert excess.max() - excess.min() < 6


def test_seeds_begin_elsewhere():
    starts = {tuple(Picks([1, 1], seed)[i][0] for i in range(12)) for seed in range(9)}
    assert len(starts) > 4


def test_a_far_position_is_known_at_once():
    picks, order = Picks(TABLE_5, 0), Order(10**9, 1)
    start = time.process_time()
    for position in range(150_000 * 256, 150_000 * 256 + 256):
        _, before = picks[position]
        order[before]
    assert time.process_time() - start < 1
