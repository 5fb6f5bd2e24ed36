"""A canvas for figures of photos: images, frames and text, composed pixel by pixel.

This takes a fifth of the time that a figure of matplotlib takes. The letters are still matplotlib's
own: it finds fonts for any script, joins Arabic letters, and draws a text in one call.
"""

from __future__ import annotations

import functools
import math
import re
import struct
import textwrap
import threading
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import printable
from ..system.files import whole_file
from . import fonts
from .marks import SOFTWARE
from .mpl import DPI, HINTING, default_settings, font_manager

Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)
GREY: Colour = (64, 64, 64)
GREEN: Colour = (27, 120, 55)
RED: Colour = (178, 24, 43)

# On a figure of a photo, zlib's level 1 takes 21 ms. Level 3 takes 36, for a file 4% smaller.
PNG_LEVEL = 1
LINE_SPACING = 1.2  # from one line's letters to the next line's, in heights of a letter
DRAWN_LINES = 512  # lines of text that are kept because other figures repeat them


class Canvas:
    """A white picture to put images, frames and text on, in pixels from its left and top."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height, width, 3), 255, np.uint8)
        self._missing: set[str] = set()

    def paste(self, image: np.ndarray, left: int, top: int) -> None:
        """Put an image, uint8 (h, w, 3), on the canvas."""
        h, w = image.shape[:2]
        self.pixels[top : top + h, left : left + w] = image

    def frame(
        self, edges: tuple[float, float, float, float], colour: Colour, thickness: int
    ) -> None:
        """Draw a frame, the middle of whose lines lies on the edges: left, top, right, bottom."""
        left, top, right, bottom = (round(edge) for edge in edges)
        before = thickness // 2
        after = thickness - before
        x0, x1 = max(left - before, 0), right + after
        y0, y1 = max(top - before, 0), bottom + after
        for y in (top, bottom):
            self.pixels[max(y - before, 0) : y + after, x0:x1] = colour
        for x in (left, right):
            self.pixels[y0:y1, max(x - before, 0) : x + after] = colour

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        *,
        align: Literal["left", "center", "right"] = "left",
        colour: Colour = BLACK,
        bold: bool = False,
    ) -> None:
        """Write lines of text, in a size in points, with the top of the first one at y.

        `align` says which part of each line is at x. What lies outside of the canvas is cut off.
        """
        ascent, line_height = _metrics(size)
        for number, text_line in enumerate(text.split("\n")):
            line = _draw_line(text_line, size, bold)
            self._missing |= line.missing
            width = line.opacity.shape[1]
            left = round(x - {"left": 0, "center": width / 2, "right": width}[align])
            top = round(y + ascent + number * line_height) - line.ascent
            self._blend(line.opacity, left, top, colour)

    def _blend(self, opacity: np.ndarray, left: int, top: int, colour: Colour) -> None:
        """Lay a colour over the canvas, as opaque as each pixel of `opacity`, uint8 (h, w)."""
        opacity = opacity[max(-top, 0) :, max(-left, 0) :]
        top = max(top, 0)
        left = max(left, 0)
        h, w = opacity.shape
        below = self.pixels[top : top + h, left : left + w]
        alpha = opacity[: len(below), : below.shape[1], None] / 255
        below[:] = np.rint(below + alpha * (np.array(colour) - below))

    def save(self, path: Path) -> str:
        """Write a PNG, whole or not at all; return the characters that it cannot show.

        These are reported as fonts.report_from_main_process says.
        """
        with whole_file(path) as partial:
            partial.write_bytes(_encode_png(self.pixels))
        return fonts.report_from_main_process(self._missing)


def _encode_png(pixels: np.ndarray) -> bytes:
    """Return a PNG of pixels, uint8 (h, w, 3), that says which program wrote it.

    Each row is stored as its difference from the row above. Pillow tries five ways for each row:
    that takes twice as long, for files of the same size.
    """
    h, w, _ = pixels.shape
    filtered = np.empty((h, 1 + 3 * w), np.uint8)
    filtered[:, 0] = 2  # the number of this filter, which PNG calls Up
    rows = pixels.reshape(h, -1)
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]
    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = {
        b"IHDR": header,
        b"tEXt": b"Software\0" + SOFTWARE.encode(),
        b"IDAT": zlib.compress(filtered.tobytes(), PNG_LEVEL),
        b"IEND": b"",
    }
    png = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks.items():
        png += [struct.pack(">I", len(data)), name, data]
        png.append(struct.pack(">I", zlib.crc32(name + data)))
    return b"".join(png)


def text_width(text: str, size: float, *, bold: bool = False) -> int:
    """Return the width in pixels of the widest line of a text."""
    return max(_draw_line(line, size, bold).opacity.shape[1] for line in text.split("\n"))


def text_height(text: str, size: float) -> int:
    """Return the height in pixels of the lines of a text."""
    ascent, line_height = _metrics(size)
    descent = line_height - LINE_SPACING * ascent
    return math.ceil(text.count("\n") * line_height + ascent + descent)


def fit(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """Return a text as one line of at most `width` pixels; what is too much is left out inside.

    A file's number and a prediction's probability, at the end, are thus still there.
    """
    text = printable(text)
    most = max(int(width), 2)  # No letter is narrower than a pixel.
    if len(text) > most:
        text = text[: most // 2] + text[-(most // 2) :]
    elif text_width(text, size, bold=bold) <= width:
        return text
    kept = 0
    too_many = len(text)
    while too_many - kept > 1:
        middle = (kept + too_many) // 2
        if text_width(_leave_out(text, middle), size, bold=bold) <= width:
            kept = middle
        else:
            too_many = middle
    return _leave_out(text, kept)


def wrap(text: str, width: float, size: float, characters: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, and of so many characters at first."""
    lines = textwrap.wrap(text, characters)
    while characters > 1 and any(text_width(line, size) > width for line in lines):
        characters -= 1
        lines = textwrap.wrap(text, characters)
    return lines


