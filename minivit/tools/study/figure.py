"""The figure of a study: test accuracy, and how far training accuracy exceeds validation."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ...figures.drawing import new_figure, save
from ...figures.mpl import colormaps
from ...figures.mpl_charts import Axes, NullLocator
from .summary import Spread, Table

# Lines differ in more than their colours, for greyscale printers.
MARKERS = "os^Dv*"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)))
SHIFT = 1.015  # from line to line, as a factor of the number of photos


def draw_study(path: Path, table: Table, title: str) -> str:
    """Draw two panels against photos per class, with a line for each choice of blocks.

    A line is the mean over the seeds, between their lowest and their highest value. Returns what
    save returns.
    """
    with new_figure((11, 5.4), layout="constrained", dpi=100) as figure:
        figure.suptitle(textwrap.fill(title, 120), fontsize=11)
        tests, gaps = figure.subplots(1, 2)
        for i, (name, summaries) in enumerate(table.items()):
            # Each line lies a little beside the one before it, so that no range hides another.
            shift = SHIFT ** (i - (len(table) - 1) / 2)
            photos = [shift * summary.photos for summary in summaries.values()]
            position = i / max(1, len(table) - 1)
            style = {
                "label": name,
                "color": colormaps["viridis"](0.9 * position),
                "marker": MARKERS[i % len(MARKERS)],
                "linestyle": DASHES[i % len(DASHES)],
            }
            _draw_line(tests, photos, [summary.test for summary in summaries.values()], style)
            _draw_line(gaps, photos, [summary.gap for summary in summaries.values()], style)
        ticks = {}
        num_seeds = 1
        for summaries in table.values():
            for shots, summary in summaries.items():
                ticks[f"{shots}\n({summary.photos:g})"] = summary.photos
                num_seeds = max(num_seeds, summary.seeds)
        for ax in (tests, gaps):
            ax.set_xscale("log")
            ax.set_xticks(list(ticks.values()), list(ticks))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("training photos per class (in all)")
            ax.grid(alpha=0.3)
        tests.set_ylabel("test accuracy, %")
        gaps.set_ylabel("training above validation, points")
        gaps.axhline(0, color="black", linewidth=0.8)
        seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
        figure.legend(
            *gaps.get_legend_handles_labels(),
            title=f"trained, mean and range of {seeds}",
            loc="outside lower center",
            ncols=6,
        )
        return save(figure, path)


def _draw_line(ax: Axes, photos: list[float], spreads: list[Spread], style: dict) -> None:
    means, lows, highs = ([100 * value for value in values] for values in zip(*spreads))
    ax.plot(photos, means, **style)
    ax.fill_between(photos, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    # With a single number of photos, these bars are all there is to see of the range.
    ax.vlines(photos, lows, highs, color=style["color"], linewidth=0.8)
