"""Draw every figure with matplotlib, without pyplot.

Class and file names are data, so none is read as mathematical markup. Colours run from dark to
light, and lines differ in more than their colour, so that figures survive a greyscale printer.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.photos import open_photo
from ..errors import printable
from .drawing import DPI, new_figure, save
from .mpl import Axes, Colormap, Figure, MaxNLocator, Rectangle, colormaps

HEAT = colormaps["inferno"]
SIGNED = colormaps["cividis"]  # from dark for less, over grey, to light for more
RIGHT = "#1b7837"
WRONG = "#b2182b"
GREY = "0.25"
# Measures of draw_attention, in pixels.
MARGIN = 14
CAPTION_LINE = 16
CHARACTER = 7  # the width of an average one


@dataclass(frozen=True)
class Panel:
    """A map over the photo, in per cent, with its title and a note, which `warn` makes red.

    `values` (h, w) are NaN where the model has not seen the photo.
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
class _Layout:
    """Where draw_attention puts things, in pixels from the figure's left and top.

    Each row starts with a cell for the photo, and a cell for each panel follows. The rows of a
    panorama run from top to bottom instead of from left to right.
    """

    size: tuple[int, int]  # of the figure, width and height
    cell: tuple[int, int]  # width and height
    first: tuple[int, int]  # the left and top of the photo in the first cell
    stacked: bool
    caption: list[str]

    def position(self, row: int, column: int) -> tuple[int, int]:
        """Return the left and top of the photo in a cell."""
        if self.stacked:
            row, column = column, row
        return self.first[0] + column * self.cell[0], self.first[1] + row * self.cell[1]