def _leave_out(text: str, kept: int) -> str:
    """Keep so many characters of a text: its beginning and its end."""
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


@dataclass(frozen=True)
class _Line:
    """A line of text that is drawn: the opacity of each pixel, uint8 (h, w)."""

    opacity: np.ndarray
    ascent: int  # rows above the line that the letters stand on
    missing: frozenset[str]  # characters that are not drawn as they should be


@functools.lru_cache(DRAWN_LINES)
def _draw_line(text: str, size: float, bold: bool) -> _Line:
    # A file's name need not be UTF-8. Its other bytes are shown as escapes.
    text = text.encode("utf-8", "backslashreplace").decode()
    characters = set(text)
    families: tuple[str, ...] = ()
    missing = fonts.not_shaped(characters)
    needed = fonts.lacking(characters)
    if needed:
        fallbacks, lacking = fonts.fallback_families(frozenset(needed))
        families = tuple(fallbacks)
        missing |= lacking
    font = _open_font(families, bold, thread=threading.get_ident())
    font.set_size(size, DPI)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        font.set_text(text, 0.0, flags=HINTING)
        font.draw_glyphs_to_bitmap(antialiased=True)
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) ", str(warning.message))
        if glyph:
            missing.add(chr(int(glyph[1])))
    opacity = np.array(font.get_image())
    return _Line(opacity, len(opacity) - round(font.get_descent() / 64), frozenset(missing))


@functools.lru_cache(64)
def _open_font(families: tuple[str, ...], bold: bool, *, thread: int) -> Any:
    """Open DejaVu Sans, with other families for what it lacks.

    A font draws one text at a time, so that each thread has its own.
    """
    del thread  # It only tells the fonts of threads apart.
    with default_settings():
        weight = "bold" if bold else "normal"
        paths = []
        for family in ("DejaVu Sans", *families):
            wanted = font_manager.FontProperties(family=[family], weight=weight)
            paths.append(font_manager.findfont(wanted))
        return font_manager.get_font(paths)


@functools.lru_cache
def _metrics(size: float) -> tuple[float, float]:
    """Return how far a line's letters stand below its top, and how far lines are apart."""
    line = _draw_line("lp", size, False)  # the highest letter and the lowest
    descent = len(line.opacity) - line.ascent
    ascent = line.ascent - 1  # Above the letters, a row is empty.
    return ascent, LINE_SPACING * ascent + descent
