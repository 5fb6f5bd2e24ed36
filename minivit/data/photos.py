"""Photos: open any of them safely, upright and in RGB. Without torch, for processes that decode."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401  (Pillow loads only five formats by itself)

from ..errors import UserError

# Raster formats that Pillow decodes itself; EPS and the like would start other programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp", ".ppm")
MAX_PIXELS = 65_000_000  # phones and full-frame cameras end at 64 million; decoding takes up to 20 bytes each: 1.3 GB
MAX_SIDE = MAX_EXIF_BYTES = (
    65_535  # as in JPEG; of a longer strip, Pillow's row pointers take more than its pixels
)
MAX_BYTES = 6 * MAX_PIXELS  # 16 bits a colour, not compressed
TURN = dict(
    zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)))
)  # upright, by EXIF orientation
logging.getLogger("PIL").addHandler(
    logging.NullHandler()
)  # else what it logs of broken files goes to stderr,
with contextlib.suppress(AttributeError, OSError):  # as does what libtiff says
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class PhotoError(UserError):
    """This photo cannot be read; the message names it and says why."""


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Open a photo as RGB, turned upright by its EXIF orientation, transparency over white.

    Takes greyscale, palette, CMYK and 16-bit photos too; of an animation, the first frame.
    Raises PhotoError for anything that is not a whole, readable photo within the limits above.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow's hints on odd metadata; what matters is raised
            return _decode(_read(path))
    except FileNotFoundError:
        raise PhotoError(f"{path}: no such photo") from None
    except (
        Exception
    ) as error:  # decoders of broken files raise anything from OSError to struct.error
        reason = (
            "not a photo in a known format"
            if isinstance(error, Image.UnidentifiedImageError)
            else error
        )
        raise PhotoError(
            f"{path}: cannot be read as a photo ({getattr(error, 'strerror', None) or reason})"
        ) from error


def _read(path: str | os.PathLike[str]) -> bytes:
    # Not blocking, and looked at once open: a FIFO cannot hold us up, not even one that just took a photo's place.
    with io.FileIO(
        path, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    ) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise ValueError(f"expected a regular file of at most {MAX_BYTES:,} bytes")
        return file.read(found.st_size)


class _Parts(io.BytesIO):
    """A file that is read once or so: not a million empty parts of it, nor the same part a thousand times."""

    left = 2 * MAX_BYTES

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.left -= max(len(part), 5000)
        if self.left < 0:
            raise ValueError("too many parts")
        return part


def _decode(data: bytes) -> Image.Image:
    with Image.open(_Parts(data), formats=FORMATS) as image:
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles have a size of their own
        for w, h in (image.size, (tags.get(322, 1), tags.get(323, 1))):
            if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE:
                raise ValueError(
                    f"{w} x {h} pixels, more than the {MAX_PIXELS:,}, or {MAX_SIDE:,} a side, that are read"
                )
        scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
        if (
            scans * image.width * image.height > 20 * MAX_PIXELS
        ):  # encoders write about 10, bombs thousands
            raise ValueError(f"{scans} scans of {image.width} x {image.height} pixels")
        if any(tile[0] in Image.DECODERS for tile in image.tile):  # in Python, a pixel at a time
            raise ValueError("a run-length BMP or a PPM of other than 8 bits; save it as PNG")
        image.load()
        if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
            raise ValueError("more EXIF than a JPEG can hold")
        photo, turn = _to_rgb(image), None
        with contextlib.suppress(
            Exception
        ):  # a photo with broken EXIF stays as it lies, as in photo viewers
            turn = TURN.get(image.getexif().get(274, 1))
        return photo if turn is None else photo.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range")
    if image.mode.startswith(
        "I"
    ):  # 16 bits a pixel; Pillow's own conversion clips instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    photo, image = Image.new("RGB", image.size, "white"), image.convert("RGBA")
    photo.paste(image, mask=image)
    return photo


def is_photo(name: str) -> bool:
    """Say whether a file is one to open, by its name."""
    return name.lower().endswith(SUFFIXES) and name[0] != "."


def list_photos(folder: Path) -> list[Path]:
    """List the photos right inside a folder, by name."""
    return [folder / name for name in sorted(os.listdir(folder)) if is_photo(name)]
