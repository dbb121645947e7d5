"""A shared prefix: rows answer as if each had computed it, and it is kept once."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_lm

from mm1_mlx.caches.quantized import KVCache, QuantizedKVCache
from mm1_mlx.caches.shared import Prefix, SharedPrefixKVCache, share
from mm1_mlx.kernels import plain

PREFIX = [7, 120, 33, 9, 61, 90, 45, 200, 11, 3, 17, 88, 150]
QUESTIONS = [
    [5, 9, 14, 3],
    [8],
    [120, 33, 7, 61, 90, 45, 11, 3, 3, 17, 21, 22],
    [99, 100],
]
STEPS = 9
KINDS = {
    "plain": KVCache,
    "8 bits": lambda: QuantizedKVCache(64, 8),
    "4 bits": lambda: QuantizedKVCache(64, 4),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(decoder={"head_dim": 64})


def prefilled(model, kind, tokens=PREFIX):
    cache = [KINDS[kind]() for _ in model.layers]
    model(mx.array([tokens]), cache=cache)
    return cache


def greedy(model, prompt, cache):
    steps = generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=STEPS)
    return [int(token) for token, _ in steps]


def collect(generator, tokens):
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    return list(tokens.values())


@each_kind
def test_a_generators_rows_equal_single_runs(model, kind):
    prefix = prefilled(model, kind)
    expected = [greedy(model, q, copy.deepcopy(prefix)) for q in QUESTIONS]
    assert len({tuple(tokens) for tokens in expected}) == len(QUESTIONS)
    generator = BatchGenerator(model, max_tokens=STEPS)
    caches = share(prefix, len(QUESTIONS))
    uids = generator.insert(
        QUESTIONS, caches=caches, all_tokens=[list(PREFIX) for _ in QUESTIONS]
    )
    assert collect(generator, {uid: [] for uid in uids}) == expected


@each_kind
def test_one_row_alone_equals_a_run_without_sharing(model, kind):
    prefix = prefilled(model, kind)
    ((cache),) = share(prefix, 1)
    expected = greedy(model, QUESTIONS[0], copy.deepcopy(prefix))
    assert greedy(model, QUESTIONS[0], cache) == expected


@each_kind
def test_logits_equal_single_ones(model, kind, assert_close):
    prefix = prefilled(model, kind)
    singles, expected = share(prefix, len(QUESTIONS)), []
    follow = mx.array([[50, 60, 70]])
    for question, cache in zip(QUESTIONS, singles, strict=True):
        whole = copy.deepcopy(prefix)
        for layers in (whole, cache):
            model(mx.array([question]), cache=layers)
        expected.append(model(follow, cache=whole))
    batch = [cs[0].merge(list(cs)) for cs in zip(*singles, strict=True)]
    result = model(mx.repeat(follow, len(QUESTIONS), axis=0), cache=batch)
    assert_close(result, mx.concatenate(expected), "op")


def test_the_batch_keeps_and_reads_the_prefix_once(model, monkeypatch):
    prefix = prefilled(model, "plain")
    caches = share(prefix, len(QUESTIONS))
    generator = BatchGenerator(model, max_tokens=STEPS)
    uids = generator.insert(QUESTIONS, caches=caches)
    runs = []

    def spy(q, run, **options):
        runs.append((q.shape[0], run.rows, run.length))
        return plain_state(q, run, **options)

    plain_state = plain.state
    monkeypatch.setattr(plain, "state", spy)
    collect(generator, {uid: [] for uid in uids})
    batched = [run for run in runs if run[0] == len(QUESTIONS)]
    of_prefix = [run for run in batched if run[2] == len(PREFIX) and run[1] == 1]
    assert len(of_prefix) == len(batched) // 2 >= STEPS - 1
    assert all(rows == batch for batch, rows, n in batched if n != len(PREFIX))


def test_more_questions_join_a_running_batch(model):
    prefix = prefilled(model, "plain")
    caches = share(prefix, len(QUESTIONS))
    generator = BatchGenerator(model, max_tokens=STEPS)
    tokens = {}
    for question, cache in zip(QUESTIONS, caches, strict=True):
        (uid,) = generator.insert([question], caches=[cache])
        tokens[uid] = []
        for response in generator.next_generated():
            tokens[response.uid].append(response.token)
    shared = generator._generation_batch.prompt_cache[0]
    assert shared.prefix is caches[0][0].prefix
    expected = [greedy(model, q, copy.deepcopy(prefix)) for q in QUESTIONS]
    assert collect(generator, tokens) == expected


@each_kind
def test_rows_of_different_prefixes_go_on_apart(model, kind):
    first = prefilled(model, kind)
    second = prefilled(model, kind, PREFIX[::-1][:6])
    expected = [
        greedy(model, QUESTIONS[0], copy.deepcopy(first)),
        greedy(model, QUESTIONS[1], copy.deepcopy(second)),
    ]
    rows = [share(first, 1)[0], share(second, 1)[0]]
    generator = BatchGenerator(model, max_tokens=STEPS)
    uids = generator.insert(QUESTIONS[:2], caches=rows)
    assert collect(generator, {uid: [] for uid in uids}) == expected
    # And when the second comes while the first is running.
    rows = [share(first, 1)[0], share(second, 1)[0]]
    generator, tokens = BatchGenerator(model, max_tokens=STEPS), {}
    for question, row in zip(QUESTIONS[:2], rows, strict=True):
        (uid,) = generator.insert([question], caches=[row])
        tokens[uid] = []
        for response in generator.next_generated():
            tokens[response.uid].append(response.token)
    assert collect(generator, tokens) == expected


@each_kind
def test_joined_is_an_ordinary_cache(model, kind):
    prefix = prefilled(model, kind)
    (cache,) = share(prefix, 1)
    assert greedy(model, QUESTIONS[3], [c.joined() for c in cache]) == greedy(
        model, QUESTIONS[3], copy.deepcopy(prefix)
    )
    model(mx.array([QUESTIONS[0]]), cache=cache)
    whole = copy.deepcopy(prefix)
    model(mx.array([QUESTIONS[0]]), cache=whole)
    joined = [layer.joined() for layer in cache]
    assert isinstance(joined[0], mlx_lm.KVCache | mlx_lm.QuantizedKVCache)
    assert greedy(model, [4], joined) == greedy(model, [4], whole)


@each_kind
def test_going_on_with_the_prefix_changes_no_row(model, kind):
    prefix = prefilled(model, kind)
    follow = mx.array([QUESTIONS[0]])
    expected = model(follow, cache=share(prefix, 1)[0])
    (row,) = share(prefix, 1)
    mlx_lm.trim_prompt_cache(prefix, 10)
    model(mx.array([QUESTIONS[2]]), cache=prefix)
    assert mx.array_equal(model(follow, cache=row), expected)


@pytest.mark.parametrize("n", [2, 6])
def test_trim_reaches_into_the_prefix(model, n):
    prefix = prefilled(model, "plain")
    row, other = share(prefix, 2)
    model(mx.array([QUESTIONS[0]]), cache=row)
    assert mlx_lm.trim_prompt_cache(row, n) == n
    kept = (PREFIX + QUESTIONS[0])[:-n]
    expected = greedy(model, [4], prefilled(model, "plain", kept))
    assert greedy(model, [4], row) == expected
    assert other[0].offset == len(PREFIX)


@pytest.mark.parametrize("window", [4, 9])
def test_a_sliding_window_counts_positions_not_padding(
    make_model, window, assert_close
):
    model = make_model(decoder={"head_dim": 64, "sliding_window": window})
    prefix = prefilled(model, "plain")
    singles, expected = share(prefix, len(QUESTIONS)), []
    follow = mx.array([[50, 60, 70]])
    for question, cache in zip(QUESTIONS, singles, strict=True):
        whole = prefilled(model, "plain", PREFIX)
        for layers in (whole, cache):
            model(mx.array([question]), cache=layers)
        expected.append(model(follow, cache=whole))
    batch = [cs[0].merge(list(cs)) for cs in zip(*singles, strict=True)]
    result = model(mx.repeat(follow, len(QUESTIONS), axis=0), cache=batch)
    assert_close(result, mx.concatenate(expected), "op")


def test_bytes_count_the_prefix_once(model):
    prefix = prefilled(model, "plain")
    rows = share(prefix, 4)
    for row in rows:
        model(mx.array([[5]]), cache=row)
    batch = SharedPrefixKVCache.merge([row[0] for row in rows])
    own = sum(row[0].suffix.keys[:, :, :1].nbytes * 2 for row in rows)
    assert batch.nbytes == prefix[0].nbytes + own
    assert Prefix(KVCache()).runs == []
