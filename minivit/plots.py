"""Every figure, drawn without pyplot. Class names are data: none is read as markup.

Colours go from dark to light, and lines differ in more than colour, so that all of it survives a greyscale printer.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from .errors import printable
from .files import whole_file
from .photos import Preprocess

HEAT = colormaps["inferno"]
RIGHT, WRONG = "#1b7837", "#b2182b"


def draw_attention(
    path: Path, photo: Image.Image, maps: Mapping[int, Tensor], preprocess: Preprocess, title: str, *, longest: int = 640
) -> None:
    """Draw a photo and, for each block, where the class token looks: its map (gh, gw) over the photo's own pixels."""
    scale = min(1, longest / max(photo.size))
    shown = np.asarray(photo.resize([max(1, round(side * scale)) for side in photo.size]))
    grey = shown.mean(2, keepdims=True) / 255
    columns = 1 + len(maps)
    panel_w, panel_h = _panel(photo.size, area=9, longest=6)
    figure = Figure((columns * panel_w + 0.3, panel_h + 1.2), layout="constrained", dpi=120)
    axes, bars = figure.subplots(2, columns, squeeze=False, height_ratios=[panel_h, 0.1])
    _show(axes[0], shown, "photo")
    bars[0].axis("off")
    for ax, bar_ax, (block, values) in zip(axes[1:], bars[1:], maps.items()):
        percent = 100 * preprocess.to_photo(values, photo.size, shown.shape[:2])
        low = np.nanmin(percent, initial=100 * values.max().item())  # of a thin strip, no drawn pixel may be seen
        high = np.nanmax(percent, initial=low)
        heat = HEAT((percent - low) / max(high - low, 1e-12))[..., :3]
        unseen = np.isnan(percent)[..., None]
        _show(ax, np.where(unseen, 0.75 + 0.25 * grey, 0.4 * grey + 0.6 * heat), f"block {block}")
        bar = figure.colorbar(ScalarMappable(Normalize(low, high), HEAT), cax=bar_ax, orientation="horizontal")
        bar.locator = MaxNLocator(3)
        bar_ax.tick_params(labelsize=8)
        bar.set_label("% of attention per patch (own scale)", fontsize=8)
    if preprocess.crop:
        bars[0].text(0.5, 0, "pale borders: cropped away, not seen", ha="center", va="top", fontsize=8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    _save(figure, path)


def draw_curves(
    path: Path, rows: Sequence[Mapping[str, float]], best_epoch: int, overfits_from: int | None = None, verdict: str = ""
) -> None:
    """Draw loss and accuracy by epoch, of the training photos without augmentation and of validation.

    The epochs from `overfits_from` on are shaded; `verdict` is said above.
    """
    figure = Figure((9, 4.1), layout="constrained", dpi=120)
    epochs = [row["epoch"] for row in rows]
    for ax, what in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        ax.plot(epochs, [row[f"train_{what}"] for row in rows], "o--", color="#5aae61", label="training, not augmented")
        ax.plot(epochs, [row[f"val_{what}"] for row in rows], "s-", color="#40004b", label="validation")
        ax.axvline(best_epoch, color="0.5", linestyle=":", label=f"best epoch ({best_epoch})")
        if overfits_from:
            ax.axvspan(overfits_from - 0.5, epochs[-1] + 0.5, color="#fdb863", alpha=0.3, label="overfitting", hatch="//", lw=0)
        ax.set(xlabel="epoch", ylabel="cross-entropy loss" if what == "loss" else "accuracy", title=what)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(bottom=0 if what == "loss" else None, top=None if what == "loss" else 1.005)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(verdict, 115)), fontsize=10, parse_math=False)
    _save(figure, path)


def draw_confusion(
    path: Path, confusion: Tensor, classes: Sequence[str], title: str, pairs: Sequence[tuple[str, str, int]] = ()
) -> None:
    """Draw a confusion matrix (C, C): true class by row, predicted by column, shaded by the share of its row.

    `pairs` are listed below it: (true class, predicted class, photos).
    """
    counts = confusion.numpy()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    C = len(classes)
    side = min(0.32 * C, 40) + 3.2
    figure = Figure((side + 0.6, side - 0.6), layout="constrained", dpi=110 if C <= 60 else 60)
    ax = figure.subplots()
    shaded = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [shorten(name, 28) for name in classes]
    ax.set_xticks(
        range(C), names, rotation=60 if C > 3 else 20, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False
    )
    ax.set_yticks(range(C), names, fontsize=8, parse_math=False)
    ax.set(xlabel="predicted", ylabel="true")
    ax.set_title(title, parse_math=False)
    if C <= 60:
        for i, j in np.argwhere(counts > 0):
            ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color="white" if share[i, j] > 0.55 else "black")
    figure.colorbar(shaded, ax=ax, fraction=0.04, label="share of the true class")
    if pairs:
        lines = [f"{n} × {shorten(true, 28)} taken for {shorten(predicted, 28)}" for true, predicted, n in pairs]
        figure.supxlabel("\n".join(["confused most:", *lines]), x=0.02, ha="left", ma="left", fontsize=9, parse_math=False)
    _save(figure, path)


def draw_predictions(path: Path, photos: Sequence[Image.Image], captions: Sequence[tuple[str, str, float]], title: str) -> None:
    """Draw photos in a grid, each with (true class, predicted class, probability): right and wrong ones marked."""
    columns = min(6, len(photos))
    rows = math.ceil(len(photos) / columns)
    figure = Figure((2.3 * columns, 2.6 * rows + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, photo, (true, predicted, probability) in zip(axes, photos, captions):
        photo = photo.copy()
        photo.thumbnail((300, 300))
        right = true == predicted
        caption = f"{'✓' if right else '✗'} {shorten(predicted, 20)} {probability:.2f}\n"
        _show(ax, np.asarray(photo), caption + ("" if right else f"true: {shorten(true, 20)}"), size=8)
        ax.title.set(color=RIGHT if right else WRONG, weight="normal" if right else "bold")
        for spine in ax.spines.values():
            spine.set(visible=True, color=RIGHT if right else WRONG, linewidth=1 if right else 3)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _show(ax: Axes, image: np.ndarray, title: str, size: int = 10) -> None:
    ax.axis("on")
    ax.set(xticks=[], yticks=[])
    ax.imshow(image, aspect="equal")
    ax.set_title(title, fontsize=size, parse_math=False)


def _panel(photo_size: tuple[int, int], *, area: float, longest: float) -> tuple[float, float]:
    """Return a panel's width and height in inches, of a photo's aspect ratio, neither too large nor too thin."""
    ratio = photo_size[0] / photo_size[1]
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    shrink = min(1, longest / max(width, height))
    return max(1.2, width * shrink), max(0.6, height * shrink)


def shorten(name: str, length: int) -> str:
    """Return a name as one line of at most so many characters."""
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support")  # drawn as boxes
        figure.savefig(partial, format="png")
