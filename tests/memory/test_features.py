"""Pictures that were seen are not encoded again, and damage is no answer."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.layout import Picture
from mm1_mlx.memory.features import FeatureCache


def picture(digest, regions=()):
    return Picture((np.zeros((4, 4, 3), np.float32),), (4, 4), digest, regions=regions)


class Encoder:
    """Counts what it is asked, and makes image tokens of a picture's digest."""

    def __init__(self):
        self.seen = []

    def __call__(self, pictures):
        self.seen.append([p.digest for p in pictures])
        return [mx.full((2, 3), float(len(p.digest))) for p in pictures]


@pytest.fixture
def encoder():
    return Encoder()


def test_only_new_pictures_are_encoded(encoder):
    cache = FeatureCache(encoder, "model")
    cache([picture("a"), picture("bb")])
    tokens = cache([picture("bb"), picture("ccc"), picture("a")])
    assert encoder.seen == [["a", "bb"], ["ccc"]]
    assert [t[0, 0].item() for t in tokens] == [2, 3, 1]


def test_equal_pictures_of_a_prompt_are_encoded_once(encoder):
    tokens = FeatureCache(encoder, "model")([picture("a"), picture("a")])
    assert encoder.seen == [["a"]]
    assert len(tokens) == 2


def test_nothing_is_encoded_for_no_pictures(encoder):
    assert FeatureCache(encoder, "model")([]) == []
    assert encoder.seen == []


def test_other_regions_are_another_picture(encoder):
    cache = FeatureCache(encoder, "model")
    points = np.zeros((2, 2), np.float32)
    for regions in ((), (points,), (points + 1,), (points,)):
        cache([picture("a", regions)])
    assert len(encoder.seen) == 3


def test_the_picture_used_longest_ago_is_forgotten(encoder):
    size = 2 * 3 * 4
    cache = FeatureCache(encoder, "model", max_bytes=2 * size)
    cache([picture("a"), picture("bb")])
    cache([picture("a")])
    cache([picture("ccc")])
    cache([picture("a")])
    assert cache.nbytes == 2 * size
    cache([picture("bb")])
    assert encoder.seen == [["a", "bb"], ["ccc"], ["bb"]]


def test_another_process_finds_them_on_disk(encoder, tmp_path):
    first = FeatureCache(encoder, "model", tmp_path / "new")
    made = first([picture("a")])
    again = FeatureCache(encoder, "model", tmp_path / "new")([picture("a")])
    assert mx.array_equal(again[0], made[0])
    assert encoder.seen == [["a"]]


def test_another_model_does_not(encoder, tmp_path):
    FeatureCache(encoder, "model", tmp_path)([picture("a")])
    FeatureCache(encoder, "other", tmp_path)([picture("a")])
    assert len(encoder.seen) == 2


@pytest.mark.parametrize("damage", [b"", b"\xff" * 200, None])
def test_a_damaged_file_is_encoded_again(encoder, tmp_path, damage):
    FeatureCache(encoder, "model", tmp_path)([picture("a")])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3] if damage is None else damage)
    tokens = FeatureCache(encoder, "model", tmp_path)([picture("a")])
    assert tokens[0].tolist() == [[1.0] * 3] * 2
    assert len(encoder.seen) == 2


def test_the_disk_is_used_no_further_than_allowed(encoder, tmp_path):
    cache = FeatureCache(encoder, "model", tmp_path, max_disk_bytes=500)
    for i in range(8):
        cache([picture("x" * (i + 1))])
    held = [path.stat().st_size for path in tmp_path.iterdir()]
    assert 0 < sum(held) <= 500


def test_a_folder_that_cannot_be_written_stops_no_answer(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    cache = FeatureCache(encoder, "model", tmp_path / "file" / "folder")
    assert len(cache([picture("a")])) == 1
