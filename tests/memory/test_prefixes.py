"""What prompts share is found, cut and shared without harm to what is kept."""

import mlx.core as mx
import pytest

from mm1_mlx.caches.quantized import KVCache
from mm1_mlx.memory.prefixes import MAX_ENTRIES, KVPrecision, PrefixCache, common, pack

PLAIN = KVPrecision()
PICTURE = [("digest", i) for i in range(4)]


def filled(positions, layers=2, bits=None):
    """A cache whose keys at every position are its number, its values their double."""
    caches = [KVCache() for _ in range(layers)]
    row = mx.arange(len(positions), dtype=mx.float32)[None, None, :, None]
    keys = mx.broadcast_to(row, (1, 1, len(positions), 32))
    for cache in caches:
        cache.update_and_fetch(keys, 2 * keys)
    pack(caches, KVPrecision(bits, 32))
    return caches


def keys_of(cache):
    keys, _ = cache[0].keys_and_values()
    return keys[0, 0, :, 0].tolist()


def append(cache, value):
    for layer in cache:
        layer.update_and_fetch(*[mx.full((1, 1, 1, 32), value)] * 2)


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [2, 2, 3], 0),
        ([], [1], 0),
        ([1, *PICTURE, 5], [1, *PICTURE, 6], 5),
        ([1, *PICTURE], [1, ("other", 0), *PICTURE[1:]], 1),
        # The same picture, cut in another place.
        ([1, *PICTURE], [1, *PICTURE[1:]], 1),
    ],
)
def test_prompts_share_what_they_begin_with(one, other, shared):
    assert common(one, other) == common(other, one) == shared


def test_the_longest_beginning_is_taken():
    kept = PrefixCache(1 << 30)
    kept.keep([1, 2, 3, 4, 5], filled([1, 2, 3, 4, 5]), PLAIN)
    kept.keep([1, 2, 9], filled([1, 2, 9]), PLAIN)
    cache, length = kept.take([1, 2, 3, 4, 7, 8], PLAIN)
    assert length == 4
    assert keys_of(cache) == [0, 1, 2, 3]
    assert all(layer.offset == 4 for layer in cache)


def test_the_last_position_is_always_computed():
    kept = PrefixCache(1 << 30)
    kept.keep([1, 2, 3], filled([1, 2, 3]), PLAIN)
    assert kept.longest([1, 2, 3], PLAIN) == 2
    assert kept.take([1, 2, 3], PLAIN)[1] == 2


def test_an_unknown_beginning_gives_nothing():
    kept = PrefixCache(1 << 30)
    kept.keep([1, 2, 3], filled([1, 2, 3]), PLAIN)
    assert kept.take([2, 2, 3], PLAIN) == (None, 0)


def test_what_is_kept_survives_the_one_who_shares_it():
    kept = PrefixCache(1 << 30)
    long = list(range(10))
    kept.keep(long, filled(long), PLAIN)
    # Most of it is not shared, so that it stays for others.
    for value in (100.0, 200.0):
        cache, length = kept.take([0, 1, 2, 77], PLAIN)
        append(cache, value)
        assert length == 3
        assert keys_of(cache) == [0, 1, 2, value]
    cache, length = kept.take([*long, 10], PLAIN)
    assert keys_of(cache) == long


def test_what_is_continued_is_not_held_twice():
    kept = PrefixCache(1 << 30)
    kept.keep([1, 2, 3, 4], filled([1, 2, 3, 4]), PLAIN)
    kept.take([1, 2, 3, 9], PLAIN)
    assert kept.nbytes == 0


def test_a_longer_cache_replaces_its_beginnings():
    kept = PrefixCache(1 << 30)
    kept.keep([1, 2], filled([1, 2]), PLAIN)
    before = kept.nbytes
    kept.keep([1, 2, 3], filled([1, 2, 3]), PLAIN)
    assert kept.nbytes == before


def test_a_cache_that_is_ahead_of_what_is_known_is_cut():
    kept = PrefixCache(1 << 30)
    kept.keep([1, 2], filled([1, 2, 3]), PLAIN)
    cache, _ = kept.take([1, 2, 5], PLAIN)
    assert keys_of(cache) == [0, 1]


def test_the_one_used_longest_ago_goes_first():
    one = filled(range(3))
    size = sum(layer.nbytes for layer in one)
    kept = PrefixCache(2 * size)
    kept.keep([1, 1, 1], one, PLAIN)
    kept.keep([2, 2, 2], filled(range(3)), PLAIN)
    kept.keep([3, 3, 3], filled(range(3)), PLAIN)
    assert [kept.longest([n, n, n, n], PLAIN) for n in (1, 2, 3)] == [0, 3, 3]


def test_so_many_are_kept_that_looking_them_up_is_quick():
    kept = PrefixCache(1 << 30)
    for n in range(MAX_ENTRIES + 2):
        kept.keep([n, n, n], filled(range(3)), PLAIN)
    found = [n for n in range(MAX_ENTRIES + 2) if kept.longest([n, n, n, n], PLAIN)]
    assert found == [*range(2, MAX_ENTRIES + 2)]
    one = sum(layer.nbytes for layer in filled(range(3)))
    assert kept.nbytes == MAX_ENTRIES * one


def test_the_one_used_last_stays_until_room_is_needed():
    kept = PrefixCache(0)
    kept.keep([1, 2], filled([1, 2]), PLAIN)
    assert kept.longest([1, 2, 3], PLAIN) == 2
    kept.make_room()
    assert kept.longest([1, 2, 3], PLAIN) == 0


def test_another_precision_is_another_cache():
    kept = PrefixCache(1 << 30)
    eight = KVPrecision(8, 32)
    kept.keep([1, 2, 3], filled([1, 2, 3], bits=8), eight)
    assert kept.longest([1, 2, 3, 4], PLAIN) == 0
    cache, length = kept.take([1, 2, 3, 4], eight)
    assert (length, cache[0].bits) == (3, 8)


def test_packed_caches_are_shared_too():
    kept = PrefixCache(1 << 30)
    eight = KVPrecision(8, 32)
    kept.keep(range(10), filled(range(10), bits=8), eight)
    for _ in range(2):
        cache, _ = kept.take([0, 1, 2, 77], eight)
        append(cache, 5.0)
        codes, scales, biases = cache[0].keys_and_values()[0]
        keys = mx.dequantize(codes, scales, biases, group_size=32, bits=8)
        assert keys[0, 0, :, 0].tolist() == pytest.approx([0, 1, 2, 5], abs=1e-2)


def test_keys_are_packed_once_they_are_many():
    cache = filled(range(8))
    pack(cache, KVPrecision(4, 32, start=9))
    assert not hasattr(cache[0], "bits")
    pack(cache, KVPrecision(4, 32, start=8))
    assert [layer.bits for layer in cache] == [4, 4]


def test_so_few_positions_would_not_have_been_packed():
    kept = PrefixCache(1 << 30)
    later = KVPrecision(8, 32, start=4)
    kept.keep(range(6), filled(range(6), bits=8), later)
    assert kept.longest([0, 1, 2, 77], later) == 0
    assert kept.longest([0, 1, 2, 3, 77], later) == 4
