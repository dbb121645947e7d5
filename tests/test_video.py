"""Videos become frames at even distances, or an error that says what to do."""

import io

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.errors import PromptError
from mm1_mlx.image import Frame, Limits, load_pictures
from mm1_mlx.prompt import Prompt
from mm1_mlx.video import choose_frames, load_frames


def grey(level):
    return Image.new("RGB", (16, 16), (level, level, level))


def level_of(frame):
    return int(np.asarray(frame.image.convert("RGB")).mean().round())


def animation(count, format="PNG", **options):
    buffer = io.BytesIO()
    frames = [grey(i) for i in range(count)]
    frames[0].save(
        buffer, format, save_all=True, append_images=frames[1:], duration=40, **options
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (1, 24, [0]),
        (5, 5, [0, 1, 2, 3, 4]),
        (10, 5, [1, 3, 5, 7, 9]),
        (100, 4, [12, 37, 62, 87]),
        (7, 2, [1, 5]),
    ],
)
def test_frames_are_the_middles_of_equal_stretches(total, count, expected):
    assert choose_frames(total, count) == expected


def test_24_of_many_frames_are_distinct_and_spread():
    chosen = choose_frames(1000, 24)
    gaps = np.diff(chosen)
    assert len(chosen) == 24
    assert set(gaps) <= {41, 42}


@pytest.mark.parametrize(
    ("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_an_animated_file_gives_its_frames(format, options, tmp_path):
    data = animation(10, format, **options)
    assert [level_of(f) for f in load_frames(data, 5)] == [1, 3, 5, 7, 9]
    path = tmp_path / "film.bin"
    path.write_bytes(data)
    assert [level_of(f) for f in load_frames(str(path), 2)] == [2, 7]


def test_a_folder_gives_its_pictures_in_the_order_of_their_numbers(tmp_path):
    for number in range(12):
        grey(number).save(tmp_path / f"frame-{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [level_of(f) for f in load_frames(tmp_path, 12)] == list(range(12))


def test_a_list_gives_its_pictures():
    frames = load_frames([grey(level) for level in (5, 9, 7)], 24)
    assert [level_of(frame) for frame in frames] == [5, 9, 7]
    assert all(isinstance(frame, Frame) for frame in frames)


@pytest.mark.parametrize(
    ("source", "count", "message"),
    [
        ("missing.mp4", 24, "'missing.mp4' was not found"),
        ("missing.gif", 24, "'missing.gif' was not found"),
        ([], 24, "the video has no frames"),
        (b"no picture", 24, "is not a PNG"),
        ([grey(1)], 0, "0 frames were asked for, expected 1 to 24"),
        ([grey(1)], 25, "25 frames were asked for, expected 1 to 24"),
        ([grey(1)], 2.5, "2.5 frames were asked for"),
        ([grey(1)], None, "None frames were asked for"),
        (7, 24, "a video is of type int, expected a path, bytes or a list"),
        (grey(1), 24, "expected a path, bytes or a list of pictures"),
        ("", 24, "the video's path is empty"),
        ("data:image/gif;base64,AAAA", 24, "picture 1 is not a PNG"),
    ],
)
def test_what_is_no_video_is_named(source, count, message):
    with pytest.raises(PromptError, match=message):
        load_frames(source, count)


def test_a_film_is_named_with_the_way_to_its_frames(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"....ftypisom")
    message = "is a film, which cannot be decoded here; .* ffmpeg -i film.mp4"
    with pytest.raises(PromptError, match=message):
        load_frames(tmp_path / "film.mp4")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(PromptError, match="holds no pictures; give a folder of frames"):
        load_frames(tmp_path)


def test_a_damaged_animation_is_named():
    data = bytearray(animation(8))
    with pytest.raises(PromptError, match="damaged or cut short"):
        load_frames(bytes(data[: len(data) // 2]), 8)


def test_frames_count_against_the_pixels_of_a_request():
    with pytest.raises(PromptError, match="4 frames have 1024 pixels together"):
        load_frames(animation(4), 4, Limits(max_total_pixels=1000))


def test_frames_that_are_only_drawn_on_the_way_count_too():
    # Of 40 frames of 16 x 16 the one in the middle is taken: 21 are drawn to reach it.
    limits = Limits(max_animation_pixels=21 * 256)
    assert len(load_frames(animation(40), 1, limits)) == 1
    limits = Limits(max_animation_pixels=21 * 256 - 1)
    with pytest.raises(PromptError, match="21 frames of 16 x 16 have 5376 pixels"):
        load_frames(animation(40), 1, limits)


def test_a_video_part_is_as_many_spans_of_frames(tiny_config, tokenizer):
    message = {
        "role": "user",
        "content": [
            {"type": "video", "video": [grey(0), grey(90), grey(200)], "frames": 2},
            {"type": "image", "image": grey(9)},
            {"type": "text", "text": "What colour?"},
        ],
    }
    prompt = Prompt.build([message], [], tiny_config, tokenizer)
    assert [span.kind for span in prompt.spans] == ["frame", "frame", "picture"]
    assert [span.picture for span in prompt.spans] == [0, 1, 2]
    expected = load_pictures([grey(0), grey(200), grey(9)], tiny_config.image)
    for picture, other in zip(prompt.pictures, expected, strict=True):
        assert np.array_equal(picture.tiles[0], other.tiles[0])
