"""Pictures in, normalised tiles out: parity with transformers, modes, limits, damage."""

import base64
import io
import json
import random
import re
import struct
import subprocess
import sys
import threading
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from mm1_mlx import resize as resize_module
from mm1_mlx.config import ImageConfig
from mm1_mlx.errors import PromptError
from mm1_mlx.image import DECODERS, Limits, load_picture, load_pictures

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def make_config(size, resize="squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    return ImageConfig(size=size, resize=resize, mean=mean, std=std)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width=24, height=20, channels=3):
    ramp = np.linspace(0, 255, width * height * channels)
    return Image.fromarray(ramp.reshape(height, width, channels).astype(np.uint8))


def data_uri(data, mime="image/png"):
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def levels(picture):
    """The tile as 8-bit values; only for mean 0, std 1."""
    return np.rint(picture.tiles[0] * 255).astype(int)


@pytest.fixture
def decodes(monkeypatch):
    """The formats of the pictures decoded so far."""
    seen = []
    load = ImageFile.ImageFile.load

    def counting_load(self):
        seen.append(self.format)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting_load)
    return seen


# Parity


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage.data")
    datasets = pytest.importorskip("sklearn.datasets")
    arrays = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    arrays += datasets.load_sample_images().images
    whole = [Image.fromarray(array) for array in arrays]
    tall = [photo.transpose(Image.Transpose.ROTATE_90) for photo in whole]
    odd = [photo.crop((3, 5, 404, 206)) for photo in whole]
    narrow = [photo.resize((37, 301)) for photo in whole[:2]]
    jpeg = [Image.open(io.BytesIO(encode(whole[4], "JPEG")))]
    return whole + tall + odd + narrow + jpeg


def reference_processor(resize, size):
    square = {"height": size, "width": size}
    if resize == "squash":
        clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
        return clip.CLIPImageProcessorPil(size=square, do_center_crop=False)
    shortest = {"shortest_edge": size}
    if resize == "crop":
        clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
        return clip.CLIPImageProcessorPil(size=shortest, crop_size=square)
    llava = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    return llava.LlavaImageProcessorPil(size=shortest, crop_size=square, do_pad=True)


@pytest.mark.reference
@pytest.mark.parametrize("size", [30, 224, 336, 378])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_tiles_equal_transformers(resize, size, photographs):
    processor = reference_processor(resize, size)
    config = make_config(size, resize, CLIP_MEAN, CLIP_STD)
    for photo in photographs:
        expected = np.asarray(processor(photo)["pixel_values"][0]).transpose(1, 2, 0)
        picture = load_picture(photo, config)
        assert picture.size == photo.size
        assert picture.tiles[0].dtype == np.float32
        np.testing.assert_allclose(picture.tiles[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(60, 31), (31, 60), (40, 40)])
