"""Photos of every mode, size, orientation and format become the right pixels or an error."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DINOV2_PREPROCESSOR, ROOT, draw_photo
from PIL import ExifTags, Image, ImageCms, ImageFile

from minivit import Preprocess, open_photo
from minivit.data import photos
from minivit.data.image_data import PNG_START
from minivit.data.modes import check_mode
from minivit.data.photos import PhotoError
from minivit.errors import UserError, printable

SQUASH, CROP = Preprocess(), Preprocess.from_config(DINOV2_PREPROCESSOR)


def corners(image):
    return [image.getpixel(at) for at in ((2, 2), (-3 + image.width, 2), (2, -3 + image.height))]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation, form):
    upright = Image.new("RGB", (60, 40), "black")
    upright.paste("red", (0, 0, 20, 20))
    upright.paste("blue", (40, 0, 60, 20))
    # Pillow's transpositions that undo each orientation.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "photo", form, exif=exif, lossless=True)
    photo = open_photo(tmp_path / "photo")
    assert photo.size == (60, 40)
    assert corners(photo) == [(255, 0, 0), (0, 0, 255), (0, 0, 0)]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 100 * 257, (100, 100, 100)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, expected):
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    Image.new(mode, (8, 8), colour).save(path)
    photo = open_photo(path)
    assert photo.mode == "RGB"
    assert photo.getpixel((4, 4)) == expected


def tiff_of(values, bits=16, sample_format=1, photometric=1, order="<"):
    """Return a TIFF of one row of grey values, a NumPy array, of any kind of numbers."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1}
    tags |= {273: 8 + 2 + 12 * 10 + 4, 279: len(data), 339: sample_format}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IH", 8, 10) + entries + bytes(4) + data


def grey_row(path):
    """Return the grey values of a photo's first row."""
    pixels = np.asarray(open_photo(path))
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


THREE_OF_16_BITS = np.array([0, 100 * 257, 65_535], np.uint16)
THREE_OF_10_BITS = np.array([0, 401, 1023], ">u2").tobytes()
GREY = {
    "TIFF": tiff_of(THREE_OF_16_BITS),
    "TIFF, big endian": tiff_of(THREE_OF_16_BITS, order=">"),
    "TIFF, white is 0": tiff_of(65_535 - THREE_OF_16_BITS, photometric=0),
    "TIFF, 8 bits, white is 0": tiff_of(np.array([255, 155, 0], np.uint8), 8, photometric=0),
    # Two pixels share three bytes: 000 643 FFF.
    "TIFF, 12 bits": tiff_of(np.array([0x00, 0x06, 0x43, 0xFF, 0xF0], np.uint8), 12).replace(
        struct.pack("<HHII", 256, 4, 1, 5), struct.pack("<HHII", 256, 4, 1, 3)
    ),
    "PGM": b"P5 3 1 65535 " + THREE_OF_16_BITS.astype(">u2").tobytes(),
    "PGM of 10 bits": b"P5 3 1 1023 " + THREE_OF_10_BITS,
    "PGM up to 100": b"P5 3 1 100 " + bytes([0, 39, 100]),
    "PPM of 10 bits": b"P6 1 1 1023 " + THREE_OF_10_BITS,
}


@pytest.mark.parametrize("data", GREY.values(), ids=GREY)
def test_samples_of_any_number_of_bits_keep_their_meaning(tmp_path, data):
    (tmp_path / "photo").write_bytes(data)
    pixels = np.asarray(open_photo(tmp_path / "photo")).reshape(-1)
    assert sorted({*pixels.tolist()}) == pytest.approx([0, 100, 255], abs=1)
    assert pixels[0] == 0


NUMBERS = np.array([0, 100, 200])
NO_KNOWN_RANGE = {
    "32 bits": (tiff_of(NUMBERS.astype(np.uint32), 32), "32-bit integers"),
    "32 bits, signed": (tiff_of(NUMBERS.astype(np.int32), 32, 2), "32-bit integers"),
    "16 bits, signed": (tiff_of(NUMBERS.astype(np.int16), 16, 2), "signed or 32-bit integers"),
    "8 bits, signed": (tiff_of(NUMBERS.astype(np.int8), 8, 2), "signed or 32-bit integers"),
    "float": (tiff_of(NUMBERS.astype(np.float32), 32, 3), "floating-point numbers"),
    "float, big endian": (tiff_of(NUMBERS.astype(np.float32), 32, 3, 1, ">"), "floating-point"),
    "double": (tiff_of(NUMBERS.astype(np.float64), 64, 3), "a kind that Pillow cannot decode"),
    "PFM": (b"Pf 1 1 -1.0 " + struct.pack("<f", 0.5), "floating-point numbers"),
}


@pytest.mark.parametrize("data, message", NO_KNOWN_RANGE.values(), ids=NO_KNOWN_RANGE)
def test_numbers_of_no_known_range_are_refused_by_name(tmp_path, data, message):
    (tmp_path / "photo").write_bytes(data)
    with pytest.raises(PhotoError, match=message):
        open_photo(tmp_path / "photo")


