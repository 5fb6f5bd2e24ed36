"""Take an image's own data out of a JPEG, PNG or WebP file.

What follows or accompanies an image changes none of its pixels: a phone's video, previews,
profiles, the text that programs write. It is left out here, so that it can neither make a photo
unreadable nor exhaust a decoder. Only what turns a photo upright is kept.
"""

from __future__ import annotations

import io
import itertools
import re
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 1 << 16
# Encoders write a chunk for every 8 KB of a PNG or more. Files made to exhaust a decoder have
# millions of empty parts.
MAX_PARTS = 100_000
# The most that fits in a segment of a JPEG. Metadata that is longer is cut or left out.
MAX_METADATA_BYTES = 65_535

JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
# A marker between the segments of a JPEG, and one from the first scan on. Within a scan, FF 00
# stands for the byte FF, and D0 to D7 are restarts, which belong to the scan.
MARKER = re.compile(rb"\xff[^\x00\xff]")
MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
START, END, SCAN = 0xD8, 0xD9, 0xDA
# What a decoder reads before the first scan.
TABLE_MARKERS = frozenset((0xC4, 0xCC, 0xDB, 0xDC, 0xDD))
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Segments of applications, and comments.
METADATA_MARKERS = frozenset((*range(0xE0, 0xF0), 0xFE))
# The application segments that matter. Two give the colour space, two the orientation.
JFIF, ADOBE = b"JFIF\0", b"Adobe"
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# After a restart, data is due.
RESTART_AT_END = re.compile(rb"\xff[\xd0-\xd7]\Z")
# A run of one byte at the end of a JPEG is space that was reserved for a download, not a scan.
RESERVED_SPACE = re.compile(rb"(\xff?\x00{16,}|\xff+)\Z")

WEBP_START = re.compile(rb"RIFF....WEBP", re.DOTALL)
WEBP_KIND = re.compile(rb"[ -~]{4}")
WEBP_CHUNKS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP ")

PNG_START = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
# The chunks that Pillow reads the orientation from, and how they begin. XMP is not compressed;
# a profile is, in its first byte after the keyword.
ORIENTATION_CHUNKS = {
    b"eXIf": b"",
    b"iTXt": b"XML:com.adobe.xmp\0\0",
    b"tEXt": b"Raw profile type exif\0",
    b"zTXt": b"Raw profile type exif\0\0",
}


@dataclass(frozen=True)
class ImageData:
    """A file that holds an image and its orientation, and little else."""

    data: bytes
    scans: int = 0  # of a JPEG
    # Whether a JPEG breaks off where pixels may or may not be missing: late in its last scan.
    breaks_off: bool = False


def own_data(file: BinaryIO, max_bytes: int) -> ImageData | None:
    """Return the image's own data, or None for a file of another format.

    No more of the file is read than the image needs. Raises ValueError if that is more than
    `max_bytes`, or in too many parts. A file that breaks off gives as much as there is.
    """
    start = file.read(12)
    file.seek(0)
    if start.startswith(JPEG_START + b"\xff"):
        return _JpegReader(file, max_bytes).read()
    if start.startswith(PNG_START):
        return _read_png(file, max_bytes)
    if WEBP_START.match(start):
        return _read_webp(file, max_bytes)
    return None


def next_restart(data: bytes) -> bytes:
    """Return the restart marker that comes next in a JPEG which breaks off."""
    restarts = [bytes((0xFF, 0xD0 + i)) for i in range(8)]
    last = max(range(8), key=lambda i: data.rfind(restarts[i]))
    is_first = data.rfind(restarts[last]) < 0
    return restarts[0 if is_first else (last + 1) % 8]


class _Kept:
    """The parts of a file that are kept, limited in size and number."""

    def __init__(self, max_bytes: int) -> None:
        self.buffer = io.BytesIO()
        self.max_bytes = max_bytes
        self.parts = 0

    def count(self) -> None:
        """Count a part of the file, whether it is kept or not."""
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS:,} parts")

    def write(self, data: bytes) -> None:
        self.buffer.write(data)
        if self.buffer.tell() > self.max_bytes:
            raise ValueError(f"expected an image of at most {self.max_bytes:,} bytes")

    def copy(self, file: BinaryIO, size: int) -> None:
        """Write the next bytes of a file, or as many as it has."""
        while size > 0:
            data = file.read(min(size, BLOCK_BYTES))
            if not data:
                return
            self.write(data)
            size -= len(data)


