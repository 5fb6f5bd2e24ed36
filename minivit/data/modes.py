"""Turn an image of any mode that Pillow opens into RGB, or refuse it by name."""

from __future__ import annotations

import math

import numpy as np
from PIL import ExifTags, Image, ImageFile

# Modes of 8 bits or fewer a sample, which Pillow converts. CMYK is as in Adobe's files, inverted
# in a JPEG and not in a TIFF, and LAB goes through a colour profile.
MODES_OF_8_BITS: tuple[str, ...] = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX")
MODES_OF_8_BITS += ("CMYK", "YCbCr", "LAB")
# Modes of 16 bits. Pillow would clip their values instead of scaling them.
MODES_OF_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Mode I has 32 bits, but these formats have at most 16 for it to hold.
FORMATS_OF_16_BITS = ("PNG", "PPM")
# Premultiplied alpha has to be undone before anything else.
STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}

SAMPLE_FORMAT = 339  # TIFF's tag: 1 unsigned, 2 signed, 3 floating-point
ADVICE = "save it as PNG of 8 or 16 bits"


def check_mode(image: Image.Image) -> None:
    """Raise ValueError, before decoding, for an image whose pixels have no known meaning."""
    if image.mode == "F":
        raise ValueError(f"its pixels are floating-point numbers of no known range; {ADVICE}")
    is_signed = _tag(image, SAMPLE_FORMAT, 1) == 2
    if is_signed or (image.mode == "I" and image.format not in FORMATS_OF_16_BITS):
        raise ValueError(f"its pixels are signed or 32-bit integers of no known range; {ADVICE}")
    if _raw_mode(image) == "RGB;16B" and "transparency" in image.info:
        raise ValueError(f"a transparent colour of 16 bits; {ADVICE}, with an alpha channel")
    # Pillow decodes these in Python, one pixel at a time.
    if any(tile[0] in Image.DECODERS for tile in _tiles(image)) and not _ppm_maximum(image):
        raise ValueError("a run-length BMP, or a PPM of text; save it as PNG")
    if image.mode not in (*MODES_OF_8_BITS, *MODES_OF_16_BITS, "I"):
        raise ValueError(f"pixels of mode {image.mode}; {ADVICE}")


def load_rgb(image: Image.Image) -> Image.Image:
    """Decode an image that check_mode() lets pass: RGB, with transparent areas over white."""
    if isinstance(image, ImageFile.ImageFile) and _ppm_maximum(image):
        return _load_ppm(image)
    raw_mode = _raw_mode(image)
    is_white_zero = _tag(image, ExifTags.Base.PhotometricInterpretation, 0) == 0
    image.load()
    if image.mode in (*MODES_OF_16_BITS, "I"):
        values = np.asarray(image)
        # A TIFF of 12 bits is not scaled to 16, and white is not turned into black.
        grey = scale_to_8_bits(values, 4095 if raw_mode == "I;12" else 65_535)
        if image.format == "TIFF" and is_white_zero:
            grey = 255 - grey
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return _over_white(image, raw_mode)


def scale_to_8_bits(values: np.ndarray, largest: int) -> np.ndarray:
    """Scale whole numbers from 0..largest to uint8, row by row to save memory."""
    numbers = np.arange(65_536, dtype=np.uint32)
    scaled_number = (numbers.clip(max=largest) * 255 // largest).astype(np.uint8)
    scaled = np.empty(values.shape, np.uint8)
    for row, row_values in enumerate(values):
        scaled[row] = scaled_number[row_values]
    return scaled


def _over_white(image: Image.Image, raw_mode: str) -> Image.Image:
    if raw_mode in ("L;2", "L;4"):
        # Pillow has scaled the pixels of a PNG of 2 or 4 bits, but not its transparent value.
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}[raw_mode]
    if image.mode in STRAIGHT_ALPHA:
        image = image.convert(STRAIGHT_ALPHA[image.mode])
    image = image.convert("RGBA")
    photo = Image.new("RGB", image.size, "white")
    photo.paste(image, mask=image)
    return photo


def _ppm_maximum(image: Image.Image) -> int:
    """Return the largest sample of a binary PPM or PGM that is not 255 or 65,535, else 0."""
    tiles = _tiles(image)
    if not tiles or tiles[0][0] != "ppm" or _raw_mode(image) not in ("L", "RGB"):
        return 0
    return int(tiles[0][3][-1])


def _load_ppm(image: ImageFile.ImageFile) -> Image.Image:
    """Decode a binary PPM or PGM of any largest sample, for which Pillow takes a second a million.

    Samples above 255 have two bytes, the higher one first.
    """
    maximum = _ppm_maximum(image)
    channels = 3 if _raw_mode(image) == "RGB" else 1
    shape = image.height, image.width, channels
    dtype = np.dtype(np.uint8 if maximum < 256 else ">u2")
    size = math.prod(shape) * dtype.itemsize
    assert image.fp is not None  # The image is open.
    image.fp.seek(image.tile[0][2])
    data = image.fp.read(size)
    if len(data) < size:
        raise ValueError("image file is truncated")
    samples = scale_to_8_bits(np.frombuffer(data, dtype).reshape(shape), maximum)
    return Image.fromarray(np.broadcast_to(samples, (*shape[:2], 3)))


def _raw_mode(image: Image.Image) -> str:
    """Return how Pillow names the samples in the file, or "" if it does not say."""
    tiles = _tiles(image)
    if not tiles:
        return ""
    arguments = tiles[0][3]
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _tiles(image: Image.Image) -> list:
    """Return where an image's pixels lie in its file; nothing for one that comes from no file."""
    return getattr(image, "tile", [])


def _tag(image: Image.Image, number: int, default: int) -> int:
    """Return a tag of a TIFF, of its first channel if each has its own, or the default."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) else value
