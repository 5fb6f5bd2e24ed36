"""Open any photo safely, upright and in RGB.

This module does not import torch, so that processes that only decode photos start quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import stat
import warnings

import numpy as np

# Pillow registers only five formats by itself; importing a plugin registers its format.
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, WebPImagePlugin  # noqa: F401

from ..errors import UserError

# The raster formats that Pillow decodes itself. EPS and the like would start other programs.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
with contextlib.suppress(ImportError):  # Pillow before 11.3 has no AVIF.
    from PIL import AvifImagePlugin

    if AvifImagePlugin.SUPPORTED:
        FORMATS += ("AVIF",)
# Phones and full-frame cameras take up to 64 million pixels. Decoding one pixel needs up to
# 20 bytes, so that this limit keeps the memory for one photo below 1.3 GB.
MAX_PIXELS = 65_000_000
# The longest side that JPEG allows. Pillow's row pointers of a longer strip need more memory
# than its pixels.
MAX_SIDE = 65_535
MAX_EXIF_BYTES = 65_535  # the most that fits in a JPEG segment
MAX_BYTES = 6 * MAX_PIXELS  # three colours of 16 bits, uncompressed
# The transposition that turns a photo upright, by EXIF orientation. 1 is upright already.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow logs problems with broken files. Without a handler, they would be printed on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# libtiff prints its own messages on stderr unless its error handler is removed.
with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class PhotoError(UserError):
    """A photo cannot be read. The message names the photo and gives the reason."""


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Open a photo in RGB, upright by its EXIF orientation, with transparent areas over white.

    Greyscale, palette, CMYK and 16-bit photos are converted; of an animation, the first frame
    is returned. Raises PhotoError for anything but a complete, readable photo within the limits
    above.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata. Problems that matter are raised as errors.
            warnings.simplefilter("ignore")
            return _decode(_read(path))
    except FileNotFoundError:
        raise PhotoError(f"{path}: no such photo") from None
    # Decoders raise anything from OSError to struct.error when a file is broken.
    except Exception as error:
        raise PhotoError(f"{path}: cannot be read as a photo ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a photo in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _read(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file of at most MAX_BYTES.

    The file is opened without blocking and its type is checked afterwards, so that even a FIFO
    that has just replaced a photo cannot make the program wait.
    """

    def open_without_blocking(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag

    with io.FileIO(path, opener=open_without_blocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError(f"expected a regular file of at most {MAX_BYTES:,} bytes")
        return file.read(status.st_size)


class _LimitedReads(io.BytesIO):
    """A file in memory that refuses to be read much more than twice.

    A broken file can make a decoder read millions of empty parts, or one part a thousand times.
    """

    remaining = 2 * MAX_BYTES

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.remaining -= max(len(part), 5000)
        if self.remaining < 0:
            raise ValueError("too many parts")
        return part


def _decode(data: bytes) -> Image.Image:
    with Image.open(_LimitedReads(data), formats=FORMATS) as image:
        _check_before_decoding(image, data)
        image.load()
        if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
            raise ValueError("more EXIF than a JPEG can hold")
        photo = _to_rgb(image)
        transposition = None
        # Like photo viewers, leave a photo whose EXIF is broken as it is.
        with contextlib.suppress(Exception):
            transposition = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
        return photo if transposition is None else photo.transpose(transposition)


def _check_before_decoding(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse an image whose pixels would take too much memory or time to decode."""
    tags = getattr(image, "tag_v2", {})
    # The tiles of a TIFF have a size of their own.
    tile_size = tags.get(ExifTags.Base.TileWidth, 1), tags.get(ExifTags.Base.TileLength, 1)
    for w, h in (image.size, tile_size):
        if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE:
            raise ValueError(
                f"{w} x {h} pixels; expected at most {MAX_PIXELS:,} and at most {MAX_SIDE:,} a side"
            )
    # Each scan of a progressive JPEG covers the whole image. Encoders write about 10 scans;
    # files made to exhaust a decoder have thousands.
    if image.format in ("JPEG", "MPO"):
        scans = data.count(b"\xff\xda")
        if scans * image.width * image.height > 20 * MAX_PIXELS:
            raise ValueError(f"{scans} scans of {image.width} x {image.height} pixels")
    # Pillow decodes these in Python, one pixel at a time.
    if any(tile[0] in Image.DECODERS for tile in image.tile):
        raise ValueError("a run-length BMP or a PPM of other than 8 bits; save it as PNG")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range")
    if image.mode.startswith("I"):
        # 16 bits a pixel. Pillow's own conversion clips the values instead of scaling them.
        grey = np.asarray(image).clip(0, 65535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    photo = Image.new("RGB", image.size, "white")
    photo.paste(image, mask=image)
    return photo
