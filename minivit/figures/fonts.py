"""Fonts for names in any script: those installed are looked through for what DejaVu Sans lacks."""

from __future__ import annotations

import functools
import multiprocessing
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import printable
from .mpl import FT2Font, font_manager, matplotlib

# Words in the file names of fonts that other fonts are preferred to.
PLAINER_FIRST = ("bold", "italic", "oblique", "light", "thin", "black", "medium", "mono", "serif")
# Fonts that have a box, or an image in colour, in place of the outlines that matplotlib draws.
WITHOUT_OUTLINES = ("lastresort", "coloremoji", "color emoji", "blank")
# Selectors of a glyph's variant are not drawn themselves.
VARIATION_SELECTORS = frozenset(map(chr, range(0xFE00, 0xFE10)))
# What to install for a script, by the first word of its characters' Unicode names.
NOTO_CJK = "Noto Sans CJK (apt install fonts-noto-cjk)"
PACKAGES = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC"), NOTO_CJK)
OTHER_SCRIPTS = "Noto Sans (apt install fonts-noto-core)"
SYMBOLS = "Symbola (apt install fonts-symbola)"
# The first version of matplotlib that joins letters, and writes from right to left.
SHAPES_TEXT = (3, 11)
SHAPED_SCRIPTS = frozenset(
    [
        *("ARABIC", "HEBREW", "SYRIAC", "THAANA", "NKO"),
        *("DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU"),
        *("KANNADA", "MALAYALAM", "SINHALA", "MYANMAR", "KHMER", "TIBETAN"),
    ]
)
MAX_SHOWN = 30  # characters in a message

_reported: set[str] = set()  # what was advised to install


def lacking(characters: Iterable[str]) -> set[str]:
    """Return those characters that matplotlib's own font, DejaVu Sans, does not have."""
    others = {character for character in characters if not character.isascii()}
    if not others:
        return set()
    regular = font_manager.findfont(font_manager.FontProperties(family=["DejaVu Sans"]))
    return others - VARIATION_SELECTORS - _characters_of(regular)


@functools.lru_cache(maxsize=64)
def fallback_families(characters: frozenset[str]) -> tuple[Sequence[str], frozenset[str]]:
    """Return installed font families that have the characters, and the characters that none has.

    Each family has most of the characters that the families before it lack.
    """
    found: dict[Path, frozenset[str]] = {}
    for path in _installed_fonts():
        covered = characters & _characters_of(str(path))
        if covered:
            found[path] = covered
    families = []
    remaining = characters
    while remaining and found:
        # Of fonts with equally many, max takes the first, which is the plainest.
        best = max(found, key=lambda path: len(found[path] & remaining))
        covered = found.pop(best) & remaining
        if not covered:
            break
        families.append(_add_family(best))
        remaining -= covered
    return families, remaining


def _installed_fonts() -> list[Path]:
    """Return the files of all installed fonts that have outlines, the plainest first.

    matplotlib's own list may be older than a font that was just installed.
    """
    paths = set(map(Path, font_manager.findSystemFonts()))
    paths |= {Path(entry.fname) for entry in font_manager.fontManager.ttflist}

    def order(path: Path) -> tuple[int, str]:
        name = path.name.lower()
        return sum(word in name for word in PLAINER_FIRST), name

    drawn = [path for path in paths if not any(w in path.name.lower() for w in WITHOUT_OUTLINES)]
    return sorted(drawn, key=order)


@functools.lru_cache(maxsize=1024)
def _characters_of(path: str) -> frozenset[str]:
    """Return the characters that matplotlib can draw with a font."""
    try:
        font = FT2Font(path)
        # matplotlib 3.11 draws nothing where a font has bitmaps of small sizes.
        return frozenset() if font.num_fixed_sizes else frozenset(map(chr, font.get_charmap()))
    except (OSError, RuntimeError, ValueError):  # This is no font, or one of another kind.
        return frozenset()


def _add_family(path: Path) -> str:
    """Make sure that matplotlib lists a font, and return the name of its family."""
    manager = font_manager.fontManager
    if not any(Path(entry.fname) == path for entry in manager.ttflist):
        manager.addfont(str(path))
    faces = [entry for entry in manager.ttflist if Path(entry.fname) == path]
    # Of several faces in a file, the first is the one that was looked into.
    first: Any = min(faces, key=lambda face: getattr(face, "index", 0))
    return first.name


def not_shaped(characters: Iterable[str]) -> set[str]:
    """Return those characters that this version of matplotlib has glyphs for but cannot join."""
    if matplotlib.__version_info__[:2] >= SHAPES_TEXT:
        return set()
    return {character for character in characters if _script(character) in SHAPED_SCRIPTS}


def report_lacking(characters: str | None) -> None:
    """Say on stderr that figures cannot show these characters as they should be.

    Each font, or version of matplotlib, that would help is named once only.
    """
    unshaped = not_shaped(characters or "")
    if unshaped and "matplotlib" not in _reported:
        _reported.add("matplotlib")
        scripts = " and ".join(sorted({_script(character).title() for character in unshaped}))
        newer = ".".join(map(str, SHAPES_TEXT))
        print(
            f"matplotlib {matplotlib.__version__} draws {scripts} letter by letter; "
            f"install matplotlib {newer} or newer, which joins the letters",
            file=sys.stderr,
        )
    boxes = sorted(set(characters or "") - unshaped)
    packages = sorted({_package(character) for character in boxes} - _reported)
    if packages:
        _reported.update(packages)
        shown = printable("".join(boxes[:MAX_SHOWN]))
        if len(boxes) > MAX_SHOWN:
            shown += f"… ({len(boxes)} characters)"
        print(
            f"no installed font has {shown}: figures show boxes in their place; "
            f"install a font that has them, such as {' and '.join(packages)}",
            file=sys.stderr,
        )


def report_from_main_process(missing: Iterable[str]) -> str:
    """Say on stderr which characters a figure cannot show, and return them.

    A worker process says nothing: whoever gets its result reports them once for all workers.
    """
    characters = "".join(sorted(missing))
    if multiprocessing.parent_process() is None:
        report_lacking(characters)
    return characters


def _script(character: str) -> str:
    """Return the first word of a character's Unicode name, which for a letter is its script."""
    return unicodedata.name(character, "").split(" ")[0].split("-")[0]


def _package(character: str) -> str:
    """Return the name of a font that has a character, and how to install it."""
    if _script(character) in PACKAGES:
        return PACKAGES[_script(character)]
    return OTHER_SCRIPTS if unicodedata.category(character)[0] in "LM" else SYMBOLS
