"""Figures of photos: where a model looks at one, and the predictions for many.

Shapes: gh, gw patches of a map; h, w pixels of a panel, which shows the whole photo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.photos import open_photo
from ..data.preprocess import Preprocess
from .canvas import BLACK, GREEN, GREY, RED, WHITE, Canvas, fit, text_height, text_width, wrap
from .mpl import colormaps

# Colours from dark to light, float32 (256, 3) from 0 to 255.
HEAT = 255 * colormaps["inferno"](np.arange(256))[:, :3].astype(np.float32)
SIGNED = 255 * colormaps["cividis"](np.arange(256))[:, :3].astype(np.float32)
# Sizes of text, in points.
TITLE = 11.0
LABEL = 9.0
CAPTION = 8.0
SMALL = 7.5
# Measures of draw_attention, in pixels.
MARGIN = 14
LEAST_PANEL = 160  # the width of a cell without its margin, if its panel is narrower
LEAST_WIDTH = 560
CAPTION_LINE = 16
CHARACTER = 7  # the width of an average one of the caption
BETWEEN = 10  # from the low end of a range to its high end, at least


@dataclass(frozen=True)
class Panel:
    """A map (gh, gw) in per cent, with its title and a note, which `warn` makes red.

    The parts of a note are separated by " · ". In a narrow panel, each has its own line.
    """

    title: str
    values: np.ndarray
    note: str = ""
    warn: bool = False


@dataclass(frozen=True)
class Row:
    """Panels that belong together, and the label of the photo beside them.

    The maps of a `signed` row are differences.
    """

    label: str
    panels: Sequence[Panel]
    signed: bool = False


@dataclass(frozen=True)
class AttentionFigure:
    """What draw_attention draws: rows of maps over a photo, beside the photo itself.

    `photo` is uint8 (h, w, 3), shown at this size, and `photo_size` (W, H) the size that it was
    taken at; `preprocess` says where the maps lie on it. Each map has a colour scale of its own or,
    with `shared_scale`, that of its row. Differences always share their row's. `query_box` is the
    patch to mark: left, top, right and bottom, as fractions of the photo. The parts of the title
    stand in one line if they fit, else each in its own.
    """

    photo: np.ndarray
    photo_size: tuple[int, int]
    preprocess: Preprocess
    rows: Sequence[Row]
    title: Sequence[str]
    caption: str
    shared_scale: bool = False
    query_box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class _Layout:
    """Where draw_attention puts things, in pixels from the figure's left and top.

    Each row starts with a cell for the photo, and a cell for each panel follows. The rows of a
    panorama run from top to bottom instead of from left to right.
    """

    size: tuple[int, int]  # of the figure, width and height
    cell: tuple[int, int]  # width and height
    first: tuple[int, int]  # the left and top of the photo in the first cell
    panel_width: int
    stacked: bool
    title: str  # in one line or several
    caption: list[str]

    def position(self, row: int, column: int) -> tuple[int, int]:
        """Return the left and top of the photo in a cell."""
        if self.stacked:
            row, column = column, row
        return self.first[0] + column * self.cell[0], self.first[1] + row * self.cell[1]

    @property
    def text_room(self) -> int:
        """The width that text may have in a cell."""
        return self.cell[0] - MARGIN

    def text_left(self, x: int, width: int) -> int:
        """Return where to begin a text of this width: at the left of the photo, if there is room.

        Otherwise it begins so far to the left that it ends with the cell.
        """
        margin = (self.text_room - self.panel_width) // 2  # beside a photo narrower than its cell
        return x - max(0, min(margin, width - self.panel_width - margin))


def _lay_out(figure: AttentionFigure) -> _Layout:
    """Return a layout with room for all texts."""
    h, w = figure.photo.shape[:2]
    labels_h = 20 * (1 + max(row.label.count("\n") for row in figure.rows))
    cell_w = max(w, LEAST_PANEL) + MARGIN
    notes = [_break_note(panel, cell_w - MARGIN) for row in figure.rows for panel in row.panels]
    # There is room for the colour bar, its range and a note.
    cell_h = labels_h + h + 52 + max(_height_of_more_lines(note, SMALL) for note in notes)
    across = 1 + max(len(row.panels) for row in figure.rows)
    down = len(figure.rows)
    stacked = w > 2.5 * h
    if stacked:
        across, down = down, across
    width = max(across * cell_w + MARGIN, LEAST_WIDTH)
    title = ": ".join(figure.title)
    if text_width(title, TITLE) > width - 2 * MARGIN:
        title = "\n".join(fit(part, width - 2 * MARGIN, TITLE) for part in figure.title)
    top = 36 + _height_of_more_lines(title, TITLE)
    lines = wrap(figure.caption, width - 2 * MARGIN, CAPTION, width // CHARACTER)
    size = width, top + down * cell_h + 4 + CAPTION_LINE * len(lines)
    first = MARGIN + (cell_w - MARGIN - w) // 2, top + labels_h
    return _Layout(size, (cell_w, cell_h), first, w, stacked, title, lines)


def _height_of_more_lines(text: str, size: float) -> int:
    """Return by how much a text is higher than one line."""
    return text_height(text, size) - text_height("", size)


def _break_note(panel: Panel, width: int) -> str:
    """Return a panel's note in one line, or each of its parts in its own if it is too wide."""
    if text_width(panel.note, SMALL, bold=panel.warn) <= width:
        return panel.note
    return panel.note.replace(" · ", "\n")


