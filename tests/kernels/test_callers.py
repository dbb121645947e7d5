"""The kernels where they are called: in the steps of a batch, run here on the CPU."""

import mlx.core as mx
import pytest
from metal_cpu import CPUFactory
from mlx_lm.generate import BatchGenerator

from mm1_mlx.caches.quantized import KVCache, QuantizedKVCache
from mm1_mlx.caches.shared import share
from mm1_mlx.kernels import attention
from mm1_mlx.kernels.choice import Kernels

PROMPTS = [[5, 9, 14, 3, 77], [8], [120, 33, 7, 61, 90, 45, 200, 11, 3, 3, 17]]
PREFIX = [7, 120, 33, 9, 61, 90, 45, 200, 11, 3, 17, 88, 150]
STEPS = 5


class Watched(Kernels):
    """Kernels that keep what they attended over."""

    def __init__(self, factory, store):
        super().__init__("this CPU", factory, store, timed=False)
        self.seen = []

    def attend(self, q, runs, **options):
        self.seen.append((q.shape[2], [(run.rows, run.capacity) for run in runs]))
        return super().attend(q, runs, **options)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(decoder={"head_dim": 64})


def packed(model):
    return [[QuantizedKVCache(64, 8) for _ in model.layers] for _ in PROMPTS]


def shared(model):
    prefix = [KVCache() for _ in model.layers]
    model(mx.array([PREFIX]), cache=prefix)
    return share(prefix, len(PROMPTS))


def generated(model, caches):
    generator = BatchGenerator(model, max_tokens=STEPS)
    uids = generator.insert(PROMPTS, caches=caches)
    tokens = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    return tokens


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_factory")
@pytest.mark.parametrize(
    ("caches", "runs"),
    [
        # Buffers as they were allocated: handed over without a copy.
        (packed, [(3, 256)]),
        (shared, [(1, 256), (3, 256)]),
    ],
)
def test_a_batch_through_the_kernels(caches, runs, model, monkeypatch, tmp_path):
    expected = generated(model, caches(model))
    kernels = Watched(CPUFactory(orders=(0,)), tmp_path / "kernels.json")
    monkeypatch.setattr(attention, "current", lambda: kernels)
    assert generated(model, caches(model)) == expected
    steps = [seen for queries, seen in kernels.seen if queries == 1]
    # The shortest prompt is one step ahead of the others.
    assert steps.count(runs) == (STEPS - 1) * len(model.layers)
    assert len({tuple(tokens) for tokens in expected.values()}) > 1