def test_pad_puts_the_picture_in_the_middle_of_the_mean_colour(size):
    photo = gradient(*size)
    side = max(size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * mean) for mean in CLIP_MEAN]
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(photo)
    config = make_config(side, "pad", CLIP_MEAN, CLIP_STD)
    expected = (square / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(
        load_picture(photo, config).tiles[0], expected, rtol=0, atol=1e-6
    )


# The overshoot of two bicubic passes is cut after each, so their order shows.
@pytest.mark.parametrize(("resize", "most"), [("crop", 2), ("pad", 16)])
def test_strips_take_a_thrifty_path_with_nearly_equal_results(
    resize, most, photographs, monkeypatch
):
    config = make_config(336, resize)
    plain = [levels(load_picture(photo, config)) for photo in photographs]
    monkeypatch.setattr(resize_module, "_MAX_ENLARGED", 0)
    monkeypatch.setattr(resize_module, "_MAX_SQUARE", 0)
    for photo, expected in zip(photographs, plain, strict=True):
        difference = np.abs(levels(load_picture(photo, config)) - expected)
        assert difference.max() <= most
        assert difference.mean() < 0.25


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (16384, 2), (2, 16384)])
def test_the_thinnest_pictures_become_tiles(size, resize):
    config = make_config(336, resize, CLIP_MEAN, CLIP_STD)
    picture = load_picture(Image.new("RGB", size, "white"), config)
    assert picture.size == size
    assert picture.tiles[0].shape == (336, 336, 3)
    if resize != "pad":
        white = (1 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        np.testing.assert_allclose(
            picture.tiles[0], np.broadcast_to(white, (336, 336, 3)), rtol=0, atol=1e-6
        )


# Modes


MODES = [
    ("1", 255, (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("LA", (77, 255), (77, 77, 77)),
    ("LA", (77, 0), (255, 255, 255)),
    ("LA", (0, 128), (127, 127, 127)),
    ("La", (50, 128), (177, 177, 177)),
    ("PA", (1, 255), (10, 20, 30)),
    ("PA", (1, 51), (206, 208, 210)),
    ("RGB", (1, 2, 3), (1, 2, 3)),
    ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
    ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
    ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
    ("RGBA", (200, 100, 0, 51), (244, 224, 204)),
    ("RGBa", (100, 50, 0, 128), (227, 177, 127)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("YCbCr", (76, 85, 255), (254, 0, 0)),
    ("HSV", (85, 255, 255), (0, 255, 0)),
    ("LAB", (255, 128, 128), (255, 255, 255)),
    ("I", 65535, (255, 255, 255)),
    ("I", 0x4DFF, (77, 77, 77)),
    ("I;16", 65535, (255, 255, 255)),
    ("I;16", 0x4DFF, (77, 77, 77)),
    ("I;16L", 0x4DFF, (77, 77, 77)),
    ("I;16B", 0x4DFF, (77, 77, 77)),
    ("I;16N", 0x4DFF, (77, 77, 77)),
    ("F", 76.6, (77, 77, 77)),
]


@pytest.mark.parametrize(("mode", "value", "expected"), MODES)
def test_every_mode_becomes_rgb(mode, value, expected):
    if mode == "LAB" and not features.check("littlecms2"):
        pytest.skip("this Pillow has no littlecms2")
    image = Image.new(mode, (2, 2), value)
    if mode == "PA":
        image.putpalette([9, 9, 9, 10, 20, 30])
    assert image.mode == mode
    found = levels(load_picture(image, make_config(1)))[0, 0]
    # Pillow's YCbCr and LAB tables are off by one here and there.
    assert np.abs(found - expected).max() <= (1 if mode in {"YCbCr", "LAB"} else 0)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_a_transparent_palette_colour_becomes_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1])
    data = encode(image, "PNG", transparency=transparency)
    assert levels(load_picture(data, make_config(2)))[0].tolist() == [
        [10, 20, 30],
        [255, 255, 255],
    ]


@pytest.mark.parametrize(
    ("mode", "value", "transparency"),
    [("L", 9, 9), ("RGB", (1, 2, 3), (1, 2, 3)), ("I;16", 700, 700), ("1", 0, 0)],
)
def test_a_transparent_colour_becomes_white(mode, value, transparency):
    data = encode(Image.new(mode, (2, 2), value), "PNG", transparency=transparency)
    assert levels(load_picture(data, make_config(1))).min() == 255


def test_sixteen_bit_grey_and_rgb_files_agree():
    samples = np.arange(0, 65536, 97, dtype=np.uint16)[:600].reshape(20, 30)
    rows = np.repeat(samples[..., None], 3, axis=2).astype(">u2")
    scan = b"".join(b"\0" + row.tobytes() for row in rows)
    grey = encode(Image.fromarray(samples), "PNG")
    colour = png(30, 20, depth=16, colour=2, pixels=zlib.compress(scan))
    config = make_config(30)
    assert load_picture(grey, config).digest == load_picture(colour, config).digest


@pytest.mark.parametrize(
    ("mode", "value"), [("I", -1), ("I", 65536), ("F", 255.5), ("F", float("nan"))]
)
def test_samples_without_a_known_range_are_refused(mode, value):
    with pytest.raises(PromptError, match=rf"samples of .* in mode '{mode}', expected"):
        load_picture(Image.new(mode, (2, 2), value), make_config(2))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), name) for name in ("lime", "red", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert levels(load_picture(data, make_config(1))).tolist() == [[[0, 255, 0]]]


def test_a_pillow_image_gives_the_frame_it_is_at_and_stays_open():
    frames = [Image.new("RGB", (8, 8), name) for name in ("lime", "red")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    assert levels(load_picture(image, make_config(1))).tolist() == [[[255, 0, 0]]]
    image.seek(0)
    assert levels(load_picture(image, make_config(1))).tolist() == [[[0, 255, 0]]]


# EXIF


# What a camera stores of an upright picture, by orientation (EXIF 2.32, table 6).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_upright_picture(orientation, kind):
    upright = gradient(24, 10)
    stored = np.ascontiguousarray(STORED[orientation](np.asarray(upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if kind == "WEBP" else {})
    data = encode(Image.fromarray(stored), kind, **options)
    picture = load_picture(data, make_config(30, "crop"))
    assert picture.size == (24, 10)
    assert picture.digest == load_picture(upright, make_config(30, "crop")).digest


def test_exif_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encode(gradient(24, 10), "PNG")
    late = plain[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[-12:]
    assert load_picture(late, make_config(8)).size == (10, 24)


@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0garbage " * 9])
def test_unreadable_exif_leaves_the_picture_as_it_is(exif):
    data = encode(gradient(24, 10), "JPEG", exif=exif)
    assert load_picture(data, make_config(8)).size == (24, 10)


# Sources


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    image = gradient()
    data = encode(image, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    sources = [path, str(path), data, image, data_uri(data), data_uri(data, "image/x")]
    pictures = load_pictures(sources, make_config(30))
    assert [picture.size for picture in pictures] == [(24, 20)] * 6
    assert len({picture.digest for picture in pictures}) == 1
    assert pictures[0].digest == load_picture(path, make_config(30)).digest


def test_the_digest_covers_pixels_and_size():
    config = make_config(8)
    sources = [
        Image.new("RGB", (10, 10), "red"),
        Image.new("RGB", (20, 10), "red"),
        Image.new("RGB", (10, 10), (254, 0, 0)),
    ]
    pictures = load_pictures(sources, config)
    assert np.array_equal(pictures[0].tiles[0], pictures[1].tiles[0])
    assert len({picture.digest for picture in pictures}) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.png", r"^'no/such.png' was not found; give the path of"),
        ("nul\0.png", r"^'nul\\x00.png' was not found; give the path of"),
        ("a" * 5000, r"^'a{100}\.\.\.a{50}' (was not found|cannot be opened)"),
        ("HTTPS://example.org/a.png", r"is a URL, expected a file; download it first"),
        ("http://example.org/a.png", r"is a URL, expected a file; download it first"),
        ("data:text/plain;base64,aGk=", r"^picture 1 is a data URI that starts with"),
        ("data:image/png,aGk=", r"expected 'data:image/png;base64,' or another"),
        ("data:image/png;base64", r"expected 'data:image/png;base64,' or another"),
        ("data:image/png;base64,a*==", r"^picture 1 is .* base64 is invalid; encode"),
        ("data:image/png;base64,aGk\u00e9", r"base64 is invalid; encode its bytes"),
        ("data:image/png;base64,", r"^picture 1 is empty \(0 bytes\)"),
        ("data:image/png;base64,aGk=", r"^picture 1 is not a PNG, .* that can be read"),
        (b"", r"^picture 1 is empty \(0 bytes\); save or download it again"),
        (b"<svg></svg>", r"^picture 1 is not a PNG, JPEG, WEBP, GIF, BMP picture"),
        (None, r"^picture 1 is of type NoneType, expected a path, a data URI, bytes"),
        (Image.new("RGB", (0, 5)), r"^picture 1 has 0 x 5 pixels, expected 1 to 16384"),
    ],
)
def test_a_source_that_is_no_picture_is_refused(source, message):
    with pytest.raises(PromptError, match=message):
        load_picture(source, make_config(8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"^'.*' is not a regular file; give the path of a picture file$"),
        ("empty.png", r"^'.*empty.png' is empty \(0 bytes\); save or download it"),
        (
            "text.png",
            r"^'.*text.png' is not a PNG, .*; convert it to PNG or JPEG first$",
        ),
        ("cut.png", r"^'.*cut.png' is damaged or cut short \(PNG\); save or download"),
        ("picture.tiff", r"^'.*picture.tiff' is not a PNG, .* that can be read"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_by_its_path(name, message, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(encode(gradient(), "PNG")[:120])
    gradient().save(tmp_path / "picture.tiff")
    with pytest.raises(PromptError, match=message):
        load_picture(tmp_path / name, make_config(8))


@pytest.mark.skipif(sys.platform == "win32", reason="has no /dev/zero")
def test_a_device_is_refused():
    with pytest.raises(PromptError, match="'/dev/zero' is not a regular file"):
        load_picture("/dev/zero", make_config(8))


def test_a_bad_picture_among_good_ones_is_named_by_its_place(decodes):
    good = encode(gradient(), "PNG")
    with pytest.raises(PromptError, match=r"^picture 2 is not a PNG"):
        load_pictures([good, b"bad", good], make_config(8))
    assert decodes == []


# HEIC and AVIF


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_heic_and_avif_name_the_extra(brand, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftyp" + brand + bytes(60)
    with pytest.raises(PromptError, match=r'pip install "mm1-mlx\[heic\]" to read it'):
        load_picture(data, make_config(8))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", types.ModuleType("pillow_heif"))
    picture = load_picture(encode(gradient(), "AVIF"), make_config(8))
    assert picture.size == (24, 20)


def test_heic_is_read_with_the_extra():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(gradient(64, 48)).save(buffer)
    assert load_picture(buffer.getvalue(), make_config(8)).size == (64, 48)


def test_a_video_is_not_taken_for_heic():
    data = b"\0\0\0\x18ftypisom" + bytes(60)
    with pytest.raises(PromptError, match=r"^picture 1 is not a PNG, JPEG"):
        load_picture(data, make_config(8))


# Limits


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_decode_counter_counts(kind, decodes):
    load_picture(encode(gradient(), kind), make_config(8))
    assert set(decodes) == {kind}


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_pictures=2), "^3 pictures were given, expected at most 2; ask"),
        (
            Limits(max_pixels=479),
            "^picture 1 has 24 x 20 pixels, .* at most 479 in all",
        ),
        (Limits(max_side=23), "^picture 1 has 24 x 20 pixels, expected 1 to 23 a side"),
        (
            Limits(max_total_pixels=1439),
            "^3 pictures have 1440 pixels together, .* 1439",
        ),
        (Limits(max_bytes=40), "^picture 1 has more than 40 bytes; scale it down"),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_limits_are_checked_before_anything_is_decoded(kind, limits, message, decodes):
    sources = [encode(gradient(), kind)] * 3
    with pytest.raises(PromptError, match=message):
        load_pictures(sources, make_config(8), limits)
    assert decodes == []


def test_a_picture_at_every_limit_is_taken(tmp_path):
    data = encode(gradient(), "PNG")
    # One byte more than a multiple of three: base64 pads it with two signs.
    data += bytes(-len(data) % 3 + 1)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    limits = Limits(
        max_pictures=3,
        max_pixels=480,
        max_total_pixels=1440,
        max_side=24,
        max_bytes=len(data),
    )
    sources = [data, path, data_uri(data)]
    assert len(load_pictures(sources, make_config(8), limits)) == 3


@pytest.mark.parametrize("kind", ["file", "uri", "bytes"])
def test_too_many_bytes_are_refused(kind, tmp_path):
    data = encode(gradient(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    source = {"file": path, "uri": data_uri(data), "bytes": data}[kind]
    limits = Limits(max_bytes=len(data) - 1)
    with pytest.raises(PromptError, match=f"has more than {len(data) - 1} bytes"):
        load_pictures([source], make_config(8), limits)


def test_default_limits_are_those_of_the_design():
    limits = Limits()
    assert limits.max_pictures == 24
    assert limits.max_pixels == 64_000_000
    assert limits.max_total_pixels == 128_000_000


# Bombs


def chunk(name, body):
    check = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


def png(width, height, depth, colour, pixels=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def patched(data, *patches):
    out = bytearray(data)
    for offset, patch in patches:
        out[offset : offset + len(patch)] = patch
    return bytes(out)


def bombs():
    one_bit = zlib.compress(bytes(13377 * (1 + 13377 // 8 + 1)), 9)
    jpeg = encode(gradient(), "JPEG")
    gif = encode(gradient(), "GIF")
    gif_frame = gif.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 24, 20))
    frames = [gradient(), gradient().rotate(180)]
    webp = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert webp[12:16] == b"VP8X"
    bmp = encode(gradient(), "BMP")
    wide = struct.pack("<HH", 65535, 2730)
    return {
        "png 1 bit 13377 x 13377": png(13377, 13377, 1, 0, one_bit),
        "png rgb 13377 x 13377": png(13377, 13377, 8, 2, zlib.compress(bytes(2**20))),
        "png palette 9000 x 9000": png(9000, 9000, 8, 3, zlib.compress(bytes(2**20))),
        "png 1 x 89 million": png(1, 89_000_000, 1, 0, zlib.compress(bytes(2**20))),
        "png 2 thousand million a side": png(2**31 - 1, 2**31 - 1, 8, 6),
        "jpeg 65535 x 65535": patched(
            jpeg, (jpeg.index(b"\xff\xc0") + 5, b"\xff\xff\xff\xff")
        ),
        "gif 65535 x 2730": patched(gif, (6, wide), (gif_frame + 5, wide)),
        "gif frame 65535 x 65535": patched(gif, (gif_frame + 5, b"\xff\xff\xff\xff")),
        "webp 65535 x 2730": patched(webp, (24, b"\xfe\xff\0\xa9\x0a\0")),
        "bmp 30000 x 30000": patched(bmp, (18, struct.pack("<ii", 30000, 30000))),
    }


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_is_refused_undecoded_and_without_warnings(name, decodes, recwarn):
    with pytest.raises(
        PromptError, match=r"^picture 1 has (\d+ x \d+|too many) pixels"
    ):
        load_picture(bombs()[name], make_config(8))
    assert decodes == []
    assert recwarn.list == []


BOMB_SCRIPT = """
import json, pathlib, resource, sys, time
from mm1_mlx.config import ImageConfig
from mm1_mlx.errors import PromptError
from mm1_mlx.image import load_picture

config = ImageConfig(size=8, resize="squash", mean=(0.0,) * 3, std=(1.0,) * 3)
*paths, good = sorted(pathlib.Path(sys.argv[1]).iterdir())
load_picture(good, config)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, seconds = peak(), {}
for path in paths * 3:
    start = time.perf_counter()
    try:
        load_picture(path, config)
    except PromptError:
        took = time.perf_counter() - start
        seconds[path.name] = min(took, seconds.get(path.name, took))
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([seconds, (peak() - before) * unit]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no resource module")
def test_bombs_are_refused_in_100_ms_and_50_mb(tmp_path):
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "~good").write_bytes(encode(gradient(), "WEBP"))
    command = [sys.executable, "-c", BOMB_SCRIPT, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, growth = json.loads(output)
    assert set(seconds) == set(bombs())
    assert max(seconds.values()) < 0.1
    assert growth < 50e6


# Damage


def samples():
    colour, alpha = gradient(), gradient(channels=4)
    palette = colour.convert("P")
    grey = Image.fromarray(np.asarray(alpha)[..., 0].astype(np.uint16) * 257)
    turned = colour.rotate(180)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(colour, "PNG"),
        encode(alpha, "PNG", exif=exif),
        encode(palette, "PNG", transparency=3),
        encode(grey, "PNG", transparency=5),
        encode(colour, "PNG", save_all=True, append_images=[turned]),
        encode(colour, "JPEG", exif=exif),
        encode(colour, "JPEG", progressive=True),
        encode(colour.convert("CMYK"), "JPEG"),
        encode(colour, "MPO", save_all=True, append_images=[turned]),
        encode(colour, "WEBP", exif=exif),
        encode(alpha, "WEBP", lossless=True),
        encode(colour, "WEBP", save_all=True, append_images=[turned]),
        encode(colour, "GIF"),
        encode(palette, "GIF", save_all=True, append_images=[turned], transparency=0),
        encode(colour, "BMP"),
        encode(palette, "BMP"),
        encode(alpha, "BMP"),
    ]


def mutated(data, rng):
    out = bytearray(data)
    # Half of the time only headers, where a flip does most.
    reach = len(out) if rng.random() < 0.5 else min(len(out), 120)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        out[rng.randrange(reach)] = rng.choice((0, 127, 128, 255, rng.randrange(256)))
    if rng.random() < 0.2:
        del out[rng.randrange(len(out)) :]
    return bytes(out)


@pytest.mark.parametrize("number", range(len(samples())))
def test_damaged_bytes_give_a_picture_or_one_sentence(number):
    rng = random.Random(number)
    data = samples()[number]
    config = make_config(30)
    refusals = []
    for _ in range(60):
        try:
            picture = load_picture(mutated(data, rng), config)
        except PromptError as error:
            refusals.append(error)
        else:
            assert picture.tiles[0].shape == (30, 30, 3)
            assert np.isfinite(picture.tiles[0]).all()
    assert refusals
    for error in refusals:
        assert re.fullmatch(r"picture 1 (is|has) [^\n]+; [^\n]+[^.\n]", str(error))
        assert not re.search(r"0x[0-9a-f]{6,}", str(error))
        assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_bytes_are_refused(kind):
    data = encode(gradient(96, 80), kind)
    for length in (1, 8, 20, 60, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(PromptError, match=r"^picture 1 is (not a PNG|damaged)"):
            load_picture(data[:length], make_config(8))


def test_a_closed_pillow_image_is_refused():
    image = Image.open(io.BytesIO(encode(gradient(), "PNG")))
    image.close()
    with pytest.raises(
        PromptError, match=r"^picture 1 is damaged or cut short \(PNG\)"
    ):
        load_picture(image, make_config(8))


def test_warning_filters_are_left_as_they_were():
    before = list(warnings.filters)
    with pytest.raises(PromptError, match="pixels"):
        load_picture(bombs()["png 1 bit 13377 x 13377"], make_config(8))
    assert warnings.filters == before


def test_warning_filters_are_left_as_they_were_by_several_threads():
    before = list(warnings.filters)
    jpeg = encode(gradient(), "JPEG")
    together = threading.Barrier(DECODERS)

    def load(_):
        together.wait(10)
        for _ in range(10):
            load_picture(jpeg, make_config(8))

    with ThreadPoolExecutor(DECODERS) as pool:
        list(pool.map(load, range(DECODERS)))
    assert warnings.filters == before


def test_one_pillow_image_in_the_hands_of_several_threads():
    # Large: loading takes long enough for the others to come in.
    noise = random.Random(3).randbytes(400 * 300 * 3)
    data = encode(Image.frombytes("RGB", (400, 300), noise), "PNG")
    expected = load_picture(data, make_config(32)).digest
    with ThreadPoolExecutor(DECODERS) as pool:
        for _ in range(20):
            shared = Image.open(io.BytesIO(data))
            found = [
                pool.submit(load_picture, shared, make_config(32)) for _ in range(8)
            ]
            assert {each.result().digest for each in found} == {expected}
