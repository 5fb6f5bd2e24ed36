"""Open any photo safely, upright and in RGB.

This module does not import torch, so that processes that only decode photos start quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

# Pillow registers only five formats by itself; importing a plugin registers its format.
from PIL import (
    ExifTags,
    Image,
    ImageChops,
    ImageFile,
    JpegImagePlugin,
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from ..errors import UserError
from ..system.stand_ins import explain_stand_in, stand_in
from .image_data import JPEG_END, MAX_METADATA_BYTES, ImageData, next_restart, own_data
from .modes import check_mode, load_rgb

# The raster formats that Pillow decodes itself. EPS and the like would start other programs.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
with contextlib.suppress(ImportError):  # Pillow before 11.3 has no AVIF.
    from PIL import AvifImagePlugin

    if AvifImagePlugin.SUPPORTED:
        FORMATS += ("AVIF",)
# HEIC needs another package: pillow-heif, or pi-heif, which is the same without encoders.
for _name in ("pillow_heif", "pi_heif"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name).register_heif_opener()
        FORMATS += ("HEIF",)
        break
# Full-frame cameras take up to 64 million pixels. Decoding one pixel needs up to 20 bytes, so that
# this limit keeps the memory for one photo below 1.3 GB. A JPEG may have four times as many,
# because it is then decoded at half its width and height.
MAX_PIXELS = 65_000_000
# The longest side that JPEG allows. Pillow's row pointers of a longer strip need more memory
# than its pixels.
MAX_SIDE = 65_535
MAX_BYTES = 6 * MAX_PIXELS  # three colours of 16 bits, uncompressed
# What files of some formats begin with.
SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WebP": rb"RIFF....WEBP",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)",
}
# What to do to read a format that needs another package than Pillow, or a newer Pillow.
HOW_TO_READ = {"AVIF": "upgrade Pillow to 11.3", "HEIC": "pip install 'minivit[heic]'"}
# What is decoded in the place of data that may be missing: different bits, whatever the code.
FILLINGS = (b"\x55" * 255, bytes(range(255)), bytes(reversed(range(255))))
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
    with _photo_errors(path), _open_regular(path) as file:
        return _read(file)


def open_sent_photo(data: bytes, name: str) -> Image.Image:
    """Open a photo whose bytes somebody sent, as open_photo opens a file.

    `name` only says in the message of a PhotoError which photo is meant: no such file is opened.
    """
    with _photo_errors(name, data), _LimitedReads(io.BytesIO(data)) as file:
        return _read(file)


def from_pillow(image: Image.Image, name: str) -> Image.Image:
    """Return an image that is open in Pillow as open_photo returns a file. It stays as it is.

    `name` only says in the message of a PhotoError which photo is meant.
    """
    info = dict(image.info)
    try:
        with _photo_errors(name, b""):
            _check_before_decoding(image)
            return _decode(image)
    finally:
        image.info = info


def _read(file: BinaryIO) -> Image.Image:
    own = own_data(file, MAX_BYTES)
    if own is not None and own.breaks_off:
        return _decode_what_breaks_off(own)
    with _open_image(file, own) as image:
        return _decode(image)


@contextlib.contextmanager
def open_undecoded(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Yield a photo as Pillow opens it: its format, mode and size are known, its pixels are not.

    Of the metadata, only what may hold the orientation is there. Raises PhotoError.
    """
    with (
        _photo_errors(path),
        _open_regular(path) as file,
        _open_image(file, own_data(file, MAX_BYTES)) as image,
    ):
        yield image


