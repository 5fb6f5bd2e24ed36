"""Draw charts of runs with matplotlib, without pyplot.

Class and file names are data, so none is read as mathematical markup. Colours run from dark to
light, and lines differ in more than their colour, so that figures survive a greyscale printer.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .drawing import new_figure, save
from .mpl_charts import MaxNLocator
from .text import columns, shorten


def draw_curves(
    path: Path,
    rows: Sequence[Mapping[str, float]],
    kept_epoch: int,
    overfits_from: int | None = None,
    verdict: str = "",
) -> str:
    """Draw loss and accuracy by epoch, for training (images without augmentation) and validation.

    The row of epoch 0, the head alone, is a line across: what fine-tuning has to beat. The epochs
    from `overfits_from` on are shaded, and the verdict is written above. Returns what save returns.
    """
    head_rows = [row for row in rows if row["epoch"] == 0]
    if len(rows) > len(head_rows):  # A run that trains no block has no other row.
        rows = [row for row in rows if row["epoch"] > 0]
    epochs = [row["epoch"] for row in rows]
    with new_figure((9, 4.1), layout="constrained") as figure:
        for ax, metric in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            training = [row[f"train_{metric}"] for row in rows]
            validation = [row[f"val_{metric}"] for row in rows]
            ax.plot(epochs, training, "o--", color="#5aae61", label="training, not augmented")
            ax.plot(epochs, validation, "s-", color="#40004b", label="validation")
            for row in head_rows:
                level = row[f"val_{metric}"]
                ax.axhline(level, color="#9970ab", ls="-.", label="validation, the head alone")
            if kept_epoch > 0:
                ax.axvline(kept_epoch, color="0.5", ls=":", label=f"epoch kept ({kept_epoch})")
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
            if len(epochs) == 1:
                ax.set_xlim(epochs[0] - 1, epochs[0] + 1)  # or the ticks would be fractions
            # Leave room for the markers at the top.
            if metric == "loss":
                highest = max(training + validation + [row["val_loss"] for row in head_rows])
                ax.set(ylabel="cross-entropy loss", ylim=(0, 1.05 * highest))
            else:
                ax.set_ylim(None, 1.02)
            ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
        figure.suptitle("\n".join(textwrap.wrap(verdict, 115)), fontsize=10, parse_math=False)
        return save(figure, path)


def draw_calibration(
    path: Path, lines: Sequence[tuple[str, Sequence[tuple[int, float, float]]]]
) -> str:
    """Draw how often test predictions are right by how confident they are, a line for each label.

    A line's points are (number of photos, confidence, accuracy); larger points stand for more
    photos. Returns what save returns.
    """
    with new_figure((5, 5), layout="constrained") as figure:
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], ":", color="0.5", label="as often right as it says")
        styles = (("o--", "#5aae61"), ("s-", "#40004b"))
        for (label, points), (style, colour) in zip(lines, styles[-len(lines) :]):
            counts, confidence, accuracy = (np.array(values) for values in zip(*points))
            ax.plot(confidence, accuracy, style, color=colour, lw=1, ms=3, label=label)
            sizes = 10 + 250 * counts / counts.sum()
            ax.scatter(confidence, accuracy, sizes, color=colour, marker=style[0], alpha=0.7)
        ax.set(xlabel="confidence of the prediction", ylabel="share of test photos right")
        ax.set(xlim=(0, 1.03), ylim=(-0.03, 1.03))
        ax.grid(alpha=0.3)
        figure.legend(fontsize=8, loc="outside upper center")
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
