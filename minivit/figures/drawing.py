"""Begin a chart and write it: every figure of matplotlib goes through `new_figure` and `save`.

A figure looks the same whatever the user's settings of matplotlib. Figures of photos are composed
on a canvas (canvas.py) instead, which is much faster.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..system.files import whole_file
from . import fonts
from .marks import SOFTWARE
from .mpl import DPI, default_settings
from .mpl_charts import Figure, FigureCanvasAgg, Text


@contextlib.contextmanager
def new_figure(
    size: tuple[float, float],
    *,
    layout: Literal["constrained"] | None = None,
    dpi: float = DPI,
) -> Iterator[Figure]:
    """Yield an empty white figure of a size in inches.

    The user's own figures in the same program are left as they are.
    """
    with default_settings():
        figure = Figure(size, layout=layout, dpi=dpi)
        FigureCanvasAgg(figure)
        yield figure


def save(figure: Figure, path: Path) -> str:
    """Write a figure as PNG, whole or not at all; return the characters that it cannot show."""
    missing = _give_fonts(figure)
    with whole_file(path) as partial, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Level 3 halves the time for a tenth more bytes.
        figure.savefig(
            partial,
            format="png",
            metadata={"Software": SOFTWARE},
            pil_kwargs={"compress_level": 3},
        )
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) ", str(warning.message))
        if glyph:
            missing.add(chr(int(glyph[1])))
    return fonts.report_from_main_process(missing)


def _give_fonts(figure: Figure) -> set[str]:
    """Give all texts of a figure the fonts that they need; return what they cannot show even so."""
    texts = [artist for artist in figure.findobj(Text) if isinstance(artist, Text)]
    characters = {character for text in texts for character in text.get_text()}
    needed = fonts.lacking(characters)
    if not needed:
        return fonts.not_shaped(characters)
    families, missing = fonts.fallback_families(frozenset(needed))
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *families])
    return set(missing) | fonts.not_shaped(characters)
