"""Packed caches: rows of a batch answer as they would alone."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, maybe_quantize_kv_cache
from mlx_lm.models import cache as mlx_lm

from mm1_mlx.caches.quantized import BatchQuantizedKVCache, KVCache, QuantizedKVCache

PROMPTS = [[5, 9, 14, 3, 77], [8], [120, 33, 7, 61, 90, 45, 200, 11, 3, 3, 17]]
STEPS = 9


@pytest.fixture(scope="module")
def model(make_model):
    # Heads that can be packed in groups.
    return make_model(decoder={"head_dim": 64})


def quantized(model, bits, group_size=64):
    return [QuantizedKVCache(group_size, bits) for _ in model.layers]


def greedy(model, prompt, cache):
    steps = generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=STEPS)
    return [int(token) for token, _ in steps]


def batched(model, prompts, caches, all_tokens=None):
    generator = BatchGenerator(model, max_tokens=STEPS)
    uids = generator.insert(prompts, caches=caches, all_tokens=all_tokens)
    tokens = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    return [tokens[uid] for uid in uids]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_generators_rows_equal_single_runs(model, bits):
    expected = [greedy(model, p, quantized(model, bits)) for p in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    caches = [quantized(model, bits) for _ in PROMPTS]
    assert batched(model, PROMPTS, caches) == expected


def test_prefilled_rows_equal_single_runs(model):
    expected = [greedy(model, p, quantized(model, 8)) for p in PROMPTS]
    caches = [quantized(model, 8) for _ in PROMPTS]
    for prompt, cache in zip(PROMPTS, caches, strict=True):
        if prompt[:-1]:
            model(mx.array([prompt[:-1]]), cache=cache)
    last = [prompt[-1:] for prompt in PROMPTS]
    before = [prompt[:-1] for prompt in PROMPTS]
    assert batched(model, last, caches, before) == expected


def test_a_row_may_join_later(model):
    generator = BatchGenerator(model, max_tokens=STEPS)
    tokens = {}
    for prompt in PROMPTS:
        (uid,) = generator.insert([prompt], caches=[quantized(model, 8)])
        tokens[uid] = []
        for response in generator.next_generated():
            tokens[response.uid].append(response.token)
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    expected = [greedy(model, p, quantized(model, 8)) for p in PROMPTS]
    assert list(tokens.values()) == expected


def test_batched_logits_equal_single_ones(model, assert_close):
    singles, logits = [], []
    for prompt in PROMPTS:
        cache = quantized(model, 8)
        model(mx.array([prompt]), cache=cache)
        singles.append(cache)
        logits.append(model(mx.array([[50, 60, 70]]), cache=copy.deepcopy(cache)))
    batch = [cs[0].merge(list(cs)) for cs in zip(*singles, strict=True)]
    result = model(mx.array([[50, 60, 70]] * len(PROMPTS)), cache=batch)
    assert_close(result, mx.concatenate(logits), "op")


def test_mlx_lms_switch_from_plain_to_packed_gives_ours(model):
    cache = [KVCache() for _ in model.layers]
    model(mx.array([PROMPTS[2]]), cache=cache)
    maybe_quantize_kv_cache(cache, 11, 64, 4)
    assert all(type(layer) is QuantizedKVCache for layer in cache)
    assert (cache[0].bits, cache[0].offset) == (4, 11)
    assert isinstance(cache[0].merge([cache[0]]), BatchQuantizedKVCache)


def test_saved_and_loaded_by_mlx_lm(model, tmp_path):
    cache = quantized(model, 8)
    model(mx.array([PROMPTS[2]]), cache=cache)
    mlx_lm.save_prompt_cache(str(tmp_path / "c.safetensors"), cache)
    loaded = mlx_lm.load_prompt_cache(str(tmp_path / "c.safetensors"))
    ours = [QuantizedKVCache.of(layer) for layer in loaded]
    assert greedy(model, [4], ours) == greedy(model, [4], cache)


def rows(B=3, T=5, seed=0):
    keys = [mx.random.key(seed + i) for i in range(2)]
    return [mx.random.normal((B, 2, T, 64), key=key) for key in keys]


def filled(padding, T=5, seed=0):
    cache = BatchQuantizedKVCache(padding, bits=8)
    cache.update_and_fetch(*rows(len(padding), T, seed))
    return cache


def same(left, right):
    pairs = zip([*left.keys, *left.values], [*right.keys, *right.values], strict=True)
    n = left.size()
    return n == right.size() and all(
        mx.array_equal(x[:, :, :n], y[:, :, :n]) for x, y in pairs
    )


def test_extract_undoes_merge():
    cache = filled([2, 0, 1])
    singles = [cache.extract(i) for i in range(3)]
    assert [single.offset for single in singles] == [3, 5, 4]
    again = QuantizedKVCache.merge(singles)
    assert again.left_padding.tolist() == [2, 0, 1]
    assert again.offset.tolist() == [3, 5, 4]
    for i in range(3):
        assert same(again.extract(i), singles[i])


def test_buffers_grow_like_those_of_single_caches():
    batch = filled([0, 0], T=250)
    singles = [batch.extract(i) for i in range(2)]
    for T in (5, 1, 300):
        k, v = rows(2, T, seed=T)
        batch.update_and_fetch(k, v)
        for i, single in enumerate(singles):
            single.update_and_fetch(k[i : i + 1], v[i : i + 1])
    for i, single in enumerate(singles):
        assert same(batch.extract(i), single)
    assert batch.size() == 556


def test_filter_keeps_rows_and_drops_common_padding():
    cache = filled([2, 0, 1])
    expected = cache.extract(2)
    cache.filter([0, 2])
    assert (cache.size(), cache.left_padding.tolist()) == (4, [1, 0])
    assert same(cache.extract(1), expected)


def test_extend_aligns_the_ends():
    cache, other = filled([1, 0]), filled([0], T=3, seed=5)
    expected = other.extract(0)
    cache.extend(other)
    assert cache.left_padding.tolist() == [1, 0, 2]
    assert same(cache.extract(2), expected)


def test_padding_at_the_right_moves_to_the_left():
    cache = BatchQuantizedKVCache([0, 0], bits=8)
    k, v = rows(2)
    cache.prepare(lengths=[5, 3], right_padding=[0, 2])
    cache.update_and_fetch(k, v)
    cache.finalize()
    single = QuantizedKVCache(bits=8)
    single.update_and_fetch(k[1:, :, :3], v[1:, :, :3])
    assert cache.offset.tolist() == [5, 3]
    assert same(cache.extract(1), single)


def test_trim_state_and_bytes():
    cache = filled([1, 0])
    again = BatchQuantizedKVCache.from_state(cache.state)
    assert again.trim(2) == 2
    assert (again.size(), again.offset.tolist()) == (3, [2, 3])
    # 256 places, 2 rows, 2 heads, keys and values: codes, a scale and a bias each.
    assert cache.nbytes == 256 * 2 * 2 * 2 * (64 + 4 + 4)
    assert BatchQuantizedKVCache([0]).empty()
    assert not cache.empty()


def test_rows_that_are_packed_differently_do_not_meet():
    with pytest.raises(ValueError, match="packed alike"):
        QuantizedKVCache.merge([QuantizedKVCache(64, 4), QuantizedKVCache(64, 8)])
    with pytest.raises(ValueError, match="packed alike"):
        filled([0]).extend(BatchQuantizedKVCache([0], bits=4))