def test_every_mode_that_pillow_knows_is_converted_or_refused_by_name():
    """No image becomes pixels because nobody thought of its mode."""
    for mode in [*Image.MODES, "La", "RGBa", "I;16L", "I;16N"]:
        image = SimpleNamespace(mode=mode, format="TIFF", tile=[], info={})
        refused = mode in ("I", "F", "HSV")
        try:
            check_mode(image)
        except ValueError as error:
            assert refused, mode
            assert "save it as PNG" in str(error)
        else:
            assert not refused, mode


def test_colours_of_print_and_of_laboratories_are_right(tmp_path):
    rgb = (200, 60, 30)
    path = tmp_path / "photo"
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.buildTransform(*profiles, "RGB", "LAB").apply(Image.new("RGB", (8, 8), rgb))
    lab.save(path, "TIFF")
    assert open_photo(path).getpixel((4, 4)) == pytest.approx(rgb, abs=2)
    Image.new("RGB", (8, 8), rgb).convert("YCbCr").save(path, "TIFF")
    assert open_photo(path).getpixel((4, 4)) == pytest.approx(rgb, abs=2)
    # Adobe's JPEGs hold CMYK inverted.
    ink = tuple(255 - value for value in rgb)
    path.write_bytes(jpeg(Image.new("CMYK", (8, 8), (*ink, 0)), quality=100))
    assert open_photo(path).getpixel((4, 4)) == pytest.approx(rgb, abs=2)
    # The same as YCCK: luminance and chroma of the inks, and black.
    ycc = Image.new("RGB", (8, 8), rgb).convert("YCbCr").getpixel((4, 4))
    data = jpeg(Image.new("CMYK", (8, 8), (*(255 - value for value in ycc), 0)), quality=100)
    transform = data.index(b"Adobe") + 11
    path.write_bytes(data[:transform] + b"\2" + data[transform + 1 :])
    assert open_photo(path).getpixel((4, 4)) == pytest.approx(ink, abs=2)