def _layout(photo: np.ndarray, rows: Sequence[Row], caption: str) -> _Layout:
    """Return a layout with room for all labels, and the caption in lines as wide as the figure."""
    h, w = photo.shape[:2]
    labels_h = 20 * (1 + max(row.label.count("\n") for row in rows))
    cell_w = max(w, 160) + MARGIN
    cell_h = labels_h + h + 52  # with room for the colour bar, its range and the note
    across = 1 + max(len(row.panels) for row in rows)
    down = len(rows)
    stacked = w > 2.5 * h
    if stacked:
        across, down = down, across
    width = max(across * cell_w + MARGIN, 560)
    lines = textwrap.wrap(caption, width // CHARACTER)
    size = width, down * cell_h + 40 + CAPTION_LINE * len(lines)
    first = MARGIN + (cell_w - MARGIN - w) // 2, 36 + labels_h
    return _Layout(size, (cell_w, cell_h), first, stacked, lines)


def panel_shape(photo_size: tuple[int, int], *, small: bool = False) -> tuple[int, int]:
    """Return the size (h, w) in pixels at which draw_attention shows a photo of (W, H).

    The aspect ratio is the photo's, up to 40:1.
    """
    W, H = photo_size
    ratio = min(max(W / H, 1 / 40), 40)
    area, longest = (1.8, 3.0) if small else (8.0, 6.0)  # in square inches, in inches
    width = math.sqrt(area * ratio)
    height = math.sqrt(area / ratio)
    scale = DPI * min(1, longest / max(width, height))
    return round(height * scale), round(width * scale)


def draw_attention(
    path: Path,
    photo: np.ndarray,
    rows: Sequence[Row],
    title: str,
    caption: str,
    *,
    shared_scale: bool = False,
    query_box: tuple[float, float, float, float] | None = None,
) -> str:
    """Draw rows of maps over a photo, uint8 (h, w, 3), beside the photo itself.

    Each map has a colour scale of its own or, with `shared_scale`, that of its row. Differences
    always share their row's. `query_box` is the patch to mark: left, top, right and bottom, as
    fractions of the photo. Returns what save returns.
    """
    layout = _layout(photo, rows, caption)
    width, height = layout.size
    with new_figure((width / DPI, height / DPI)) as figure:
        _text(figure, width / 2, 8, title, 11, ha="center")
        for i, line in enumerate(reversed(layout.caption), start=1):
            _text(figure, MARGIN, height - CAPTION_LINE * i, line, 8, color=GREY)
        characters = layout.cell[0] // CHARACTER
        h, w = photo.shape[:2]
        for r, row in enumerate(rows):
            x, y = layout.position(r, 0)
            label = "\n".join(shorten(line, characters) for line in row.label.split("\n"))
            _text(figure, x, y - 4, label, 9, va="bottom")
            if not row.signed:
                _image(figure, x, y, photo)
                if query_box:
                    left, top, right, bottom = query_box
                    edges = x + left * w, y + top * h, x + right * w, y + bottom * h
                    _frame(figure, edges, "black", 4)
                    _frame(figure, edges, "white", 2)
            row_limits = None
            if shared_scale or row.signed:
                row_limits = value_range([panel.values for panel in row.panels], row.signed)
            for column, panel in enumerate(row.panels, start=1):
                x, y = layout.position(r, column)
                _text(figure, x, y - 4, shorten(panel.title, characters), 9, va="bottom")
                limits = row_limits
                if limits is None:
                    limits = value_range([panel.values])
                _draw_panel(figure, x, y, photo, panel, limits, row.signed)
        return save(figure, path)


def _draw_panel(
    figure: Figure,
    x: int,
    y: int,
    photo: np.ndarray,
    panel: Panel,
    limits: tuple[float, float],
    signed: bool,
) -> None:
    """Draw a map over the photo and, below it, the colour bar, its range and the panel's note."""
    low, high = limits
    colours = SIGNED if signed else HEAT
    _image(figure, x, y, overlay(photo, panel.values, low, high, colours))
    h, w = photo.shape[:2]
    y += h
    bar = np.tile(np.linspace(0, 1, w), (9, 1))
    _image(figure, x, y + 5, colours(bar, bytes=True))
    decimals = min(max(1 - math.floor(math.log10(max(high, 1e-9))), 0), 9)
    number = f"+.{decimals}f" if signed else f".{decimals}f"
    unit = "points" if signed else "%"
    _text(figure, x, y + 15, f"{low:{number}}", 7.5)
    _text(figure, x + w, y + 15, f"{high:{number}} {unit}", 7.5, ha="right")
    colour, weight = (WRONG, "bold") if panel.warn else (GREY, "normal")
    _text(figure, x, y + 28, panel.note, 7.5, color=colour, weight=weight)


def _text(figure: Figure, x: float, y: float, text: str, size: float, **style: Any) -> None:
    """Write on a figure, x and y pixels from its left and top."""
    style = {"va": "top", "ha": "left", **style}
    y = figure.bbox.height - y  # Without a transform, matplotlib counts pixels from below.
    figure.text(x, y, text, fontsize=size, parse_math=False, transform=None, **style)


def _image(figure: Figure, left: int, top: int, image: np.ndarray) -> None:
    """Put an image on a figure, pixel by pixel."""
    bottom = round(figure.bbox.height) - top - len(image)
    figure.figimage(image, left, bottom, origin="upper")


def _frame(
    figure: Figure, edges: tuple[float, float, float, float], colour: str, line: float
) -> None:
    """Draw a rectangle; its edges are left, top, right and bottom, in pixels."""
    left, top, right, bottom = edges
    corner = left, round(figure.bbox.height) - bottom
    frame = Rectangle(
        corner, right - left, bottom - top, fill=False, lw=line, ec=colour, transform=None
    )
    figure.add_artist(frame)


def value_range(values: Sequence[np.ndarray], signed: bool = False) -> tuple[float, float]:
    """Return the lowest and highest value, without NaN; symmetric around 0 if signed."""
    seen = np.concatenate([array[~np.isnan(array)] for array in values])
    if not seen.size:  # The model sees none of the pixels drawn of a thin strip.
        return 0.0, 0.0
    low = float(seen.min())
    high = float(seen.max())
    if signed:
        high = max(-low, high)
        low = -high
    return low, high


def overlay(
    photo: np.ndarray, values: np.ndarray, low: float, high: float, colours: Colormap
) -> np.ndarray:
    """Colour a map over the grey photo; parts that the model has not seen are pale."""
    grey = photo.mean(2, keepdims=True)
    heat = 255 * colours((values - low) / max(high - low, 1e-12))[..., :3]
    unseen = np.isnan(values)[..., None]
    return np.where(unseen, 190 + 0.25 * grey, 0.3 * grey + 0.7 * heat).astype(np.uint8)


def draw_curves(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    best_epoch: int,
    overfits_from: int | None = None,
    verdict: str = "",
) -> str:
    """Draw loss and accuracy by epoch, for training (images without augmentation) and validation.

    The epochs from `overfits_from` on are shaded, and the verdict is written above. Returns what
    save returns.
    """
    epochs = [row["epoch"] for row in rows]
    with new_figure((9, 4.1), layout="constrained") as figure:
        for ax, metric in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            training = [row[f"train_{metric}"] for row in rows]
            validation = [row[f"val_{metric}"] for row in rows]
            ax.plot(epochs, training, "o--", color="#5aae61", label="training, not augmented")
            ax.plot(epochs, validation, "s-", color="#40004b", label="validation")
            ax.axvline(best_epoch, color="0.5", linestyle=":", label=f"best epoch ({best_epoch})")
            if overfits_from:
                ax.axvspan(
                    overfits_from - 0.5,
                    epochs[-1] + 0.5,
                    color="#fdb863",
                    alpha=0.3,
                    label="overfitting",
                    hatch="//",
                    lw=0,
                )
            ax.set(xlabel="epoch", ylabel=metric, title=metric)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            # Leave room for the markers at the top.
            if metric == "loss":
                highest = max(training + validation)
                ax.set(ylabel="cross-entropy loss", ylim=(0, 1.05 * highest))
            else:
                ax.set_ylim(None, 1.02)
            ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        figure.suptitle("\n".join(textwrap.wrap(verdict, 115)), fontsize=10, parse_math=False)
        return save(figure, path)


def draw_confusion(
    path: Path,
    counts: np.ndarray,
    classes: Sequence[str],
    title: str,
    pairs: Sequence[tuple[str, str, int]] = (),
) -> str:
    """Draw a confusion matrix (C, C), with a row for each true class.

    A cell is shaded by its share of the row. `pairs` (true class, predicted class, photos) are
    listed below. Returns what save returns.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    C = len(classes)
    readable = C <= 60  # Smaller numbers in the cells could not be read.
    names = [shorten(name, 28) for name in classes]
    lines = [
        f"{n} × {shorten(true, 28)} taken for {shorten(wrong, 28)}" for true, wrong, n in pairs
    ]
    if lines:
        lines.insert(0, "confused most:")

    # In inches: the matrix, and the room that names, lines and the colour bar take around it.
    side = min(max(0.26 * C, 1.9), 31)
    names_room = 0.075 * max(map(columns, names)) + 0.4
    rotation = 60 if C > 3 else 20
    names_below = names_room * math.sin(math.radians(rotation)) + 0.3
    lines_width = 0.09 * max(map(columns, lines), default=0)
    width = max(names_room + side + 1.1, lines_width + 0.3, 0.1 * len(title) + names_room)
    height = 0.4 + side + names_below + 0.17 * len(lines)
    with new_figure((width, height), layout="constrained", dpi=110 if readable else 75) as figure:
        ax = figure.subplots()
        shaded = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        style: dict[str, Any] = {"fontsize": 8, "parse_math": False}
        ax.set_xticks(
            range(C), names, rotation=rotation, ha="right", rotation_mode="anchor", **style
        )
        ax.set_yticks(range(C), names, **style)
        ax.set(xlabel="predicted", ylabel="true")
        ax.set_title(title, parse_math=False)
        if readable:
            for i, j in np.argwhere(counts > 0):
                colour = "white" if shares[i, j] > 0.55 else "black"
                ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color=colour)
        # The bar keeps its width and stays beside the matrix, however large that is.
        bar = ax.inset_axes((1 + 0.12 / side, 0, 0.15 / side, 1))
        figure.colorbar(shaded, cax=bar, label="share of the true class")
        if lines:
            text = "\n".join(lines)
            figure.supxlabel(text, x=0.02, ha="left", ma="left", fontsize=9, parse_math=False)
        return save(figure, path)


def draw_predictions(
    path: Path, photos: Sequence[Path], captions: Sequence[tuple[str, str, float]], title: str
) -> str:
    """Draw photos in a grid, each with its (true class, predicted class, probability).

    Right predictions are framed in green, wrong ones in red. Returns what save returns.
    """
    side = 240
    cell_h = side + 46
    columns = min(6, len(photos))
    rows = math.ceil(len(photos) / columns)
    width = max(columns * (side + 12) + 12, 780)
    with new_figure((width / DPI, (rows * cell_h + 46) / DPI)) as figure:
        _text(figure, width / 2, 10, title, 11, ha="center")
        for i, (photo_path, (true, predicted, probability)) in enumerate(zip(photos, captions)):
            photo = open_photo(photo_path)
            photo.thumbnail((side, side))
            row, column = divmod(i, columns)
            x = (column + 0.5) * (width / columns)
            left = round(x - photo.width / 2)
            bottom = 46 + (row + 1) * cell_h - 12
            top = bottom - photo.height
            _image(figure, left, top, np.asarray(photo))
            caption = f"✓ {shorten(predicted, 20)} {probability:.2f}"
            colour, weight, line = RIGHT, "normal", 1
            if true != predicted:
                caption = f"✗ {shorten(predicted, 20)} {probability:.2f}\ntrue: {shorten(true, 20)}"
                colour, weight, line = WRONG, "bold", 3
            _frame(figure, (left, top, left + photo.width, bottom), colour, line)
            _text(
                figure,
                x,
                top - 4,
                caption,
                8,
                va="bottom",
                ha="center",
                color=colour,
                weight=weight,
            )
        return save(figure, path)


def show(ax: Axes, image: np.ndarray, title: str, size: int = 10) -> None:
    """Show an image on axes, without ticks."""
    ax.axis("on")
    ax.set(xticks=[], yticks=[])
    ax.imshow(image, aspect="equal")
    ax.set_title(title, fontsize=size, parse_math=False)


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
