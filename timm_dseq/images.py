"""The one place where images are read: encoded, or open in Pillow → 8-bit RGB, upright, the first frame.

Whatever is wrong with an image, it raises UnreadableImage. The recipes in train/ replace and count such an image.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Others are not even tried: Pillow hands PostScript to a program that runs it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MOST_PIXELS = 2 * 89_478_485  # what Pillow, too, takes for a decompression bomb

warnings.filterwarnings("ignore", message="Palette images with Transparency", module="PIL")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(Exception):
    """Why an image cannot be read, in one line."""


@contextmanager
def as_unreadable() -> Iterator[None]:
    """Turn what Pillow raises on a damaged image, which is almost anything, into UnreadableImage. Also a decorator."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # whose own words are the address of an object
        raise UnreadableImage(f"UnidentifiedImageError: none of {', '.join(_formats())}") from error
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UnreadableImage(f"{type(error).__name__}: {reason}") from error


@cache
def _formats() -> tuple[str, ...]:
    """Those that this version of Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _file(value: Any) -> BytesIO | str:
    """What holds an encoded image {"bytes", "path"}: its bytes, or a path. A FIFO or device could be read for ever."""
    if not isinstance(value, dict):
        raise UnreadableImage("there is no image" if value is None else f"a {type(value).__name__} is no image")
    if value["bytes"]:
        return BytesIO(value["bytes"])
    if not value["path"]:
        raise UnreadableImage("there is no image")
    if not os.path.isfile(value["path"]):
        raise UnreadableImage("no such file" if not os.path.lexists(value["path"]) else "not a regular file")
    return value["path"]


@as_unreadable()
def content(value: Any) -> bytes:
    """What tells an image from others without decoding it: its encoded bytes, or the pixels of one that is open."""
    if isinstance(value, Image.Image):
        return value.tobytes()
    file = _file(value)
    return Path(file).read_bytes() if isinstance(file, str) else file.getvalue()


@as_unreadable()
def open_image(value: Any) -> Image.Image:
    """An encoded image, {"bytes", "path"}, or one that is open, with its size; its pixels are not decoded yet."""
    image = value if isinstance(value, Image.Image) else Image.open(_file(value), formats=_formats())
    if not 0 < image.width * image.height <= MOST_PIXELS:
        raise UnreadableImage(f"{image.width} × {image.height} pixels are none, or too many")
    return image


@as_unreadable()
def decode(value: Any, oversize: float = 1.0) -> Image.Image:
    """An encoded image, {"bytes", "path"}, or one that is open → 8-bit RGB, upright, its first frame.

    oversize: how many times more pixels each side has than are needed. A JPEG is then decoded at 1/2, 1/4 or 1/8 of
    its size, which is faster, and never smaller than needed.
    """
    image = open_image(value)
    if shrink := next((n for n in (8, 4, 2) if n <= oversize), None):
        image.draft(image.mode, (max(1, image.width // shrink), max(1, image.height // shrink)))  # no-op if no JPEG
    png = image.format == "PNG"
    return _eight_bits(ImageOps.exif_transpose(image), png).convert("RGB")


def _eight_bits(image: Image.Image, png: bool) -> Image.Image:
    """An image whose pixels convert() would clip, in 8 bits; others stay as they are.

    Numbers of 32 bits have no range of their own: up to 1 they are taken for shares, up to 255 for 8 bits, else for 16.
    """
    if image.mode in ("I;16", "I;16B", "I;16L") or (image.mode == "I" and png):  # older Pillows open 16 bits as I
        return image.convert("I").point(lambda x: x / 257).convert("L")
    if image.mode not in ("I", "F"):
        return image
    low, high = image.getextrema()
    if not 0 <= low <= high <= 65535:
        raise UnreadableImage(f"its pixels are from {low:g} to {high:g}: store 8 or 16 bits")
    factor = 255 if image.mode == "F" and high <= 1 else 1 if high <= 255 else 1 / 257
    return image.point(lambda x: x * factor + 0).convert("L")


@as_unreadable()
def measure(value: Any) -> tuple[Image.Image, tuple[int, int]]:
    """An image for `decode`, and its upright (height, width). A JPEG that is stored upright is not decoded yet."""
    image = open_image(value)
    if image.format != "JPEG" or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = decode(image)
    return image, (image.height, image.width)
