"""Every figure, drawn without pyplot. Class names are data: none is read as markup.

Colours go from dark to light, and lines differ in more than colour, so that all of it survives a greyscale printer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageFilter
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


def draw_curves(path: Path, rows: Sequence[Mapping[str, float]], best_epoch: int) -> None:
    """Draw loss and accuracy by epoch, of the training photos without augmentation and of validation."""
    figure = Figure((9, 3.8), layout="constrained", dpi=120)
    epochs = [row["epoch"] for row in rows]
    for ax, what in zip(figure.subplots(1, 2), ("loss", "accuracy")):
        ax.plot(epochs, [row[f"train_{what}"] for row in rows], "o--", color="#5aae61", label="training, not augmented")
        ax.plot(epochs, [row[f"val_{what}"] for row in rows], "s-", color="#40004b", label="validation")
        ax.axvline(best_epoch, color="0.5", linestyle=":", label=f"best epoch ({best_epoch})")
        ax.set(xlabel="epoch", ylabel="cross-entropy loss" if what == "loss" else "accuracy", title=what)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylim(bottom=0 if what == "loss" else None, top=None if what == "loss" else 1.005)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix (C, C): true class by row, predicted by column, shaded by the share of its row."""
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


def draw_scores(path: Path, scores: Mapping[tuple, Mapping[str, float]], names: Mapping[str, str], title: str) -> None:
    """Draw how the class token's attention falls on the pet: heads by blocks, and blocks with intervals for each method.

    `scores` are score.summarize's; `names` are the model's and, if it is compared, the base's.
    """
    pet = {(of, *key): row for (of, region, group, *key), row in scores.items() if (region, group) == ("pet", "all")}
    blocks, heads = sorted({key[2] for key in pet}), sorted({key[3] for key in pet} - {"mean"})
    methods = list(dict.fromkeys(key[1] for key in pet))
    which = {"base": ("before", "s--", "#5aae61"), "model": ("after" if "base" in names else "model", "o-", "#40004b")}
    which = {of: style for of, style in which.items() if of in names}
    wide = max(1.5 + 0.42 * len(blocks), 4)
    columns = max(len(which), len(methods))
    figure = Figure((columns * wide + 0.8, 1.6 + 0.3 * len(heads) + 3.2), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 6, height_ratios=[0.3 * len(heads) + 0.7, 3.2])
    maps = {of: np.array([[pet[of, "attention", b, h]["times_chance"] for b in blocks] for h in heads]) for of in which}
    shades = Normalize(min(m.min() for m in maps.values()), max(m.max() for m in maps.values()))
    axes = []
    for k, of in enumerate(which):
        axes.append(ax := figure.add_subplot(_part(grid, 0, k, len(which))))
        ax.imshow(maps[of], cmap=HEAT, norm=shades, aspect="auto")
        ax.set(xlabel="block", ylabel="head")
        ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
        ax.set_yticks(range(len(heads)), heads, fontsize=8)
        ax.set_title(f"{which[of][0]}: {shorten(names[of], 30)}", fontsize=10, parse_math=False)
        for (i, j), value in np.ndenumerate(maps[of]):
            ax.text(
                j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color="black" if shades(value) > 0.6 else "white"
            )
    figure.colorbar(ScalarMappable(shades, HEAT), ax=axes, label="attention on the pet,\ntimes chance", fraction=0.05)
    for k, method in enumerate(methods):
        ax = figure.add_subplot(_part(grid, 1, k, len(methods)))
        for shift, (of, (label, line, colour)) in zip((-0.06, 0.06), which.items()):
            rows = [pet[of, method, block, "mean"] for block in blocks]
            mean, low, high = (np.array([row["times_chance" + end] for row in rows]) for end in ("", "_low", "_high"))
            at = np.arange(len(blocks)) + shift  # beside each other, so that intervals do not hide one another
            ax.errorbar(at, mean, [mean - low, high - mean], fmt=line, color=colour, capsize=3, markersize=4, label=label)
        ax.axhline(1, color="0.4", linestyle=":", label="chance")
        ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
        ax.set(xlabel="block", ylabel="times chance, with 95% intervals", title=f"{method}, mean of heads")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    _save(figure, path)


def _part(grid: GridSpec, row: int, k: int, count: int) -> SubplotSpec:
    """Return the k-th of `count` equal parts, 1 to 3, of a row of 6 columns."""
    return grid[row, 6 // count * k : 6 // count * (k + 1)]


def overlay(
    photo: Image.Image, values: Tensor | None, preprocess: Preprocess, pet: Image.Image, side: int = 240
) -> Image.Image:
    """Return a photo, its longer side `side` pixels, with the outline of a mask of it, and over it a map (gh, gw) if given."""
    size = [max(1, round(length * side / max(photo.size))) for length in photo.size]
    shown = np.asarray(photo.resize(size)) / 255
    if values is not None:
        heat = preprocess.to_photo(values, photo.size, size[::-1])
        low, high = np.nanmin(heat, initial=values.max().item()), np.nanmax(heat, initial=0)
        grey = shown.mean(2, keepdims=True)
        lit = 0.4 * grey + 0.6 * HEAT((heat - low) / max(high - low, 1e-12))[..., :3]
        shown = np.where(np.isnan(heat)[..., None], 0.75 + 0.25 * grey, lit)
    mask = pet.resize(size, Image.Resampling.NEAREST)
    edge = np.asarray(mask) != np.asarray(mask.filter(ImageFilter.MinFilter(3)))
    rim = np.asarray(mask.filter(ImageFilter.MaxFilter(3))) != np.asarray(mask)
    shown = np.where(edge[..., None], 1.0, np.where(rim[..., None], 0.0, shown))  # white in black, to be seen on anything
    return Image.fromarray((255 * shown).astype(np.uint8))


def draw_gallery(path: Path, sections: Mapping[str, Sequence[tuple[Image.Image, str]]], title: str, columns: int = 3) -> None:
    """Draw pictures with captions, section by section."""
    lines = [math.ceil(len(shown) / columns) for shown in sections.values()]
    heights = [2.3 * n + 0.5 for n in lines]
    figure = Figure((columns * 4.4, sum(heights) + 0.5), layout="constrained", dpi=100)
    parts = figure.subfigures(len(lines), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, count, (kind, shown) in zip(parts, lines, sections.items()):
        part.suptitle(kind + "\n" if shown else f"{kind}: none", x=0.01, ha="left", weight="bold", fontsize=11)
        axes = part.subplots(count, columns, squeeze=False).ravel() if shown else []
        for ax in axes:
            ax.axis("off")
        for ax, (picture, text) in zip(axes, shown):
            _show(ax, np.asarray(picture), text, size=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    _save(figure, path)
