"""Pictures as files, bytes or Pillow images -> normalised tiles [H, W, 3]. No mlx.

Limits are checked on headers, before anything is decoded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from mm1_mlx.config import DynamicTiling, ImageConfig
from mm1_mlx.errors import PromptError
from mm1_mlx.layout import Picture
from mm1_mlx.tiling import to_tiles


@dataclass(frozen=True)
class Frame:
    """A picture out of a video: never split into tiles."""

    image: Image.Image


@dataclass(frozen=True)
class Viewed:
    """A picture that becomes tiles in a way of its own; ``split``: several, if it may."""

    source: str | Path | bytes | Image.Image
    config: ImageConfig
    split: bool = True


class Seen(Protocol):
    """Pictures that were decoded before; ``memory.pictures.PictureCache`` is one."""

    def find(self, key: Hashable) -> Picture | None:
        """The picture that was kept under a key."""
        ...

    def keep(self, key: Hashable, picture: Picture) -> None:
        """Keep a picture for a while."""
        ...


# A str is a path or a ``data:image/...;base64,...`` URI.
ImageSource = str | Path | bytes | Image.Image | Frame | Viewed

# Pillow's other readers are rarely needed and have had most of its security holes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# What Pillow's readers raise on damaged bytes, beside DecompressionBombError.
_PILLOW_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
# How many pictures are decoded at a time, in all threads together: bounds the memory.
DECODERS = 4
_TURNS = threading.BoundedSemaphore(DECODERS)
# One of them for every Pillow image: in the hands of several threads, one loads it.
_LOADING = tuple(threading.Lock() for _ in range(61))

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Limits:
    """What one request may bring, checked before the first picture is decoded."""

    max_pictures: int = 24
    # Pixels of one picture, of all together, and along one side.
    max_pixels: int = 64_000_000
    max_total_pixels: int = 128_000_000
    # Pixels of an animation's frames up to the last one that is wanted: to reach it, all
    # before it are drawn.
    max_animation_pixels: int = 1_000_000_000
    # Pixels of all tiles together.
    max_tile_pixels: int = 2**27
    max_side: int = 16_384
    # Encoded bytes of one picture.
    max_bytes: int = 32 * 2**20


DEFAULT_LIMITS = Limits()


def load_picture(source: ImageSource, config: ImageConfig) -> Picture:
    """The picture as normalised tiles [size, size, 3]; see ``load_pictures``."""
    return load_pictures([source], config)[0]


def load_pictures(
    sources: Sequence[ImageSource],
    config: ImageConfig,
    limits: Limits = DEFAULT_LIMITS,
    *,
    tiled: int | None = None,
    seen: Seen | None = None,
) -> list[Picture]:
    """The pictures in order, upright, as normalised tiles [size, size, 3].

    Of an animation the first frame is taken; of a Pillow image the frame it is at.

    Args:
        sources: the pictures.
        config: how they become tiles.
        limits: what is refused.
        tiled: how many of the last pictures may become several tiles, None for all;
            those before stay at low resolution.
        seen: knows pictures by their encoded bytes, so that they need not be decoded.

    Raises:
        PromptError: a picture cannot be read, or a limit is exceeded.
    """
    if len(sources) > limits.max_pictures:
        raise PromptError(
            f"{len(sources)} pictures were given, expected at most "
            f"{limits.max_pictures}; ask about fewer at a time"
        )
    opened: deque[tuple[Image.Image, str, ImageSource]] = deque()
    digests: list[str | None] = []
    for number, source in enumerate(sources, start=1):
        name = name_of(source, number)
        content = _content(source, name, limits)
        digest = None
        if seen is not None and isinstance(content, bytes):
            digest = hashlib.sha256(content).hexdigest()
        digests.append(digest)
        opened.append((open_picture(content, name, limits), name, source))
    total = sum(image.width * image.height for image, _, _ in opened)
    if total > limits.max_total_pixels:
        raise PromptError(
            f"{len(sources)} pictures have {total} pixels together, expected at most "
            f"{limits.max_total_pixels}; scale them down or ask about fewer at a time"
        )
    whole = _count_whole(len(sources), config, tiled)
    views = [
        _view(source, config, split=number >= whole)
        for number, source in enumerate(sources)
    ]
    pixels = sum((own.max_tiles if split else 1) * own.size**2 for own, split in views)
    if pixels > limits.max_tile_pixels:
        raise PromptError(
            f"{len(sources)} pictures may become tiles of {pixels} pixels together, "
            f"expected at most {limits.max_tile_pixels}; ask about fewer, or at a lower "
            "resolution"
        )
    pictures = []
    for digest, (own, split) in zip(digests, views, strict=True):
        key = (digest, own, split)
        picture = seen.find(key) if seen is not None and digest else None
        # Popped, so that only one decoded picture is held at a time.
        image, name, source = opened.popleft()
        if picture is None:
            picture = _picture(image, name, source, own, split=split)
            if seen is not None and digest:
                seen.keep(key, picture)
        pictures.append(picture)
    return pictures


def _content(
    source: ImageSource, name: str, limits: Limits
) -> bytes | Image.Image | Frame:
    """What is decoded: the encoded bytes, where there are any."""
    if isinstance(source, Viewed):
        source = source.source
    if isinstance(source, Frame | Image.Image):
        return source
    data = _read(source, name, limits)
    _check_bytes(len(data), name, limits)
    return data


def _view(
    source: ImageSource, config: ImageConfig, *, split: bool
) -> tuple[ImageConfig, bool]:
    """How a picture becomes tiles, and whether it may become several."""
    if isinstance(source, Viewed):
        return source.config, split and source.split
    return config, split and not isinstance(source, Frame)


def _count_whole(count: int, config: ImageConfig, tiled: int | None) -> int:
    """How many of the first pictures stay one tile each."""
    tiling = config.tiling
    if isinstance(tiling, DynamicTiling) and count > tiling.max_pictures:
        return count
    return 0 if tiled is None else max(0, count - tiled)


def name_of(source: ImageSource, number: int) -> str:
    """What messages call a picture: its path, or its place among the pictures."""
    if isinstance(source, Viewed):
        return name_of(source.source, number)
    if isinstance(source, Path) or (isinstance(source, str) and not _is_data(source)):
        text = str(source)
        return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}")
    return f"picture {number}"


def open_picture(source: ImageSource, name: str, limits: Limits) -> Image.Image:
    """The picture with its header read and its size checked, not yet decoded.

    Raises:
        PromptError: it cannot be read, or is too large.
    """
    if isinstance(source, Viewed):
        source = source.source
    if isinstance(source, Frame):
        image = source.image
    elif isinstance(source, Image.Image):
        image = source
    else:
        data = _read(source, name, limits)
        _check_bytes(len(data), name, limits)
        formats = _formats(data, name)
        unreadable = (
            f"{name} is not a {', '.join(formats)} picture that can be read; "
            "convert it to PNG or JPEG first"
        )
        with pillow_guard(unreadable, name):
            image = Image.open(io.BytesIO(data), formats=formats)
    _check_size(image.size, name, limits)
    return image


def encoded(source: ImageSource, name: str, limits: Limits) -> bytes:
    """The picture as an encoded file: as it was given, a Pillow image as PNG.

    Raises:
        PromptError: it cannot be read, or is too large.
    """
    image = open_picture(source, name, limits)
    if isinstance(source, Viewed):
        source = source.source
    if isinstance(source, str | Path | bytes):
        return _read(source, name, limits)
    buffer = io.BytesIO()
    decode(image, name).save(buffer, "PNG")
    return buffer.getvalue()


def _read(source: str | Path | bytes, name: str, limits: Limits) -> bytes:
    """The encoded picture; of too long a file one byte more than the limit."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        return _read_file(source, name, limits)
    if not isinstance(source, str):
        raise PromptError(
            f"{name} is of type {type(source).__name__}, expected a path, a data URI, "
            "bytes or a Pillow image"
        )
    if source[:8].lower().startswith(("http://", "https://")):
        raise PromptError(
            f"{name} is a URL, expected a file; download it first and give its path"
        )
    if _is_data(source):
        return _read_data(source, name, limits)
    return _read_file(Path(source), name, limits)


