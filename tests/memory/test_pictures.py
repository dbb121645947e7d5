"""Pictures that were decoded before are not decoded again, and are the same."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mm1_mlx import generate, load
from mm1_mlx.errors import PromptError
from mm1_mlx.image import Frame, decode, load_pictures, loading
from mm1_mlx.memory.pictures import PictureCache
from mm1_mlx.resolution import parse_mode
from mm1_mlx.runtime import TINY


def picture(seed, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def decoded(monkeypatch):
    """How many pictures were decoded."""
    made = []

    def counted(image, name):
        made.append(name)
        return decode(image, name)

    monkeypatch.setattr(loading, "decode", counted)
    return made


@pytest.fixture
def config(make_config):
    return make_config().image


def same(one, other):
    assert one.digest == other.digest
    for a, b in zip(one.tiles, other.tiles, strict=True):
        assert (a == b).all()


def test_a_picture_is_decoded_once_by_any_name(tmp_path, config, decoded):
    seen, data = PictureCache(), picture(0)
    (tmp_path / "a.png").write_bytes(data)
    (first,) = load_pictures([data], config, seen=seen)
    (again,) = load_pictures([tmp_path / "a.png"], config, seen=seen)
    assert len(decoded) == 1
    assert again is first
    (alone,) = load_pictures([data], config)
    same(first, alone)
    # The file has changed: so has the picture.
    (tmp_path / "a.png").write_bytes(picture(1))
    (other,) = load_pictures([tmp_path / "a.png"], config, seen=seen)
    assert other.digest != first.digest


def test_other_tiles_are_another_picture(config, decoded):
    seen, data = PictureCache(), picture(0)
    tiled = parse_mode("2x16", config)
    ways = [
        (config, None),
        (tiled, None),
        (tiled, 0),
        (replace(config, resize="pad"), None),
    ]
    for own, count in ways:
        (found,) = load_pictures([data], own, tiled=count, seen=seen)
        same(found, load_pictures([data], own, tiled=count)[0])
    assert len(decoded) == 2 * len(ways)
    for own, count in ways:
        load_pictures([data], own, tiled=count, seen=seen)
    assert len(decoded) == 2 * len(ways)


def test_frames_and_pillow_images_are_not_kept(config):
    seen = PictureCache()
    image = Image.open(io.BytesIO(picture(0)))
    load_pictures([image, Frame(image)], config, seen=seen)
    assert seen.nbytes == 0


def test_what_was_used_longest_ago_goes(config):
    (one,) = load_pictures([picture(0)], config)
    size = sum(tile.nbytes for tile in one.tiles)
    seen = PictureCache(3 * size)
    for key in "abc":
        seen.keep(key, one)
    assert seen.find("a") is one
    seen.keep("d", one)
    assert [key for key in "abcd" if seen.find(key)] == ["a", "c", "d"]
    assert seen.nbytes == 3 * size
    seen.clear()
    assert seen.nbytes == 0
    small = PictureCache(size - 1)
    small.keep("a", one)
    assert (small.find("a"), small.nbytes) == (None, 0)


def test_limits_hold_for_pictures_that_are_known(config):
    seen, data = PictureCache(), picture(0)
    load_pictures([data], config, seen=seen)
    with pytest.raises(PromptError, match="25 pictures were given"):
        load_pictures([data] * 25, config, seen=seen)


def test_a_conversation_decodes_its_pictures_once(decoded):
    star = (TINY / "red-star.png").read_bytes()
    question = "What colour is the star?"
    with load() as runtime:
        one = generate(runtime, question, [star])
        two = generate(runtime, question, [star])
        assert len(decoded) == 1
        runtime.forget()
        three = generate(runtime, question, [star])
        assert len(decoded) == 2
    assert one.text == two.text == three.text == "red"