class _JpegReader:
    """Reads the image that a JPEG file begins with, block by block."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self.file = file
        self.kept = _Kept(max_bytes)
        self.block = b""
        self.position = 0  # in the block
        self.components = 0  # of the image: 1, 3 or 4
        # The coefficients of each component whose last bit lies in a scan.
        self.complete: set[tuple[int, int]] = set()

    def read(self) -> ImageData:
        """Return the image up to its end marker, or up to where it breaks off."""
        scans = 0
        self.kept.write(self._take(len(JPEG_START)))
        marker = self._copy_header()
        while marker is not None and marker != END:
            self.kept.count()
            if marker == START and self._peek(1) == b"\xff":
                marker = None  # The next image begins, and this one has no end marker.
                break
            self._keep_marker(marker)
            if marker == SCAN:
                scans += 1
                self._note_scan(self._peek(self._segment_size()))
            elif marker in METADATA_MARKERS:
                self._copy_metadata()
            marker = self._next_marker(MARKER_IN_SCAN, keep=True)
        if marker is None and scans:
            return self._broken_off(scans)
        if marker == END:
            self.kept.write(JPEG_END)
        return ImageData(self.kept.buffer.getvalue(), scans)

    def _copy_header(self) -> int | None:
        """Copy what a decoder needs before the first scan; return the marker that comes then."""
        seen: set[bytes] = set()  # kinds of metadata
        marker = self._next_marker(MARKER)
        while marker is not None and marker not in (SCAN, END):
            self.kept.count()
            if marker in METADATA_MARKERS:
                segment = self._take(self._segment_size())
                for kind in (JFIF, ADOBE, EXIF, XMP):
                    if segment.startswith(kind, 2) and kind not in seen:
                        seen.add(kind)
                        self._keep_marker(marker)
                        self.kept.write(segment)
            else:
                self._keep_marker(marker)
            if marker in FRAME_MARKERS:
                self.components = int.from_bytes(self._peek(8)[7:], "big")
            if marker in (*FRAME_MARKERS, *TABLE_MARKERS):
                self.kept.write(self._take(self._segment_size()))
            marker = self._next_marker(MARKER)
        return marker

    def _copy_metadata(self) -> None:
        """Copy a segment of metadata between scans, so that no marker is looked for in it.

        In a damaged scan, what looks like such a segment is not: no marker follows it.
        """
        size = self._segment_size()
        if self._peek(size + 1)[size:] == b"\xff":
            self.kept.write(self._take(size))

    def _broken_off(self, scans: int) -> ImageData:
        data = RESERVED_SPACE.sub(b"", self.kept.buffer.getvalue())
        may_be_whole = len(self.complete) == 64 * self.components
        if RESTART_AT_END.search(data):
            may_be_whole = False
        return ImageData(data, scans, breaks_off=may_be_whole)

    def _note_scan(self, segment: bytes) -> None:
        """Remember which coefficients are complete with a scan."""
        # The segment has a length, a number of components and two bytes for each, and three bytes
        # that say which coefficients it sends, down to which bit.
        selectors, span = segment[3:-3:2], segment[-3:]
        if len(span) == 3 and span[2] % 16 == 0:  # The lowest bit is sent.
            coefficients = range(span[0], span[1] + 1)
            self.complete.update(itertools.product(selectors, coefficients))

    def _next_marker(self, pattern: re.Pattern[bytes], *, keep: bool = False) -> int | None:
        """Skip, or keep, what lies before the next marker; return it, or None at the end."""
        while True:
            match = pattern.search(self.block, self.position)
            end = match.start() if match else len(self.block.removesuffix(b"\xff"))
            if keep:
                self.kept.write(self.block[self.position : end])
            if match:
                self.position = match.end()
                return match[0][1]
            # A marker may begin with the last byte of this block.
            self.position = max(end, self.position)
            if not self._read_on():
                return None

    def _keep_marker(self, marker: int) -> None:
        self.kept.write(bytes((0xFF, marker)))

    def _segment_size(self) -> int:
        """Return the size of the segment that comes next, which begins with its size."""
        return max(2, int.from_bytes(self._peek(2), "big"))

    def _take(self, size: int) -> bytes:
        """Return the next bytes of the file, fewer at its end."""
        taken = self._peek(size)
        self.position += len(taken)
        return taken

    def _peek(self, size: int) -> bytes:
        """Return the next bytes of the file without taking them."""
        while len(self.block) < self.position + size and self._read_on():
            pass
        return self.block[self.position : self.position + size]

    def _read_on(self) -> bool:
        """Read more behind what is left of the block; return False at the end of the file."""
        more = self.file.read(BLOCK_BYTES)
        self.block = self.block[self.position :] + more
        self.position = 0
        return bool(more)


def _read_png(file: BinaryIO, max_bytes: int) -> ImageData:
    kept = _Kept(max_bytes)
    kept.write(file.read(len(PNG_START)))
    seen: set[bytes] = set()  # kinds of metadata
    while True:
        header = file.read(8)
        length = int.from_bytes(header[:4], "big")
        kind = header[4:]
        if len(header) < 8:
            break  # Without an end, the pixels may still be complete.
        kept.count()
        if kind == b"IEND":
            kept.write(_chunk(b"IEND", b""))
            break
        if kind in PIXEL_CHUNKS:
            kept.write(header)
            kept.copy(file, length + 4)  # with the checksum
            continue
        end = file.tell() + length + 4
        start = ORIENTATION_CHUNKS.get(kind)
        if start is not None and kind not in seen:
            contents = file.read(min(length, MAX_METADATA_BYTES))
            if contents.startswith(start):
                seen.add(kind)
                kept.write(_metadata_chunk(kind, contents))
        file.seek(end)
    return ImageData(kept.buffer.getvalue())


def _metadata_chunk(kind: bytes, contents: bytes) -> bytes:
    """Return a chunk that holds an orientation, perhaps, and that cannot inflate."""
    if kind != b"zTXt":
        return _chunk(kind, contents)
    keyword = ORIENTATION_CHUNKS[b"tEXt"]
    compressed = contents.removeprefix(ORIENTATION_CHUNKS[b"zTXt"])
    try:
        # Two digits stand for a byte.
        text = zlib.decompressobj().decompress(compressed, 2 * MAX_METADATA_BYTES)
    except zlib.error:
        return b""
    return _chunk(b"tEXt", keyword + text)


def _chunk(kind: bytes, contents: bytes) -> bytes:
    checksum = zlib.crc32(kind + contents)
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", checksum)


def _read_webp(file: BinaryIO, max_bytes: int) -> ImageData:
    """Return the chunks of a WebP. Its header may give them another size, which decoders mind."""
    start = file.read(12)
    kept = _Kept(max_bytes)
    kinds: set[bytes] = set()
    header = file.read(8)
    # Chunks of other kinds are allowed, and ignored.
    while len(header) == 8 and WEBP_KIND.match(header):
        kept.count()
        kind, length = header[:4], int.from_bytes(header[4:], "little")
        padding = length % 2
        if kind in WEBP_CHUNKS:
            kinds.add(kind)
            kept.write(header)
            kept.copy(file, length)
            kept.write(bytes(padding))
            file.seek(padding, io.SEEK_CUR)
        else:
            file.seek(length + padding, io.SEEK_CUR)
        header = file.read(8)
    chunks = kept.buffer.getvalue()
    is_cut = len(header) < 8 and file.tell() < 8 + int.from_bytes(start[4:8], "little")
    if is_cut and _announces_exif(chunks) and b"EXIF" not in kinds:
        raise ValueError("image file is truncated, and its orientation is missing")
    return ImageData(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + start[8:] + chunks)


def _announces_exif(chunks: bytes) -> bool:
    """Return whether the first chunk of a WebP says that one of EXIF follows."""
    return chunks.startswith(b"VP8X") and len(chunks) > 8 and bool(chunks[8] & 8)