def png_of(bits, colours, row, transparent):
    """Return a PNG of one row, with a transparent value or colour."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", len(row) * 8 // bits, 1, bits, colours, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return PNG_START + head + chunk(b"tRNS", transparent) + pixels + chunk(b"IEND", b"")


def test_a_transparent_grey_of_any_number_of_bits_is_white(tmp_path):
    for bits, row, grey in (
        (1, b"\x0f", [0, 0, 0, 0, 255, 255, 255, 255]),
        (2, b"\x1b", [0, 255, 170, 255]),
        (4, b"\x1a", [255, 170]),
        (8, b"\1\2", [255, 2]),
        (16, b"\x64\x64\0\1\xc8\xc8", [100, 255, 200]),
    ):
        (tmp_path / "photo").write_bytes(png_of(bits, 0, row, b"\0\1"))
        assert grey_row(tmp_path / "photo") == grey, bits
    colour = png_of(16, 2, bytes(range(6)), bytes(range(6)))
    (tmp_path / "photo").write_bytes(colour)
    with pytest.raises(PhotoError, match="a transparent colour of 16 bits"):
        open_photo(tmp_path / "photo")


def test_a_palette_with_a_transparent_colour_is_laid_over_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "photo.png", transparency=0)
    assert open_photo(tmp_path / "photo.png").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 8000), (65_535, 1)], ids=str)
def test_the_smallest_and_the_thinnest_are_read(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "photo.png")
    assert open_photo(tmp_path / "photo.png").size == size


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, form):
    first, second = Image.new("RGB", (9, 8), "red"), Image.new("RGB", (9, 8), "blue")
    first.save(tmp_path / "photo", form, save_all=True, append_images=[second], lossless=True)
    photo = open_photo(tmp_path / "photo")
    assert (photo.size, photo.getpixel((4, 4))) == ((9, 8), (255, 0, 0))


def jpeg(photo, **options):
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def test_a_jpeg_that_lacks_data_before_its_end_marker_is_read(tmp_path):
    """Two photos of Oxford-IIIT Pet have the end-of-image marker before the end of their pixels."""
    data = jpeg(draw_photo(200, 100))
    middle = len(data) * 2 // 3
    (tmp_path / "photo.jpg").write_bytes(data[:middle] + data[-2:])
    assert open_photo(tmp_path / "photo.jpg").size == (200, 100)
    (tmp_path / "photo.jpg").write_bytes(data[:middle])
    with pytest.raises(PhotoError, match="truncated"):
        open_photo(tmp_path / "photo.jpg")


def app(number, contents):
    """Return an application segment of a JPEG."""
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(contents) + 2) + contents


def in_jpeg(segments):
    """Return a JPEG of a drawing, with segments before its own."""
    data = jpeg(draw_photo(60, 40))
    return data[:2] + segments + data[2:]


def exif_of(size, orientation=6):
    """Return EXIF of so many bytes: an orientation, then a note by the camera."""
    entries = struct.pack("<HHIHH", 274, 3, 1, orientation, 0)
    entries += struct.pack("<HHII", 37_500, 7, size, 8 + 2 + 24 + 4)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4) + bytes(size)


def exif_segments(size):
    exif = exif_of(size)
    parts = [exif[start : start + 65_000] for start in range(0, len(exif), 65_000)]
    return b"".join(app(1, b"Exif\0\0" + part) for part in parts)


def mpo(photo):
    buffer = io.BytesIO()
    photo.save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (999, 999))])
    return buffer.getvalue()


def in_png(before, after=b""):
    """Return a PNG of a drawing, with chunks before and behind its pixels."""
    buffer = io.BytesIO()
    draw_photo(60, 40).save(buffer, "PNG")
    data = buffer.getvalue()
    pixels = data.index(b"IDAT") - 4
    return data[:pixels] + before + data[pixels:-12] + after + data[-12:]


def webp_of(photo):
    buffer = io.BytesIO()
    photo.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


# More starts of scans than any limit lets pass.
SCANS = b"\xff\xda\0\x0c" * 150_000
LONG = zlib.compress(bytes(3_000_000))
ACCOMPANIED = {
    "video behind a JPEG": lambda: jpeg(draw_photo(60, 40)) + SCANS,
    "another image behind a JPEG": lambda: mpo(draw_photo(60, 40)) + SCANS,
    "a broken index of images": lambda: in_jpeg(app(2, b"MPF\0" + bytes(9))),
    "previews in a JPEG": lambda: in_jpeg(app(2, SCANS[:60_000]) * 20),
    "a long comment": lambda: in_jpeg((b"\xff\xfe\xff\xff" + bytes(65_533)) * 40),
    "a profile in parts": lambda: in_jpeg(app(2, b"ICC_PROFILE\0\1\2" + bytes(60_000)) * 300),
    "Photoshop's layers": lambda: in_jpeg(app(13, b"Photoshop 3.0\0" + bytes(60_000)) * 50),
    "text in a PNG": lambda: in_png(chunk(b"tEXt", b"prompt\0" + bytes(2_000_000))),
    "compressed text": lambda: in_png(chunk(b"zTXt", b"prompt\0\0" + LONG) * 80),
    "Unicode text": lambda: in_png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG)),
    "text behind the pixels": lambda: in_png(b"", chunk(b"iTXt", b"x\0\1\0\0\0" + LONG) * 80),
    "text of a wrong checksum": lambda: in_png(chunk(b"tEXt", b"x\0y")[:-1] + b"?"),
    "a profile in a PNG": lambda: in_png(chunk(b"iCCP", b"x\0\0" + LONG)),
    "a profile of EXIF": lambda: in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG)),
    "compressed XMP": lambda: in_png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)),
    "a project behind a PNG": lambda: in_png(b"") + SCANS,
    "a chunk of no known kind": lambda: webp_of(draw_photo(60, 40)).replace(
        b"VP8L", b"mine\3\0\0\0abc\0VP8L", 1
    ),
    "anything behind a WebP": lambda: webp_of(draw_photo(60, 40)) + SCANS,
}


@pytest.mark.parametrize("make", ACCOMPANIED.values(), ids=ACCOMPANIED)
def test_what_follows_or_accompanies_an_image_does_not_count(tmp_path, make):
    data = make()
    (tmp_path / "photo").write_bytes(data)
    photo = np.asarray(open_photo(tmp_path / "photo")).astype(int)
    compressed = 40 if data.startswith(b"\xff\xd8") else 0
    assert np.abs(photo - np.asarray(draw_photo(60, 40))).mean() <= compressed
    if compressed:
        plain = Image.open(io.BytesIO(jpeg(draw_photo(60, 40))))
        assert np.array_equal(photo, plain)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: in_jpeg(exif_segments(90_000)), id="JPEG"),
        pytest.param(lambda: in_jpeg(exif_segments(9_000_000)), id="JPEG, 9 MB"),
        pytest.param(lambda: in_png(chunk(b"eXIf", exif_of(90_000))), id="PNG"),
        pytest.param(lambda: in_png(b"", chunk(b"eXIf", exif_of(90_000))), id="PNG, at the end"),
        pytest.param(
            lambda: in_png(
                chunk(
                    b"zTXt",
                    b"Raw profile type exif\0\0"
                    + zlib.compress(b"\nexif\n99\n" + exif_of(99).hex().encode()),
                )
            ),
            id="PNG, ImageMagick's profile",
        ),
    ],
)
def test_a_photo_with_long_exif_is_turned_upright(tmp_path, make):
    (tmp_path / "photo").write_bytes(make())
    assert open_photo(tmp_path / "photo").size == (40, 60)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
def test_of_a_huge_file_only_the_image_is_read(tmp_path, form):
    path = tmp_path / "photo"
    draw_photo(60, 40).save(path, form)
    os.truncate(path, 2 * photos.MAX_BYTES)  # The disk stores no zeros.
    started = time.process_time()
    assert open_photo(path).size == (60, 40)
    assert time.process_time() - started < 0.5


def test_an_image_of_more_bytes_than_any_photo_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "photo"
    monkeypatch.setattr(photos, "MAX_BYTES", 1000)
    for form in ("JPEG", "PNG", "WEBP"):
        draw_photo(60, 40).save(path, form, quality=95, lossless=True)
        with pytest.raises(PhotoError, match="expected an image of at most 1,000 bytes"):
            open_photo(path)


JPEG_KINDS = {
    "baseline": {},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 1},
}


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS)
def test_a_jpeg_that_breaks_off_is_read_if_no_pixel_is_missing(tmp_path, options):
    """Nothing but the end marker may be missing, whatever bytes the data end with."""
    path = tmp_path / "photo"
    data = jpeg(draw_photo(40, 30), **options)
    whole = np.asarray(Image.open(io.BytesIO(data)))
    for missing in (*range(1, 20), *range(20, len(data) - 2, 11)):
        path.write_bytes(data[:-missing])
        try:
            photo = open_photo(path)
        except PhotoError:
            assert missing > 2
        else:
            assert np.array_equal(photo, whole)
    # Space that a download has reserved is no data, and neither is the next image.
    for reserved in (bytes(5000), b"\xff" * 5000, jpeg(Image.new("RGB", (8, 8)))):
        path.write_bytes(data[:-2] + reserved)
        assert np.array_equal(open_photo(path), whole)
        path.write_bytes(data[: len(data) * 9 // 10] + reserved)
        with pytest.raises(PhotoError, match="truncated"):
            open_photo(path)


def ended_early(form, **options):
    buffer = io.BytesIO()
    draw_photo(60, 40).save(buffer, form, **options)
    return buffer.getvalue()


def test_other_formats_without_their_ends_are_read_if_no_pixel_is_missing(tmp_path):
    path = tmp_path / "photo"
    data = {form: ended_early(form, lossless=True) for form in ("PNG", "GIF", "WEBP")}
    whole = {}
    for form in data:
        path.write_bytes(data[form])
        whole[form] = np.asarray(open_photo(path))
    size = len(data["WEBP"]) - 8
    wrong_size = [
        data["WEBP"][:4] + struct.pack("<I", wrong) + data["WEBP"][8:]
        for wrong in (0, 10, size - 2, size + 2, 2**32 - 1)
    ]
    readable = {
        "PNG": [data["PNG"][:-12], data["PNG"][:-16], data["PNG"][:-6]],
        "GIF": [data["GIF"][:-1], data["GIF"][:-2]],
        "WEBP": [*wrong_size, *(webp + bytes(99) for webp in wrong_size)],
    }
    for form, variants in readable.items():
        for variant in variants:
            path.write_bytes(variant)
            assert np.array_equal(open_photo(path), whole[form]), form
        path.write_bytes(data[form][: len(data[form]) * 9 // 10])
        with pytest.raises(PhotoError):
            open_photo(path)


def test_a_webp_that_has_lost_its_orientation_is_refused(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "photo"
    draw_photo(60, 40).save(path, "WEBP", exif=exif)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(4) + data[8:])
    assert open_photo(path).size == (40, 60)
    path.write_bytes(data[: data.index(b"EXIF")])
    with pytest.raises(PhotoError, match="its orientation is missing"):
        open_photo(path)


def test_of_a_damaged_scan_all_is_left_to_the_decoder(tmp_path):
    """What looks like metadata, an end or the next image may be a byte that went wrong."""
    path = tmp_path / "photo"
    data = jpeg(draw_photo(200, 100), restart_marker_blocks=1)
    restart = data.index(b"\xff\xd3", data.index(b"\xff\xda"))
    for marker in (0xE5, 0xFE, 0xD9, 0x3C, 0x01):
        damaged = data[: restart - 4] + bytes([0xFF, marker]) + data[restart - 2 :]
        path.write_bytes(damaged)
        assert np.array_equal(open_photo(path), Image.open(io.BytesIO(damaged))), hex(marker)


def test_metadata_between_scans_may_hold_an_image(tmp_path):
    path = tmp_path / "photo"
    data = jpeg(draw_photo(60, 40), progressive=True)
    second = data.index(b"\xff\xc4", data.index(b"\xff\xda"))
    path.write_bytes(data[:second] + app(2, jpeg(draw_photo(8, 8))) + data[second:])
    assert np.array_equal(open_photo(path), Image.open(io.BytesIO(data)))


def test_a_photo_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    draw_photo(8, 8).save(tmp_path / "photo.png")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PhotoError, match=r"photo\.png: cannot be read .*\(Permission denied\)"):
        open_photo(tmp_path / "photo.png")


@pytest.mark.parametrize(
    "exif", [b"", b"nonsense", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"], ids=repr
)
def test_a_photo_with_broken_exif_is_read_without_turning_it(tmp_path, exif):
    for form in ("JPEG", "WEBP", "PNG"):
        draw_photo(30, 20).save(tmp_path / "photo", form, exif=b"Exif\0\0" + exif)
        assert open_photo(tmp_path / "photo").size == (30, 20)


NAMES = {
    "spaces": b" a b .jpg",
    "quotes": b'"it\'s".jpg',
    "newline": b"a\nb.jpg",
    "emoji": "\N{CAT FACE}.jpg".encode(),
    "250 characters": b"x" * 246 + b".jpg",
    "dash": b"-x.jpg",
    "not UTF-8": b"caf\xe9.jpg",
    "escape": b"\x1b[31m\x07.jpg",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_photo_is_read_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    draw_photo(8, 8).save(path)
    assert open_photo(path).size == (8, 8)
    path.write_bytes(b"no photo")
    with pytest.raises(PhotoError) as raised:
        open_photo(path)
    assert str(raised.value).startswith(f"{path}: ")
    line = printable(raised.value)
    assert line.isprintable()
    line.encode()


# Photos of phones


needs_heic = pytest.mark.skipif("HEIF" not in Image.SAVE, reason="needs pillow-heif")
needs_avif = pytest.mark.skipif("AVIF" not in photos.FORMATS, reason="this Pillow has no AVIF")
PHONES = [pytest.param("HEIF", marks=needs_heic), pytest.param("AVIF", marks=needs_avif)]


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, quality=95, **options)
    return buffer.getvalue()


def with_orientation(orientation: int, image: Image.Image) -> bytes:
    """Return a HEIC as Apple writes it: turned by its own properties, and with EXIF that says so.

    pillow-heif sets EXIF's orientation to 1 when it writes the properties.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(image, "HEIF", exif=exif.tobytes())
    for order in "<>":
        entry = struct.pack(f"{order}HHIH", 274, 3, 1, 1)
        data = data.replace(entry, struct.pack(f"{order}HHIH", 274, 3, 1, orientation))
    return data


