"""Shorten names to one line that is not too wide."""

from __future__ import annotations

import unicodedata

from ..errors import printable


def columns(text: str) -> int:
    """Return the width of a text in Latin letters; a Chinese character is as wide as two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def shorten(name: str, length: int) -> str:
    """Return a name as one line that is at most as wide as `length` Latin letters."""
    name = printable(name)
    if columns(name) <= length:
        return name
    while columns(name) > length - 1:
        name = name[:-1]
    return name + "…"
