"""The figure of study: accuracy, and how far training lies above validation, against photos a class."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ...figures.plots import save

MARKERS, DASHES = "os^Dv*", ("-", "--", "-.", ":", (0, (5, 1)))


def draw_study(
    path: Path, table: Mapping[str, Mapping[str, Mapping[str, float]]], title: str
) -> None:
    """Draw a line for each choice of blocks, the seeds' mean, between their lowest and highest."""
    figure = Figure((11, 5.4), layout="constrained")
    figure.suptitle(textwrap.fill(title[:1].upper() + title[1:], 130), fontsize=10)
    photos = {count: cell["photos"] for cells in table.values() for count, cell in cells.items()}
    seeds = max(cell["seeds"] for cells in table.values() for cell in cells.values())
    for ax, what in zip(figure.subplots(1, 2), ("test", "gap")):
        for i, (blocks, cells) in enumerate(table.items()):
            x, colour = (
                [cell["photos"] for cell in cells.values()],
                colormaps["viridis"](0.9 * i / max(1, len(table) - 1)),
            )
            mean, low, high = (
                [100 * cell[what + end] for cell in cells.values()] for end in ("", "_low", "_high")
            )
            style = {
                "color": colour,
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": DASHES[i % len(DASHES)],
            }
            ax.plot(x, mean, **style, label=blocks)
            ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.vlines(
                x, low, high, color=colour, linewidth=0.8
            )  # all there is to see of one count of photos
        ax.set_xscale("log")
        ax.set_xticks(list(photos.values()), [f"{count}\n({n:g})" for count, n in photos.items()])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("training photos a class (in all)")
        ax.set_ylabel("test accuracy, %" if what == "test" else "training above validation, points")
        ax.grid(alpha=0.3)
    ax.axhline(0, color="black", linewidth=0.8)
    said = f"trained, mean and range of {seeds} seed{'s' * (seeds > 1)}"
    figure.legend(*ax.get_legend_handles_labels(), title=said, loc="outside lower center", ncols=6)
    save(figure, path)