@pytest.mark.parametrize("form", PHONES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_of_a_phone_is_turned_once(tmp_path, orientation, form):
    upright = Image.new("RGB", (64, 48), "black")
    upright.paste("red", (0, 0, 24, 24))
    upright.paste("blue", (40, 0, 64, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[274] = orientation
    if form == "HEIF":
        data = with_orientation(orientation, stored)
    else:
        data = encoded(stored, form, exif=exif)
    (tmp_path / "photo").write_bytes(data)
    photo = open_photo(tmp_path / "photo")
    assert photo.size == (64, 48)
    for found, colour in zip(corners(photo), ((255, 0, 0), (0, 0, 255), (0, 0, 0))):
        assert found == pytest.approx(colour, abs=12)  # Both formats lose a little.


@needs_avif
def test_text_in_an_avif_turns_nothing(tmp_path):
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    draw_photo(64, 48).save(tmp_path / "photo", "AVIF", xmp=xmp)
    with photos.open_undecoded(tmp_path / "photo") as image:
        assert image.getexif()[ExifTags.Base.Orientation] == 6
    assert open_photo(tmp_path / "photo").size == (64, 48)


@needs_heic
def test_heic_of_every_kind_becomes_rgb(tmp_path):
    import pillow_heif

    photo = draw_photo(64, 48)
    clear = Image.new("L", photo.size, 0)
    transparent = photo.copy()
    transparent.putalpha(clear)
    deep = np.asarray(photo).astype(np.uint16) * 257
    ten_bits = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", photo.size, deep.tobytes()).save(ten_bits, quality=95)
    grey = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    other = draw_photo(48, 32, seed=1)
    several = {"save_all": True, "append_images": [photo], "primary_index": 1}
    cases = {
        "colour": (encoded(photo, "HEIF"), photo),
        "grey": (encoded(photo.convert("L"), "HEIF"), photo.convert("L").convert("RGB")),
        "alpha": (encoded(transparent, "HEIF"), Image.new("RGB", photo.size, "white")),
        "10 bits": (ten_bits.getvalue(), photo),
        "10 bits, grey": (
            encoded(Image.fromarray(grey), "HEIF"),
            photo.convert("L").convert("RGB"),
        ),
        "the second is the primary image": (encoded(other, "HEIF", **several), photo),
        "thumbnail": (encoded(photo, "HEIF", thumbnails=[16, 32]), photo),
        "tiles": (encoded(photo.resize((640, 480)), "HEIF", tile_size=256), None),
    }
    for name, (data, expected) in cases.items():
        (tmp_path / "photo").write_bytes(data)
        found = open_photo(tmp_path / "photo")
        assert found.mode == "RGB", name
        if expected is None:
            expected = photo.resize((640, 480))
        assert found.size == expected.size, name
        difference = np.asarray(found).astype(int) - np.asarray(expected)
        # HEIC halves the resolution of colours, in which the drawing's noise is lost.
        assert np.abs(difference).mean() < 10, name
        assert photos.holds_photo(tmp_path / "photo")


@pytest.mark.parametrize("form", PHONES)
def test_a_photo_of_a_phone_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch, form):
    data = encoded(Image.new("RGB", (64, 64)), form)
    at = data.index(b"ispe") + 8  # The image's width and height are given there.
    assert data[at : at + 8] == struct.pack(">II", 64, 64)

    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.OPEN[form][0], "load", load)
    messages = {9_000: "9000 x 9000 pixels; expected at most", 65_536: "limit|damaged"}
    for side, message in messages.items():
        large = data[:at] + struct.pack(">II", side, side) + data[at + 8 :]
        (tmp_path / "photo.jpg").write_bytes(large)
        with pytest.raises(PhotoError, match=message):
            open_photo(tmp_path / "photo.jpg")


WITHOUT_PACKAGES = """
import sys
sys.modules["pillow_heif"] = sys.modules["pi_heif"] = None
from minivit.data.folder import PACKAGE_SUFFIXES, SUFFIXES
from minivit.data.photos import open_photo
print(".heic" in SUFFIXES, ".heic" in PACKAGE_SUFFIXES)
try:
    open_photo(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_without_pillow_heif_a_heic_is_named_with_what_to_do(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(HEIC)
    command = [sys.executable, "-c", WITHOUT_PACKAGES, str(tmp_path / "photo.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == (
        f"False True\n{tmp_path}/photo.jpg: cannot be read as a photo (a HEIC; to read it, "
        "pip install 'minivit[heic]', or convert it to JPEG)\n"
    )


def text(path):
    path.write_text("I am not a photo")


def truncated(path):
    draw_photo(300, 200).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:3000])


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
BAD_PHOTOS = {
    "absent": (lambda path: None, "no such photo"),
    "text": (text, "not a photo in a known format"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "HEIC": (lambda path: path.write_bytes(HEIC), "a HEIC that is damaged|a HEIC; to read it"),
    "still in iCloud": (lambda path: path.write_bytes(b"bplist00"), "what iCloud leaves"),
    "truncated": (truncated, "truncated"),
    "one byte": (lambda path: path.write_bytes(b"\xff"), "not a photo in a known format"),
    "folder": (lambda path: path.mkdir(), "directory"),
    "fifo": (lambda path: os.mkfifo(path), "expected a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "expected a regular file"),
    "to nowhere": (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
    "to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "12-bit JPEG": (
        lambda path: path.write_bytes(
            jpeg(Image.new("L", (8, 8))).replace(b"\x0b\x08", b"\x0b\x0c")
        ),
        "a JPEG that is damaged, or of a kind that Pillow cannot decode",
    ),
}


@pytest.mark.parametrize("make, message", BAD_PHOTOS.values(), ids=BAD_PHOTOS)
def test_anything_but_a_whole_photo_is_refused_by_name(tmp_path, make, message):
    make(tmp_path / "photo.jpg")
    with pytest.raises(PhotoError, match=rf"photo\.jpg: .*{message}"):
        open_photo(tmp_path / "photo.jpg")


def test_a_photo_is_known_by_its_content_whether_or_not_it_can_be_read(tmp_path):
    path = tmp_path / "photo"
    for data, is_photo in (
        (in_png(chunk(b"zTXt", b"prompt\0\0" + LONG)), True),
        (in_jpeg(b"") + SCANS, True),
        (tiff_of(NUMBERS.astype(np.float32), 32, 3), True),
        (png(20_000, 6_000), True),
        (png(2**31 - 1, 2**31 - 1), True),
        (b"\x89PNG but no more", False),
        (b"P3 is what I call him", False),
        (b"", False),
    ):
        path.write_bytes(data)
        assert photos.holds_photo(path) == is_photo, data[:20]


def test_a_fifo_that_replaces_a_photo_cannot_make_us_wait(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "photo.jpg")
    for check in ("exists", "is_file"):
        monkeypatch.setattr(Path, check, lambda path: True)
    with pytest.raises(PhotoError, match="expected a regular file"):
        open_photo(tmp_path / "photo.jpg")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, before=b"", after=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(
        b"IDAT", zlib.compress(bytes((width + 1) * height if width * height < 1000 else 99))
    )
    return b"\x89PNG\r\n\x1a\n" + head + before + pixels + after + chunk(b"IEND", b"")


def tiff(tags, data=b""):
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def tiff_tags(width, height, *more):
    return [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 8),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        *more,
    ]


def bmp(width, height, compression=0, data=b""):
    head = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(data), 0, 0, 256, 0
    )
    return b"BM" + struct.pack("<IHHI", 1078 + len(data), 0, 0, 1078) + head + bytes(1024) + data


def gif(screen, frame):
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + bytes(6)
        + b","
        + struct.pack("<HHHHBB", 0, 0, *frame, 0, 2)
    )


def webp(width, height):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", lossless=True)
    before, _, after = buffer.getvalue().partition(b"\x2f" + struct.pack("<I", 7 | 7 << 14))
    return before + b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14) + after


def many_scans():
    data = jpeg(Image.new("RGB", (1000, 1000)), progressive=True)
    last = data.rindex(b"\xff\xc4")
    return data[:-2] + data[last:-2] * 1500 + data[-2:]


BOMBS = {
    "PNG": (png(20_000, 6_000), "20000 x 6000 pixels; expected at most 65,000,000"),
    "PNG, long": (png(100_000, 1), "100000 x 1 pixels; expected"),
    "PNG, largest": (png(2**31 - 1, 2**31 - 1), "exceeds limit"),
    "JPEG": (
        jpeg(Image.new("L", (8, 8))).replace(b"\0\x08\0\x08", b"\x40\0\x40\0", 1),
        "16384 x 16384 pixels",
    ),
    "JPEG, scans": (many_scans(), "15.. scans of 1000 x 1000 pixels"),
    "GIF": (gif((65_535, 65_535), (1, 1)), "exceeds limit"),
    "GIF, frame": (gif((8, 8), (60_000, 2_000)), "60000 x 2000 pixels"),
    "WebP": (webp(9_000, 9_000), "9000 x 9000 pixels"),
    "TIFF": (
        tiff(tiff_tags(10_000, 10_000, (273, 4, 1, 8), (279, 4, 1, 9))),
        "10000 x 10000 pixels",
    ),
    "TIFF, tile": (
        tiff(
            tiff_tags(
                16, 16, (322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 300), (325, 4, 1, 99)
            ),
            bytes(400),
        ),
        "40000 x 40000 pixels",
    ),
    "BMP": (bmp(10_000, -10_000), "10000 x 10000 pixels"),
    "BMP, run lengths": (bmp(60_000, 1_000, 1, b"\1\0\0\0" * 1_000), "run-length BMP"),
    "PPM": (b"P5 10000 10000 255 ", "10000 x 10000 pixels"),
    "PPM, text": (b"P3 3000 2000 255\n1", "PPM of text"),
}


@pytest.mark.parametrize("data, message", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, data, message):
    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    (tmp_path / "photo.jpg").write_bytes(data)
    with pytest.raises(PhotoError, match=rf"photo\.jpg: .*\(.*({message})"):
        open_photo(tmp_path / "photo.jpg")


def repeated_tags(width=8):
    """Return Exif data with 2,000 tags that all point at the same megabyte."""
    tags = [
        tag
        for tag in tiff_tags(width, 8, (274, 3, 1, 6), (273, 4, 1, 8), (279, 4, 1, 64))
        if tag[0] != 259
    ]
    return tiff(
        tags + [(number, 3, 500_000, 800_000) for number in range(1_000, 3_000)], bytes(2_000_000)
    )


zeros = zlib.compress(bytes(50_000_000))
HEAVY = {  # refused or read, whichever, but soon
    "empty chunks": png(8, 8, chunk(b"abCd", b"") * 400_000),
    "empty markers": b"\xff\xd8" + b"\xff\xe5\0\2" * 600_000 + jpeg(draw_photo(8, 8))[2:],
    "fill bytes": b"\xff\xd8" + b"\xff" * 3_000_000 + jpeg(draw_photo(8, 8))[2:],
    "short comments": gif((8, 8), (8, 8))[:19] + b"!\xfe" + b"\1x" * 600_000 + b"\0",
    "ICC": png(8, 8, chunk(b"iCCP", b"x\0\0" + zeros)),
    "text": png(8, 8, chunk(b"zTXt", b"x\0\0" + zeros) * 20),
    "text at the end": png(8, 8, after=chunk(b"iTXt", b"x\0\1\0\0\0" + zeros) * 20),
    "EXIF": png(8, 8, chunk(b"eXIf", repeated_tags())),
    "EXIF at the end": png(8, 8, after=chunk(b"eXIf", repeated_tags())),
    "TIFF tags": repeated_tags(),
}


@pytest.mark.parametrize("data", HEAVY.values(), ids=HEAVY)
def test_metadata_cannot_make_us_wait(tmp_path, data):
    (tmp_path / "photo").write_bytes(data)
    started = time.process_time()
    try:
        assert open_photo(tmp_path / "photo").mode == "RGB"
    except PhotoError as error:
        assert str(error).startswith(f"{tmp_path / 'photo'}: cannot be read")
    assert time.process_time() - started < 2


def test_decoding_takes_at_most_20_bytes_a_pixel_and_is_silent(tmp_path):
    """Run in a separate process to measure its peak memory and see what it prints on stderr."""
    pixels, exif = (3_000, 2_000), Image.Exif()
    exif[274] = 6
    Image.new("RGBA", pixels, (9, 9, 9, 9)).save(
        tmp_path / "1.webp", lossless=True, quality=0, method=0, exif=exif
    )
    Image.new("RGBA", pixels, (9, 9, 9, 9)).save(tmp_path / "2.png", compress_level=1, exif=exif)
    Image.new("CMYK", pixels).save(tmp_path / "3.jpg", progressive=True, exif=exif)
    Image.new("I;16", pixels).save(tmp_path / "4.tif", tiffinfo=exif, compression="tiff_lzw")
    Image.new("P", pixels).save(tmp_path / "5.gif", transparency=0)
    code = (
        "import resource, sys; from minivit.data.photos import open_photo\n"
        "unit = 1 if sys.platform == 'darwin' else 1024\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit\n"
        "try: open_photo(sys.argv[1])\n"
        "except ValueError: before = peak()\n"
        "for path in sys.argv[2:]: assert set(open_photo(path).size) == {3000, 2000}, path\n"
        "print(peak() - before)"
    )
    (tmp_path / "0.tif").write_bytes(
        tiff([*tiff_tags(8, 8)[:-1], (277, 3, 1, 99)])
    )  # Pillow logs an error
    command = [sys.executable, "-c", code, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == ""
    assert int(done.stdout) < 20 * 3_000 * 2_000 + 10_000_000  # 10 MB for the codecs themselves


def test_a_photo_of_another_format_than_its_name_says_is_read(tmp_path):
    draw_photo(20, 20).save(tmp_path / "photo.jpg", "WEBP")
    assert open_photo(tmp_path / "photo.jpg").size == (20, 20)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (1, 8000), (8000, 3), (1, 1)])
def test_any_shape_becomes_the_models_input(size):
    for preprocess in (SQUASH, CROP):
        image = preprocess(draw_photo(*size))
        assert image.shape == (3, 224, 224)
        assert image.dtype == torch.float32


@pytest.mark.parametrize("preprocess", [SQUASH, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300), (1000, 200)], ids=str)
def test_a_map_lands_on_the_pixels_it_came_from(preprocess, size):
    W, H = size
    left, top, right, bottom = preprocess.box(size)
    photo = Image.new("RGB", size)
    x, y = int(left + (right - left) * 0.7), int(top + (bottom - top) * 0.3)
    photo.paste("white", (x - 12, y - 12, x + 12, y + 12))
    seen = preprocess.pixels(photo).float().mean(0)
    # A map that marks the patches of the white square.
    values = torch.nn.functional.avg_pool2d(seen[None], 16)[0]
    brought_back = preprocess.to_photo(values, size)
    assert brought_back.shape == (H, W)
    found = np.argwhere(brought_back >= np.nanmax(brought_back) - 1e-6).mean(0)
    patch = max((right - left), (bottom - top)) / 14
    assert abs(found[0] - y) <= patch
    assert abs(found[1] - x) <= patch
    inside = ~np.isnan(brought_back)
    assert inside.mean() == pytest.approx((right - left) * (bottom - top) / (W * H), abs=0.01)
    assert inside[y, x]


def test_a_preprocessor_config_survives_a_round_trip():
    for preprocess in (
        SQUASH,
        CROP,
        Preprocess((64, 32), None, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    ):
        assert Preprocess.from_config(preprocess.to_config()) == preprocess
    assert Preprocess.from_config({"size": 384}).resize == (384, 384)
    with pytest.raises(UserError, match="does not fit a shortest edge"):
        Preprocess.from_config(DINOV2_PREPROCESSOR | {"size": {"shortest_edge": 200}})
    with pytest.raises(UserError, match="without a centre crop"):
        Preprocess.from_config({"size": {"shortest_edge": 200}, "do_center_crop": False})


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.5,)},
        {"std": (0.5, 0.5, 0.0)},
        {"std": (1.0,) * 4},
        {"mean": (0.5, 0.5, float("nan"))},
    ],
)
def test_mean_and_std_must_be_three_numbers_each(wrong):
    with pytest.raises(UserError, match="three numbers each, and a std above 0"):
        Preprocess(**wrong)


def test_normalizing_uses_the_mean_and_std():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    assert SQUASH.normalize(pixels).flatten().tolist() == pytest.approx([-1, -0.6, 1])


def test_a_jpeg_of_200_million_pixels_is_read_at_half_its_size(tmp_path):
    """Phones take such photos, and Pillow refuses to open them."""
    path = tmp_path / "phone.jpg"
    grey = Image.linear_gradient("L").resize((16_320, 12_240), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    grey.save(path, quality=30, exif=exif)
    photo = open_photo(path)
    assert photo.size == (6_120, 8_160)  # upright
    corners = [photo.getpixel(corner)[0] for corner in ((6_100, 20), (20, 20))]
    assert corners == pytest.approx([0, 255], abs=4)
    with pytest.raises(PhotoError, match="scale it down"):
        open_photo(save_large_png(tmp_path / "large.png"))


def save_large_png(path):
    Image.new("1", (9_000, 8_000)).save(path)
    return path
