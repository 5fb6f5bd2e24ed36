"""open_photo against thousands of broken files; `make fuzz` runs more of the same for ten minutes.

Whatever the bytes are, opening them gives an upright RGB photo or one PhotoError, within
MAX_SECONDS and without a word on stderr.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from conftest import draw_photo
from PIL import Image

from minivit.data.photos import FORMATS, MAX_PIXELS, PhotoError, open_photo
from minivit.errors import printable

MAX_SECONDS = 2
EXTREMES = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    65_500,
    20_000,
]
DICTIONARY = [
    *(
        bytes([0xFF, marker])
        for marker in (
            0xD8,
            0xD9,
            0xDA,
            0xC0,
            0xC2,
            0xC4,
            0xDB,
            0xDD,
            0xD0,
            0xE0,
            0xE1,
            0xE2,
            0xEE,
            0xFE,
        )
    ),
    *(
        b"IHDR",
        b"IDAT",
        b"IEND",
        b"PLTE",
        b"tRNS",
        b"iCCP",
        b"zTXt",
        b"iTXt",
        b"eXIf",
        b"acTL",
        b"fcTL",
        b"fdAT",
    ),
    *(
        b"GIF87a",
        b"GIF89a",
        b"\x21\xf9\x04",
        b"\x21\xff\x0bNETSCAPE2.0",
        b"\x2c",
        b"\x3b",
        b"\x21\xfe",
    ),
    *(
        b"RIFF",
        b"WEBP",
        b"VP8 ",
        b"VP8L",
        b"VP8X",
        b"ANIM",
        b"ANMF",
        b"ALPH",
        b"EXIF",
        b"XMP ",
        b"ICCP",
    ),
    *(
        b"II*\0",
        b"MM\0*",
        b"II+\0\x08\0\0\0",
        b"Exif\0\0",
        b"MPF\0",
        b"ICC_PROFILE\0",
        b"Adobe\0",
        b"JFIF\0",
        b"BM",
    ),
    *(
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"P6 9 9 255\n",
        b"P3 9 9 9\n",
        b"P5 99999 9999 65535 ",
    ),
]


def save(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def valid_photos() -> dict[str, bytes]:
    """Return small photos in several variants of each format."""
    photo, exif = draw_photo(40, 30), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    grey, alpha, palette = photo.convert("L"), photo.convert("RGBA"), photo.quantize(50)
    alpha.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [photo.rotate(90), photo.rotate(180)]}
    profile = {"icc_profile": bytes(300), "exif": exif}
    photos = {
        "JPEG": save(photo, format="JPEG", **profile),
        "JPEG progressive": save(photo, format="JPEG", progressive=True, comment=b"a comment"),
        "JPEG CMYK": save(photo.convert("CMYK"), format="JPEG"),
        "JPEG grey": save(grey, format="JPEG", restart_marker_blocks=2),
        "JPEG without end": save(photo, format="JPEG", restart_marker_rows=1)[:-2],
        "JPEG of several": save(photo.copy(), format="MPO", save_all=True, append_images=[grey]),
        "PNG": save(photo, format="PNG", **profile),
        "PNG alpha": save(alpha, format="PNG"),
        "PNG palette": save(palette, format="PNG", transparency=3),
        "PNG 16 bits": save(deep, format="PNG"),
        "PNG animated": save(photo, format="PNG", **frames),
        "GIF": save(palette, format="GIF", transparency=3, comment=b"a comment"),
        "GIF animated": save(photo, format="GIF", **frames),
        "WebP": save(photo, format="WEBP", **profile),
        "WebP lossless alpha": save(alpha, format="WEBP", lossless=True),
        "WebP animated": save(photo, format="WEBP", **frames),
        "TIFF": save(photo, format="TIFF", tiffinfo=exif),
        "TIFF LZW": save(photo, format="TIFF", compression="tiff_lzw"),
        "TIFF deflate alpha": save(alpha, format="TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": save(photo, format="TIFF", compression="jpeg"),
        "TIFF pages": save(grey, format="TIFF", **frames),
        "TIFF 16 bits": save(deep, format="TIFF", compression="packbits", big_tiff=True),
        "BMP": save(photo, format="BMP"),
        "BMP palette": save(palette, format="BMP"),
        "PPM": save(photo, format="PPM"),
        "PPM 16 bits": save(deep, format="PPM"),
        "PPM 10 bits": b"P5 40 30 1023 " + (np.asarray(deep) // 64).astype(">u2").tobytes(),
    }
    if "HEIF" in Image.SAVE:
        turned = {"format": "HEIF", "exif": exif.tobytes()}
        photos["HEIC"] = save(photo, **turned)
        photos["HEIC alpha"] = save(alpha, format="HEIF")
        photos["HEIC 10 bits"] = save(deep, format="HEIF")
        photos["HEIC of several"] = save(photo, format="HEIF", **frames, thumbnails=[16])
    if "AVIF" in FORMATS:  # Last, because Pillow takes the orientation out of what it is given.
        photos["AVIF alpha"] = save(alpha, format="AVIF", speed=10)
        photos["AVIF"] = save(photo, format="AVIF", speed=10, **profile)
    return photos


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Break a file in one to four ways."""
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        size = max(1, len(broken))
        head = min(size, 200) if rng.random() < 0.6 else size  # headers lie at the start
        at, length = int(rng.integers(head)), int(rng.integers(1, 1 + min(size, 60)))
        match rng.integers(8):
            case 0:
                for i in rng.integers(size, size=rng.integers(1, 20)):
                    broken[i : i + 1] = rng.bytes(1)
            case 1:
                broken[at:at] = rng.bytes(length)
            case 2:
                del broken[at : at + length]
            case 3:
                broken[at:at] = broken[at : at + length] * int(rng.integers(1, 30))
            case 4:
                width, order = int(rng.choice([1, 2, 4])), str(rng.choice(["big", "little"]))
                value = int(rng.choice(EXTREMES)) % 256**width
                broken[at : at + width] = value.to_bytes(width, order)
            case 5:
                other = others[rng.integers(len(others))]
                broken = broken[: size // 2] + other[len(other) // 2 :]
            case 6:
                word = DICTIONARY[rng.integers(len(DICTIONARY))]
                broken[at : at + len(word) * int(rng.integers(2))] = word
            case 7:
                del broken[at:]
    return bytes(broken)


def open_case(path: Path, data: bytes) -> tuple[str, float]:
    """Open a file of these bytes; return the outcome and the seconds it took."""
    path.write_bytes(data)
    started = time.process_time()  # not affected by other processes
    try:
        photo = open_photo(path)
        outcome = "photo"
    except PhotoError as error:
        photo, outcome, message = None, "refused", str(error)
    seconds = time.process_time() - started
    if photo:
        assert photo.mode == "RGB"
        assert photo.width * photo.height <= MAX_PIXELS
    else:
        assert message.startswith(f"{path}: ")
        assert len(message) < 500
        assert "\n" not in printable(message)
    return outcome, seconds


def fuzz(folder: Path, *, cases: int, seed: int, minutes: float = 60) -> tuple[Counter, float]:
    """Open `cases` mutations, and every photo cut short at each per cent.

    Returns the counts by format and outcome, and the slowest case with its seconds.
    """
    valid, counts, slowest = valid_photos(), Counter(), (0.0, "")
    rng, deadline = np.random.default_rng(seed), time.monotonic() + 60 * minutes

    def broken_files():
        for form, data in valid.items():
            yield form, f"cut at {0} %", b""
            yield from (
                (form, f"cut at {percent} %", data[: len(data) * percent // 100])
                for percent in range(1, 100)
            )
        forms, others = list(valid), list(valid.values())
        for case in range(cases):
            form = forms[case % len(forms)]
            yield form, f"mutation {case}", mutate(valid[form], others, rng)

    for form, name, data in broken_files():
        path = folder / "case.jpg"
        try:
            outcome, seconds = open_case(path, data)
        except BaseException:
            print(f"{form}, {name}, seed {seed}: see {path}", file=sys.stderr)
            raise
        counts[form.split()[0], outcome] += 1
        slowest = max(slowest, (seconds, f"{form}, {name}"))
        if time.monotonic() > deadline:
            break
    return counts, slowest


def test_any_bytes_give_a_photo_or_one_line_that_names_the_file(tmp_path, capfd):
    counts, (seconds, case) = fuzz(tmp_path, cases=1_000, seed=0)
    assert sum(counts.values()) >= 3_000
    for form in ("JPEG", "PNG", "GIF", "WebP", "TIFF", "BMP", "PPM"):
        # With fewer, the mutations would hardly get past the first check.
        assert counts[form, "photo"] >= 5, counts
        assert counts[form, "refused"] >= 50, counts
    assert seconds < MAX_SECONDS, case
    assert capfd.readouterr() == ("", "")


def test_the_photos_were_valid_before_they_were_broken(tmp_path):
    for form, data in valid_photos().items():
        assert open_case(tmp_path / "photo", data)[0] == "photo", form
        turned = form in ("AVIF", "HEIC", "JPEG", "PNG", "WebP", "TIFF")
        assert open_photo(tmp_path / "photo").size == ((30, 40) if turned else (40, 30)), form


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryFile() as messages:
        stderr, folder = os.dup(2), Path(tempfile.mkdtemp())
        os.dup2(messages.fileno(), 2)  # with the messages of C libraries
        try:
            counts, (seconds, case) = fuzz(
                folder, cases=args.cases, seed=args.seed, minutes=args.minutes
            )
        finally:
            os.dup2(stderr, 2)
            messages.seek(0)
            print(f"seed {args.seed}; on stderr: {messages.read()[-2000:]!r}")
        shutil.rmtree(folder)  # not reached after a crash, which keeps the case's file
    for (form, outcome), count in sorted(counts.items()):
        print(f"{form:5} {outcome:8} {count:6,}")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{sum(counts.values()):,} cases; slowest {seconds:.3f} s ({case}); "
        f"peak memory {growth:.0f} MiB more than at the start"
    )


if __name__ == "__main__":
    main()