def draw_attention(path: Path, figure: AttentionFigure) -> str:
    """Draw a figure of where a model looks, and return what Canvas.save returns."""
    return compose_attention(figure).save(path)


def compose_attention(figure: AttentionFigure) -> Canvas:
    """Return a canvas with a figure of where a model looks."""
    layout = _lay_out(figure)
    width, height = layout.size
    photo = figure.photo
    canvas = Canvas(width, height)
    canvas.write(width / 2, 8, layout.title, TITLE, align="center")
    for i, line in enumerate(reversed(layout.caption), start=1):
        canvas.write(MARGIN, height - CAPTION_LINE * i, line, CAPTION, colour=GREY)
    h, w = photo.shape[:2]
    for r, row in enumerate(figure.rows):
        x, y = layout.position(r, 0)
        _write_label(canvas, layout, x, y, row.label)
        if not row.signed:
            canvas.paste(photo, x, y)
            if figure.query_box:
                left, top, right, bottom = figure.query_box
                edges = x + left * w, y + top * h, x + right * w, y + bottom * h
                canvas.frame(edges, BLACK, 7)
                canvas.frame(edges, WHITE, 3)
        maps = [
            figure.preprocess.to_photo(panel.values, figure.photo_size, (h, w))
            for panel in row.panels
        ]
        row_limits = None
        if figure.shared_scale or row.signed:
            row_limits = value_range(maps, row.signed)
        colours = SIGNED if row.signed else HEAT
        for column, (panel, values) in enumerate(zip(row.panels, maps), start=1):
            limits = row_limits or value_range([values])
            x, y = layout.position(r, column)
            _write_label(canvas, layout, x, y, panel.title)
            canvas.paste(overlay(photo, values, *limits, colours), x, y)
            bar = colours[np.linspace(0, len(colours) - 1, w).round().astype(int)]
            canvas.paste(np.tile(bar, (9, 1, 1)), x, y + h + 5)
            _write_range(canvas, x, y + h + 14, w, limits, row.signed)
            note = _break_note(panel, layout.text_room)
            left = layout.text_left(x, text_width(note, SMALL, bold=panel.warn))
            colour = RED if panel.warn else GREY
            canvas.write(left, y + h + 28, note, SMALL, colour=colour, bold=panel.warn)
    return canvas


def _write_label(canvas: Canvas, layout: _Layout, x: int, y: int, label: str) -> None:
    """Write a label above the photo at x, y."""
    label = "\n".join(fit(line, layout.text_room, LABEL) for line in label.split("\n"))
    left = layout.text_left(x, text_width(label, LABEL))
    canvas.write(left, y - 4 - text_height(label, LABEL), label, LABEL)


