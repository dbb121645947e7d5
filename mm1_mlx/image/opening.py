"""Untrusted bytes -> a Pillow image whose header was read and checked, not yet decoded."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from mm1_mlx.errors import PromptError
from mm1_mlx.image.guard import pillow_guard
from mm1_mlx.image.source import Frame, ImageSource, Limits, Viewed, is_data

# Pillow's other readers are rarely needed and have had most of its security holes.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def open_picture(source: ImageSource, name: str, limits: Limits) -> Image.Image:
    """The picture with its header read and its size checked, not yet decoded.

    Raises:
        PromptError: it cannot be read, or is too large.
    """
    given = content(source, name, limits)
    if isinstance(given, Frame):
        image = given.image
    elif isinstance(given, Image.Image):
        image = given
    else:
        formats = _formats(given, name)
        unreadable = (
            f"{name} is not a {', '.join(formats)} picture that can be read; "
            "convert it to PNG or JPEG first"
        )
        with pillow_guard(unreadable, name):
            image = Image.open(io.BytesIO(given), formats=formats)
    _check_size(image.size, name, limits)
    return image


def content(
    source: ImageSource, name: str, limits: Limits
) -> bytes | Image.Image | Frame:
    """What is decoded: the encoded bytes, where there are any.

    Raises:
        PromptError: they cannot be read, or are too many.
    """
    if isinstance(source, Viewed):
        source = source.source
    if isinstance(source, Frame | Image.Image):
        return source
    data = _read(source, name, limits)
    _check_bytes(len(data), name, limits)
    return data


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
    if is_data(source):
        return _read_data(source, name, limits)
    return _read_file(Path(source), name, limits)


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
