"""Which attention runs: the dispatch, its numbers, and that it changes no input."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from attention_runs import exact, make_run, numbers
from mlx_lm.models import cache as mlx_lm

from mm1_mlx.caches.quantized import BatchQuantizedKVCache, KVCache, QuantizedKVCache
from mm1_mlx.caches.shared import share
from mm1_mlx.kernels import attend, attention, fused, plain
from mm1_mlx.kernels.run import runs_of

F32 = mx.float32
D = 64
CACHES = {
    "none": lambda: None,
    "plain": KVCache,
    "packed": lambda: QuantizedKVCache(64, 8),
    "mlx-lm's": lambda: mlx_lm.QuantizedKVCache(64, 8),
    "packed batch": lambda: BatchQuantizedKVCache([0], 64, 8),
    "shared": lambda: share([filled(KVCache())], 1)[0][0],
    "shared packed": lambda: share([filled(QuantizedKVCache(64, 8))], 1)[0][0],
}


def filled(cache, T=20):
    cache.update_and_fetch(
        numbers((1, 2, T, D), F32, 11), numbers((1, 2, T, D), F32, 12)
    )
    return cache


class FakeKernels:
    """Kernels that any variant may use, in plain operations."""

    def __init__(self, use=True):
        self.may = use
        self.calls = 0

    def use(self, _variant):
        return self.may

    def attend(self, q, runs, *, scale, causal):
        self.calls += 1
        return plain.attend(q, runs, scale=scale, mask="causal" if causal else None)


@pytest.fixture
def roads(monkeypatch):
    """The names of what ran."""
    taken = []

    def watch(module, name):
        original = getattr(module, name)

        def spy(*args, **options):
            taken.append(f"{module.__name__.rpartition('.')[2]}.{name}")
            return original(*args, **options)

        monkeypatch.setattr(module, name, spy)

    watch(plain, "attend")
    watch(fused, "attend")
    watch(fused, "attend_joined")
    return taken


def run_attend(kind, T, mask="causal"):
    cache = CACHES[kind]()
    k, v = (numbers((1, 2, T, D), F32, seed) for seed in (1, 2))
    q = numbers((1, 4, T, D), F32, 0)
    kept = mx.array(q) + 0
    mx.eval(kept)
    held = (k, v) if cache is None else cache.update_and_fetch(k, v)
    out = attend(q, *held, cache=cache, scale=0.125, mask=mask)
    mx.eval(out)
    assert mx.array_equal(q, kept)
    if cache is None:
        return out, None
    return out, exact(q, runs_of(cache), 0.125, causal=True)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("T", [1, 5, 12])
def test_numbers_on_a_cpu(kind, T, assert_close):
    out, expected = run_attend(kind, T)
    if expected is not None:
        assert_close(out, expected, "op")


TABLE = [
    # kind, T, on a CPU, on a GPU without kernels, with
    ("none", 1, ["fused.attend"], ["fused.attend"], ["fused.attend"]),
    ("plain", 12, ["fused.attend"], ["fused.attend"], ["fused.attend"]),
    ("packed", 1, ["plain.attend"], ["plain.attend"], "kernels"),
    ("packed", 8, ["plain.attend"], ["plain.attend"], "kernels"),
    ("packed", 9, "joined", "joined", "joined"),
    ("packed batch", 1, ["plain.attend"], ["plain.attend"], "kernels"),
    ("mlx-lm's", 1, ["plain.attend"], ["plain.attend"], "kernels"),
    ("shared packed", 1, ["plain.attend"], ["plain.attend"], "kernels"),
    ("shared", 1, ["plain.attend"], "joined", "kernels"),
    ("shared", 9, "joined", "joined", "joined"),
]
JOINED = ["fused.attend_joined", "fused.attend"]


@pytest.mark.parametrize(("kind", "T", "cpu", "bare", "kernels"), TABLE)
def test_dispatch(kind, T, cpu, bare, kernels, roads, monkeypatch):
    run_attend(kind, T)
    assert roads == (JOINED if cpu == "joined" else cpu)
    monkeypatch.setattr(plain, "on_cpu", lambda: False)
    for fake, expected in [
        (None, bare),
        (FakeKernels(use=False), bare),
        (FakeKernels(), kernels),
    ]:
        monkeypatch.setattr(attention, "current", lambda fake=fake: fake)
        roads.clear()
        run_attend(kind, T)
        if expected == "kernels":
            assert fake.calls == 1
        else:
            assert roads == (JOINED if expected == "joined" else expected)
            assert fake is None or not fake.calls


def test_a_batch_behind_one_prefix_is_not_copied_on_a_cpu(roads):
    rows = share([filled(KVCache())], 3)
    for row in rows:
        filled(row[0], 2)
    batch = rows[0][0].merge([row[0] for row in rows])
    k, v = (numbers((3, 2, 12, D), F32, seed) for seed in (1, 2))
    q = numbers((3, 4, 12, D), F32, 0)
    held = batch.update_and_fetch(k, v)
    attend(q, *held, cache=batch, scale=0.125, mask="causal")
    assert roads == ["plain.attend"]


def test_a_mask_in_numbers_needs_no_kernel(roads, monkeypatch):
    fake = FakeKernels()
    monkeypatch.setattr(attention, "current", lambda: fake)
    run_attend("packed", 1, mask=mx.ones((1, 1)) > 0)
    assert roads == ["plain.attend"]
    assert not fake.calls


@pytest.mark.parametrize("use", [True, False])
def test_a_run_of_no_keys_is_left_out(use, monkeypatch, assert_close):
    fake = FakeKernels(use)
    monkeypatch.setattr(attention, "current", lambda: fake)
    empty = make_run(1, 2, 0, D, dtype=F32, bits=8, group=64, room=8)
    own = make_run(1, 2, 9, D, dtype=F32, bits=8, group=64)
    cache = SimpleNamespace(runs=lambda: [empty, own])
    q = numbers((1, 4, 1, D), F32, 0)
    out = attend(q, None, None, cache=cache, scale=0.125, mask=None)
    assert_close(out, exact(q, [own], 0.125, causal=False), "op")
    assert fake.calls == use


def test_runs_of_a_batch_of_mlx_lms(assert_close):
    rows = [filled(KVCache(), T) for T in (3, 9)]
    batch = mlx_lm.BatchKVCache.merge(rows)
    (run,) = runs_of(batch)
    q = numbers((2, 4, 1, D), F32, 0)
    out = plain.attend(q, [run], scale=0.125, mask=None)
    for i, row in enumerate(rows):
        alone = exact(q[i : i + 1], runs_of(row), 0.125, causal=False)
        assert_close(out[i : i + 1], alone, "op")


def test_no_buffer_is_copied_for_a_run():
    cache = CACHES["packed batch"]()
    filled(cache)
    (run,) = runs_of(cache)
    assert (run.capacity, run.length) == (256, 20)
    assert all(a is b for a, b in zip(run.keys, cache.keys, strict=True))
    assert make_run(1, 1, 3, 64).capacity == 3
