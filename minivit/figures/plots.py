"""Every figure, drawn without pyplot. Class names are data: none is read as markup.

Colours go from dark to light, and lines differ in more than colour, so that all of it survives a greyscale printer.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..data.photos import open_photo
from ..errors import printable
from ..system.files import whole_file

HEAT = colormaps["inferno"]
SIGNED = colormaps["cividis"]  # from dark for less, over grey, to light for more
RIGHT, WRONG = "#1b7837", "#b2182b"
DPI = 120


@dataclass(frozen=True)
class Panel:
    """A map over the photo, in per cent: values (h, w), NaN where the model has not seen; in bold if `warn`."""

    title: str
    values: np.ndarray
    note: str = ""
    warn: bool = False


@dataclass(frozen=True)
class Row:
    """Panels that belong together, with what to say of them beside the photo; `signed` ones are differences."""

    label: str
    panels: Sequence[Panel]
    signed: bool = False


def panel_shape(photo_size: tuple[int, int], *, small: bool = False) -> tuple[int, int]:
    """Return the pixels (h, w) in which draw_attention shows a photo of (W, H): of its aspect ratio, up to 40:1."""
    ratio = min(max(photo_size[0] / photo_size[1], 1 / 40), 40)
    area, longest = (1.8, 3.0) if small else (8.0, 6.0)  # in square inches, inches
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    scale = DPI * min(1, longest / max(width, height))
    return round(height * scale), round(width * scale)


def draw_attention(
    path: Path,
    photo: np.ndarray,
    rows: Sequence[Row],
    title: str,
    caption: str,
    *,
    common: bool = False,
    mark: tuple[float, float, float, float] | None = None,
) -> None:
    """Draw rows of maps over a photo, uint8 (h, w, 3), beside the photo itself, each with its colours' range in per cent.

    Each map has a scale of its own or, if `common`, that of its row; differences always their row's. `mark` (left, top,
    right, bottom, in shares of the photo) is the patch that asks.
    """
    h, w = photo.shape[:2]
    lines = 1 + max(row.label.count("\n") for row in rows)
    cell_w, cell_h = max(w, 160) + 14, h + 20 * lines + 52
    stacked = w > 2.5 * h  # panoramas go below each other
    shape = (
        (1 + max(len(row.panels) for row in rows), len(rows))
        if stacked
        else (len(rows), 1 + len(rows[0].panels))
    )
    width = max(shape[1] * cell_w + 14, 560)
    said = textwrap.wrap(caption, width // 7)
    height = shape[0] * cell_h + 40 + 16 * len(said)
    figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white")

    text(figure, width / 2, 8, title, 11, ha="center")
    for i, line in enumerate(said):
        text(figure, 14, height - 16 * (len(said) - i), line, 8, color="0.25")
    for r, row in enumerate(rows):
        shared = (
            value_range([panel.values for panel in row.panels], row.signed)
            if common or row.signed
            else None
        )
        for c, panel in enumerate([None, *row.panels]):
            down, across = (c, r) if stacked else (r, c)
            x, y = 14 + across * cell_w + (cell_w - 14 - w) // 2, 36 + down * cell_h
            top = y + 20 * lines
            if panel is None:
                text(
                    figure,
                    x,
                    top - 4,
                    "\n".join(shorten(line, cell_w // 7) for line in row.label.split("\n")),
                    9,
                    va="bottom",
                )
                if not row.signed:
                    figure.figimage(photo, x, height - top - h, origin="upper")
                    if mark:
                        _mark(figure, x, height - top, (w, h), mark)
                continue
            text(figure, x, top - 4, shorten(panel.title, cell_w // 7), 9, va="bottom")
            low, high = shared or value_range([panel.values], row.signed)
            colours = SIGNED if row.signed else HEAT
            figure.figimage(
                overlay(photo, panel.values, low, high, colours),
                x,
                height - top - h,
                origin="upper",
            )
            ramp = (255 * colours(np.linspace(0, 1, w))[None, :, :3].repeat(9, 0)).astype(np.uint8)
            figure.figimage(ramp, x, height - top - h - 14, origin="upper")
            digits = min(max(1 - math.floor(math.log10(max(high, 1e-9))), 0), 9)
            left, right = (
                f"{value:{'+' if row.signed else ''}.{digits}f}" for value in (low, high)
            )
            text(figure, x, top + h + 15, left, 7.5)
            text(
                figure,
                x + w,
                top + h + 15,
                f"{right} {'points' if row.signed else '%'}",
                7.5,
                ha="right",
            )
            style = {"weight": "bold", "color": WRONG} if panel.warn else {"color": "0.25"}
            text(figure, x, top + h + 28, panel.note, 7.5, **style)
    save(figure, path)


def text(figure: Figure, x: float, y: float, words: str, size: float, **how) -> None:
    """Write on a figure, in pixels from its left and its top; names are no markup."""
    width, height = figure.bbox.size
    figure.text(
        x / width,
        1 - y / height,
        words,
        fontsize=size,
        parse_math=False,
        **{"va": "top", "ha": "left", **how},
    )


def value_range(values: Sequence[np.ndarray], signed: bool = False) -> tuple[float, float]:
    """Return the lowest and the highest value to colour: symmetric around 0 if signed."""
    seen = np.concatenate([v[~np.isnan(v)] for v in values])
    low, high = (
        (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
    )  # of a thin strip, no pixel may be seen
    return (-max(-low, high), max(-low, high)) if signed else (low, high)


def overlay(photo: np.ndarray, values: np.ndarray, low: float, high: float, colours) -> np.ndarray:
    """Colour a map over a grey photo; what the model has not seen is pale."""
    grey = photo.mean(2, keepdims=True)
    heat = 255 * colours((values - low) / max(high - low, 1e-12))[..., :3]
    return np.where(np.isnan(values)[..., None], 190 + 0.25 * grey, 0.3 * grey + 0.7 * heat).astype(
        np.uint8
    )


def _mark(
    figure: Figure,
    x: float,
    y: float,
    size: tuple[int, int],
    mark: tuple[float, float, float, float],
) -> None:
    left, top, right, bottom = (edge * side for edge, side in zip(mark, size * 2))
    corner, width, height = (x + left, y - bottom), right - left, bottom - top
    for line, colour in ((4, "black"), (2, "white")):
        figure.add_artist(
            Rectangle(corner, width, height, fill=False, lw=line, ec=colour, transform=None)
        )


def draw_curves(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    best_epoch: int,
    overfits_from: int | None = None,
    verdict: str = "",
) -> None:
    """Draw loss and accuracy by epoch, of the training photos without augmentation and of validation.

    The epochs from `overfits_from` on are shaded; `verdict` is said above.
    """
    figure = Figure((9, 4.1), layout="constrained", dpi=120)
    epochs = [row["epoch"] for row in rows]
    for ax, what in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        ax.plot(
            epochs,
            [row[f"train_{what}"] for row in rows],
            "o--",
            color="#5aae61",
            label="training, not augmented",
        )
        ax.plot(
            epochs, [row[f"val_{what}"] for row in rows], "s-", color="#40004b", label="validation"
        )
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
        ax.set(
            xlabel="epoch",
            ylabel="cross-entropy loss" if what == "loss" else "accuracy",
            title=what,
        )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        highest = max(row[f"{split}_loss"] for row in rows for split in ("train", "val"))
        ax.set_ylim(
            (0, 1.05 * highest) if what == "loss" else (None, 1.02)
        )  # with room for markers
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(verdict, 115)), fontsize=10, parse_math=False)
    save(figure, path)


def draw_confusion(
    path: Path,
    counts: np.ndarray,
    classes: Sequence[str],
    title: str,
    pairs: Sequence[tuple[str, str, int]] = (),
) -> None:
    """Draw a confusion matrix (C, C): true class by row, predicted by column, shaded by the share of its row.

    `pairs` are listed below it: (true class, predicted class, photos).
    """
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    C = len(classes)
    side = min(0.32 * C, 40) + 3.2
    figure = Figure((side + 0.6, side - 0.6), layout="constrained", dpi=110 if C <= 60 else 60)
    ax = figure.subplots()
    shaded = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [shorten(name, 28) for name in classes]
    turned: dict[str, Any] = {
        "rotation": 60 if C > 3 else 20,
        "ha": "right",
        "rotation_mode": "anchor",
    }
    ax.set_xticks(range(C), names, fontsize=8, parse_math=False, **turned)
    ax.set_yticks(range(C), names, fontsize=8, parse_math=False)
    ax.set(xlabel="predicted", ylabel="true")
    ax.set_title(title, parse_math=False)
    if C <= 60:
        for i, j in np.argwhere(counts > 0):
            ax.text(
                j,
                i,
                counts[i, j],
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share[i, j] > 0.55 else "black",
            )
    figure.colorbar(shaded, ax=ax, fraction=0.04, label="share of the true class")
    if pairs:
        lines = [
            f"{n} × {shorten(true, 28)} taken for {shorten(predicted, 28)}"
            for true, predicted, n in pairs
        ]
        figure.supxlabel(
            "\n".join(["confused most:", *lines]),
            x=0.02,
            ha="left",
            ma="left",
            fontsize=9,
            parse_math=False,
        )
    save(figure, path)


def draw_predictions(
    out: Path, photos: Sequence[Path], captions: Sequence[tuple[str, str, float]], title: str
) -> None:
    """Draw photos in a grid, each with (true class, predicted class, probability): right and wrong ones marked."""
    side, columns = 240, min(6, len(photos))
    rows, width = math.ceil(len(photos) / columns), max(columns * (side + 12) + 12, 780)
    figure = Figure((width / DPI, (rows * (side + 46) + 46) / DPI), dpi=DPI)
    text(figure, width / 2, 10, title, 11, ha="center")
    for i, (path, (true, predicted, probability)) in enumerate(zip(photos, captions)):
        photo = open_photo(path)
        photo.thumbnail((side, side))
        x, bottom = (
            (i % columns + 0.5) * (width / columns),
            46 + (i // columns + 1) * (side + 46) - 12,
        )
        left, low = round(x - photo.width / 2), round(figure.bbox.height - bottom)
        figure.figimage(np.asarray(photo), left, low, origin="upper")
        right = true == predicted
        style = {"color": RIGHT} if right else {"color": WRONG, "weight": "bold"}
        frame = Rectangle(
            (left, low),
            *photo.size,
            fill=False,
            lw=1 if right else 3,
            ec=style["color"],
            transform=None,
        )
        figure.add_artist(frame)
        caption = f"{'✓' if right else '✗'} {shorten(predicted, 20)} {probability:.2f}"
        caption += "" if right else f"\ntrue: {shorten(true, 20)}"
        text(figure, x, bottom - photo.height - 4, caption, 8, va="bottom", ha="center", **style)
    save(figure, out)


def show(ax: Axes, image: np.ndarray, title: str, size: int = 10) -> None:
    ax.axis("on")
    ax.set(xticks=[], yticks=[])
    ax.imshow(image, aspect="equal")
    ax.set_title(title, fontsize=size, parse_math=False)


def shorten(name: str, length: int) -> str:
    """Return a name as one line of at most so many characters."""
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def save(figure: Figure, path: Path) -> None:
    with whole_file(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph|Matplotlib currently does not support"
        )  # drawn as boxes
        figure.savefig(
            partial, format="png", pil_kwargs={"compress_level": 3}
        )  # half the time, a tenth more bytes