def _is_data(source: str) -> bool:
    return source[:5].lower() == "data:"


def _read_data(source: str, name: str, limits: Limits) -> bytes:
    head, comma, payload = source.partition(",")
    kind = head.lower()
    if not (comma and kind.startswith("data:image/") and kind.endswith(";base64")):
        raise PromptError(
            f"{name} is a data URI that starts with {head[:60]!r}, expected "
            "'data:image/png;base64,' or another image type"
        )
    _check_bytes(len(payload) * 3 // 4 - payload.count("=", -2), name, limits)
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError:
        raise PromptError(
            f"{name} is a data URI whose base64 is invalid; encode its bytes again "
            "without line breaks"
        ) from None


def _read_file(path: Path, name: str, limits: Limits) -> bytes:
    try:
        # A pipe could block and a device never end.
        if not path.is_file():
            found = "is not a regular file" if path.exists() else "was not found"
            raise PromptError(f"{name} {found}; give the path of a picture file")
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except OSError as error:
        raise PromptError(
            f"{name} cannot be opened ({error.strerror}); check its path and permissions"
        ) from None


def _formats(data: bytes, name: str) -> tuple[str, ...]:
    """The Pillow readers that may try the bytes."""
    brand = data[8:12]
    if data[4:8] != b"ftyp" or brand not in _AVIF_BRANDS + _HEIC_BRANDS:
        return FORMATS
    try:
        import pillow_heif
    except ImportError:
        raise PromptError(
            f'{name} is a HEIC or AVIF picture; pip install "mm1-mlx[heic]" to read it, '
            "or convert it to PNG or JPEG first"
        ) from None
    if brand in _AVIF_BRANDS:
        return ("AVIF",)
    pillow_heif.register_heif_opener()
    return ("HEIF",)


class _Silence:
    """No warnings while anybody is inside.

    ``catch_warnings`` swaps state of the whole process: the first one in does it and the
    last one out undoes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


_SILENCE = _Silence()


@contextmanager
def pillow_guard(message: str, name: str) -> Iterator[None]:
    """Pillow's failures as PromptError(message): its own texts can hold addresses."""
    with _TURNS, _SILENCE:
        try:
            yield
        except PromptError:
            raise
        except Image.DecompressionBombError:
            raise PromptError(
                f"{name} has too many pixels to be opened; scale it down"
            ) from None
        except _PILLOW_ERRORS:
            raise PromptError(message) from None


def _check_bytes(count: int, name: str, limits: Limits) -> None:
    if count == 0:
        raise PromptError(f"{name} is empty (0 bytes); save or download it again")
    if count > limits.max_bytes:
        raise PromptError(
            f"{name} has more than {limits.max_bytes} bytes; scale it down or save it "
            "as JPEG"
        )


def _check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    width, height = size
    sides_fit = min(size) >= 1 and max(size) <= limits.max_side
    if not sides_fit or width * height > limits.max_pixels:
        raise PromptError(
            f"{name} has {width} x {height} pixels, expected 1 to {limits.max_side} a side "
            f"and at most {limits.max_pixels} in all; resize it"
        )


def _picture(
    image: Image.Image,
    name: str,
    source: ImageSource,
    config: ImageConfig,
    *,
    split: bool,
) -> Picture:
    image = decode(image, name)
    tiles, places = to_tiles(image, config, split=split)
    head = (image.size, [tile.shape for tile in tiles], places)
    digest = hashlib.sha256(repr(head).encode())
    for tile in tiles:
        digest.update(tile.tobytes())
    return Picture(
        tiles=tiles,
        size=image.size,
        digest=digest.hexdigest(),
        places=places,
        kind="frame" if isinstance(source, Frame) else "picture",
    )


def decode(image: Image.Image, name: str) -> Image.Image:
    """The picture from ``open_picture`` upright, in mode RGB.

    Raises:
        PromptError: it is damaged.
    """
    kind = image.format or "Pillow image"
    damaged = f"{name} is damaged or cut short ({kind}); save or download it again"
    with pillow_guard(damaged, name):
        return _rgb(upright(image), name)


def upright(image: Image.Image) -> Image.Image:
    """The picture in its own mode, turned as its EXIF says; within ``pillow_guard``."""
    with _LOADING[id(image) % len(_LOADING)]:
        image.load()
    # Only now: a PNG may carry its EXIF behind the pixels.
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1..8; 1 where the EXIF is unreadable, as viewers take it."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except _PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """The picture in mode RGB.

    | mode | rule |
    |---|---|
    | 1, L, P, RGB, RGBX, CMYK, YCbCr, HSV, LAB | Pillow's conversion |
    | LA, La, PA, RGBA, RGBa, a transparent colour or palette | over white |
    | I;16 and its byte orders, I | the high byte of 16 bits, as 16-bit RGB is read |
    | F | 0..255, rounded |
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _grey(image, name).convert("RGB")
    if image.has_transparency_data:
        # White, since what is drawn on nothing is mostly drawn for a page: black text
        # would vanish on black. transformers drops alpha and shows the hidden colours.
        image = with_alpha(image)
        page = Image.new("RGB", image.size, "white")
        page.paste(image, mask=image)
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """The picture in mode RGBA."""
    # Pillow knows no way from La to anything else.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _grey(image: Image.Image, name: str) -> Image.Image:
    samples = np.asarray(image)
    low, high, most = samples.min(), samples.max(), 255 if image.mode == "F" else 65535
    # Written so that NaN fails too.
    if not (low >= 0 and high <= most):
        raise PromptError(
            f"{name} has samples of {low}..{high} in mode {image.mode!r}, expected "
            f"0..{most}; convert it to RGB first"
        )
    grey = np.rint(samples) if image.mode == "F" else samples >> 8
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