def _write_range(
    canvas: Canvas, x: int, y: int, width: int, limits: tuple[float, float], signed: bool
) -> None:
    """Write the ends of a colour scale below its bar, or around a bar that is too narrow."""
    low, high = limits
    decimals = min(max(1 - math.floor(math.log10(high)), 0), 9) if high > 0 else 1
    number = f"+.{decimals}f" if signed else f".{decimals}f"
    unit = "points" if signed else "%"
    low_text = f"{low:{number}}"
    high_text = f"{high:{number}} {unit}"
    room = text_width(low_text, SMALL) + BETWEEN + text_width(high_text, SMALL)
    outside = max(0, room - width) / 2
    canvas.write(x - outside, y, low_text, SMALL)
    canvas.write(x + width + outside, y, high_text, SMALL, align="right")


def value_range(values: Sequence[np.ndarray], signed: bool = False) -> tuple[float, float]:
    """Return the lowest and highest value, without NaN; symmetric around 0 if signed."""
    seen = np.concatenate([array[~np.isnan(array)] for array in values])
    if not seen.size:  # The model sees none of the pixels drawn of a thin strip.
        return 0.0, 0.0
    low = float(seen.min())
    high = float(seen.max())
    if signed:
        high = max(-low, high) + 0.0  # This turns -0.0 into 0.0.
        low = 0.0 - high
    return low, high


def overlay(
    photo: np.ndarray, values: np.ndarray, low: float, high: float, colours: np.ndarray
) -> np.ndarray:
    """Colour a map (h, w) over the grey photo; parts that the model has not seen are pale."""
    red, green, blue = np.moveaxis(photo.astype(np.float32), 2, 0)
    grey = ((red + green + blue) / 3)[..., None]
    unseen = np.isnan(values)
    position = (np.nan_to_num(values) - low) * (len(colours) / max(high - low, 1e-12))
    index = position.clip(0, len(colours) - 1).astype(np.uint8)
    # take() needs two thirds of the time of (0.7 * colours)[index].
    coloured = (0.7 * colours).take(index, axis=0)
    coloured += 0.3 * grey
    if unseen.any():
        coloured[unseen] = 190 + 0.25 * grey[unseen]
    return coloured.astype(np.uint8)


def draw_predictions(
    path: Path, photos: Sequence[Path], captions: Sequence[tuple[str, str, float]], title: str
) -> str:
    """Draw photos in a grid, each with its (true class, predicted class, probability).

    Right predictions are framed in green, wrong ones in red. Returns what Canvas.save returns.
    """
    side = 240
    cell_h = side + 46
    columns = min(6, len(photos))
    rows = math.ceil(len(photos) / columns)
    width = max(columns * (side + 12) + 12, 780)
    canvas = Canvas(width, rows * cell_h + 46)
    canvas.write(width / 2, 10, fit(title, width - 24, TITLE), TITLE, align="center")
    for i, (photo_path, (true, predicted, probability)) in enumerate(zip(photos, captions)):
        photo = open_photo(photo_path)
        photo.thumbnail((side, side))
        row, column = divmod(i, columns)
        x = (column + 0.5) * (width / columns)
        left = round(x - photo.width / 2)
        bottom = 46 + (row + 1) * cell_h - 12
        top = bottom - photo.height
        canvas.paste(np.asarray(photo), left, top)
        is_right = true == predicted
        lines = [f"{'✓' if is_right else '✗'} {predicted} {probability:.2f}"]
        if not is_right:
            lines.append(f"true: {true}")
        caption = "\n".join(fit(line, side, CAPTION, bold=not is_right) for line in lines)
        colour = GREEN if is_right else RED
        canvas.frame((left, top, left + photo.width, bottom), colour, 2 if is_right else 5)
        y = top - 4 - text_height(caption, CAPTION)
        canvas.write(x, y, caption, CAPTION, align="center", colour=colour, bold=not is_right)
    return canvas.save(path)
