"""Experts do no more work than the dense layers they amount to, and take little longer."""

import json

import mlx.core as mx
import pytest

from benchmarks.moe import (
    EXPERTS,
    Switch,
    counted,
    expert_rows,
    interleave,
    main,
    make_config,
    measure,
    ratio,
    work,
)
from mm1_mlx.models.moe import SparseMLP


def test_work_of_a_hand_made_case():
    # Two MLPs of 4 x 10, over 3 rows and 1: three matrices of 40 each.
    done = work([3, 1], 4, 10)
    assert done["flops"] == 2 * 4 * 120
    assert done["bytes"] == 4 * (2 * 120 + 4 * (4 + 10 + 4 + 10 + 10 + 4))


@pytest.mark.parametrize("tokens", [3, 33, 1024])
def test_counted_work_equals_theory_and_the_active_parameters(tokens):
    layer = SparseMLP(make_config(16, 24), 0)
    x = mx.random.normal((1, tokens, 16), key=mx.random.key(0))
    rows = expert_rows(layer, x)
    with counted() as done:
        mx.eval(layer(x))
    assert done == work(rows, 16, 24)
    assert done["flops"] == work([tokens] * 2, 16, 24)["flops"]
    assert sum(rows) == 2 * tokens
    assert len(rows) <= min(EXPERTS, 2 * tokens)


def test_both_ways_compute_the_same(assert_close):
    config = make_config(16, 24)
    layer, other = SparseMLP(config, 0), Switch(config, 0)
    other.update(layer.parameters())
    x = mx.random.normal((1, 40, 16), key=mx.random.key(0))
    with counted() as done:
        assert_close(other(x), layer(x), "op")
    assert done["flops"] == work([40] * 2, 16, 24)["flops"]


def test_ratios_are_those_of_neighbours():
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == {"median": 2, "min": 2, "max": 3}
    calls = []

    def contestant(name):
        return lambda: calls.append(name) or mx.zeros(1)

    seconds = interleave({name: contestant(name) for name in "ab"}, rounds=2)
    assert calls == list("ababab")
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_results_say_where_they_were_measured(tmp_path, monkeypatch):
    out = tmp_path / "moe.json"
    command = ["moe", "--rounds", "1", "--sizes", "16x24", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    main()
    machine = json.loads(out.read_text())["machine"]
    assert machine["chip"]
    assert machine.keys() >= {"commit", "versions", "cpu_cores", "blas"}


@pytest.mark.drill
@pytest.mark.parametrize(("width", "hidden"), [(1024, 2048), (512, 1408)])
def test_a_prefill_takes_at_most_twice_the_dense_layers_and_a_quarter_of_switch_glu(
    width, hidden
):
    results = measure(width, hidden, rounds=5)
    assert results["prefill_4096"]["sparse_over_dense"]["median"] <= 2
    assert results["prefill_1024"]["switch_glu_over_sparse"]["median"] >= 4
