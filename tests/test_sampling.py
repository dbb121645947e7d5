"""Tokens are drawn by their own seed and position, and by nothing else."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.sampling import Sampler

LOGPROBS = mx.log(mx.softmax(mx.random.normal((6, 40), key=mx.random.key(0)), axis=-1))


def test_the_likeliest_token_is_taken_at_temperature_0():
    assert Sampler()(LOGPROBS).tolist() == mx.argmax(LOGPROBS, axis=-1).tolist()


def test_drawing_one_by_one_or_at_once_gives_the_same():
    one, all_ = Sampler(1.0, seed=3), Sampler(1.0, seed=3)
    alone = [int(one(LOGPROBS[i : i + 1])) for i in range(6)]
    assert all_(LOGPROBS).tolist() == alone


def test_other_draws_between_change_nothing():
    alone = Sampler(1.0, seed=3)(LOGPROBS).tolist()
    sampler = Sampler(1.0, seed=3)
    drawn = []
    for i in range(6):
        mx.random.normal((3,))
        Sampler(1.0, seed=4)(LOGPROBS)
        drawn += sampler(LOGPROBS[i : i + 1]).tolist()
    assert drawn == alone


def test_rewound_positions_are_drawn_again():
    sampler = Sampler(1.0, seed=3)
    whole = sampler(LOGPROBS).tolist()
    sampler.rewind(4)
    assert sampler(LOGPROBS[2:]).tolist() == whole[2:]


def test_seeds_differ_and_none_is_another_each_time():
    draws = {tuple(Sampler(2.0, seed=s)(LOGPROBS).tolist()) for s in range(20)}
    assert len(draws) > 15
    assert Sampler(1.0).seed != Sampler(1.0).seed


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_outermost_seeds_work(seed):
    Sampler(1.0, seed=seed)(LOGPROBS)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_draws_follow_the_distribution(temperature):
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    sampler = Sampler(temperature, seed=1)
    rows = mx.broadcast_to(logprobs, (4000, 4))
    counts = np.bincount(np.array(sampler(rows)), minlength=4) / 4000
    expected = np.array(mx.softmax(logprobs / temperature, axis=-1))[0]
    # Four standard deviations of a share of 4000 draws.
    assert np.abs(counts - expected).max() < 4 * 0.5 / 4000**0.5


def test_unlikely_tokens_are_left_out():
    logprobs = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    drawn = Sampler(1.0, top_p=0.75, seed=1)(mx.broadcast_to(logprobs, (500, 4)))
    assert set(drawn.tolist()) == {0, 1}