def holds_photo(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's content is an image in a format that is read, whatever its name.

    It may still be refused when it is opened, for its size or its kind of pixels.
    """
    try:
        with (
            _photo_errors(path),
            _open_regular(path) as file,
            _identify(file, own_data(file, MAX_BYTES)),
        ):
            return True
    except PhotoError as error:
        return isinstance(error.__cause__, Image.DecompressionBombError)


@contextlib.contextmanager
def _photo_errors(path: str | os.PathLike[str], sent: bytes | None = None) -> Iterator[None]:
    """Turn whatever decoders raise into PhotoError: anything from OSError to struct.error.

    `sent` holds the bytes of a photo that is not a file.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata. Problems that matter are raised as errors.
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        link = " (a link that leads nowhere)" if Path(path).is_symlink() else ""
        raise PhotoError(f"{path}: no such photo{link}") from None
    except Exception as error:
        explanation = stand_in(path) if sent is None else explain_stand_in(sent)
        if explanation:
            raise PhotoError(f"{path}: {explanation}") from error
        raise PhotoError(f"{path}: cannot be read as a photo ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip() or type(error).__name__


class _LimitedReads(io.BufferedReader):
    """A file that refuses to be read much more than twice, or in millions of parts.

    A broken file can make a decoder read millions of empty parts, or one part a thousand times.
    """

    remaining = 2 * MAX_BYTES

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = MAX_BYTES + 1
        part = super().read(size)
        if len(part) > MAX_BYTES:
            raise ValueError(f"expected an image of at most {MAX_BYTES:,} bytes")
        self.remaining -= max(len(part), 5000)
        if self.remaining < 0:
            raise ValueError("too many parts")
        return part

    def fileno(self) -> int:
        # libtiff would map the file into memory, and the system would end this process if another
        # one made the file shorter. Without a file number, it is given bytes.
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def _open_regular(path: str | os.PathLike[str]) -> Iterator[_LimitedReads]:
    """Open a regular file.

    The file is opened without blocking and its type is checked afterwards, so that even a FIFO
    that has just replaced a photo cannot make the program wait.
    """

    def open_without_blocking(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag

    with io.FileIO(path, opener=open_without_blocking) as raw, _LimitedReads(raw) as file:
        if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
            raise ValueError("expected a regular file")
        yield file


def _open_image(file: BinaryIO, own: ImageData | None) -> ImageFile.ImageFile:
    """Open an image with Pillow, and check that it can be decoded.

    `own` is the image's own data, if it has been taken out of the file.
    """
    try:
        image = _identify(file, own)
    except Image.UnidentifiedImageError:
        raise ValueError(_unidentified(file)) from None
    _check_scans(image, 0 if own is None else own.scans)
    _reduce_large_jpeg(image)
    _check_before_decoding(image)
    return image


def _identify(file: BinaryIO, own: ImageData | None) -> ImageFile.ImageFile:
    source = file if own is None else io.BytesIO(own.data)
    try:
        return Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError:
        # Pillow refuses by the size at which a JPEG was taken, not by that at which it is decoded.
        source.seek(0)
        if not re.match(SIGNATURES["JPEG"], source.read(12), re.DOTALL):
            raise
        source.seek(0)
        return JpegImagePlugin.jpeg_factory(source)


def _reduce_large_jpeg(image: ImageFile.ImageFile) -> None:
    """Let a JPEG of too many pixels be decoded at half its width and height, if that is enough.

    Phones take photos of up to 200 million pixels.
    """
    w, h = image.size
    if image.format in ("JPEG", "MPO") and MAX_PIXELS < w * h <= 4 * MAX_PIXELS:
        image.draft(image.mode, (w // 2, h // 2))


def needs_package(start: bytes) -> str:
    """Return the format that a file begins with, if only a package that is missing can read it."""
    if "AVIF" not in FORMATS and re.match(SIGNATURES["AVIF"], start, re.DOTALL):
        return "AVIF"
    if "HEIF" not in FORMATS and re.match(SIGNATURES["HEIC"], start, re.DOTALL):
        return "HEIC"
    return ""


def _unidentified(file: BinaryIO) -> str:
    """Say why Pillow takes a file for no image."""
    file.seek(0)
    start = file.read(12)
    for name, signature in SIGNATURES.items():
        if not re.match(signature, start, re.DOTALL):
            continue
        article = "an" if name == "AVIF" else "a"
        if needs_package(start):
            return f"{article} {name}; to read it, {HOW_TO_READ[name]}, or convert it to JPEG"
        return f"{article} {name} that is damaged, or of a kind that Pillow cannot decode"
    if not start:
        return "the file is empty"
    return "not a photo in a known format"


def _decode_what_breaks_off(own: ImageData) -> Image.Image:
    """Decode a JPEG without an end marker, if no pixel depends on what may be missing.

    Bytes that are made up are decoded in the place of the missing ones. If others give the same
    pixels, nothing was missing but the end marker.
    """
    photo = _decode_with_filling(own, FILLINGS[0])
    for filling in FILLINGS[1:]:
        other = _decode_with_filling(own, filling)
        if ImageChops.difference(photo, other).getbbox() is not None:
            raise ValueError("image file is truncated")
    return photo


def _decode_with_filling(own: ImageData, filling: bytes) -> Image.Image:
    # A decoder that waits for a restart ignores what comes before it.
    data = own.data + filling + next_restart(own.data) + filling + JPEG_END
    with _open_image(io.BytesIO(data), replace(own, data=data)) as image:
        return _decode(image)


def _decode(image: Image.Image) -> Image.Image:
    if image.format == "HEIF":
        return load_rgb(image)  # Its decoder turns it upright.
    if image.format == "AVIF":
        # Properties of the file's own turn an AVIF. Pillow writes them into EXIF, not into XMP.
        image.info.pop("xmp", None)
    if "exif" in image.info:
        # The orientation is among the first entries. More would take long to read.
        image.info["exif"] = image.info["exif"][:MAX_METADATA_BYTES]
    photo = load_rgb(image)
    transposition = None
    # Like photo viewers, leave a photo whose EXIF is broken as it is.
    with contextlib.suppress(Exception):
        transposition = UPRIGHT.get(image.getexif()[ExifTags.Base.Orientation])
    return photo if transposition is None else photo.transpose(transposition)


def _check_scans(image: ImageFile.ImageFile, scans: int) -> None:
    """Refuse a JPEG with so many scans that decoding them would take too long.

    Each scan of a progressive JPEG covers the whole image. Encoders write about 10 scans; files
    made to exhaust a decoder have thousands.
    """
    if scans * image.width * image.height > 20 * MAX_PIXELS:
        raise ValueError(f"{scans} scans of {image.width} x {image.height} pixels")


def _check_before_decoding(image: Image.Image) -> None:
    """Refuse an image whose pixels would take too much memory to decode."""
    tags = getattr(image, "tag_v2", {})
    # The tiles of a TIFF have a size of their own.
    tile_size = tags.get(ExifTags.Base.TileWidth, 1), tags.get(ExifTags.Base.TileLength, 1)
    for w, h in (image.size, tile_size):
        if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE:
            raise ValueError(
                f"{w} x {h} pixels; expected at most {MAX_PIXELS:,} and at most {MAX_SIDE:,} a "
                "side; scale it down"
            )
    check_mode(image)
