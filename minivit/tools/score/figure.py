"""The figure of `score`: how the attention of each head and each block compares to chance.

Shapes: L blocks, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...figures.drawing import new_figure, save
from ...figures.mpl_charts import Axes, Figure, GridSpec, Normalize, ScalarMappable
from ...figures.text import shorten
from .statistics import Score, ScoreKey

COLOURS = "inferno"  # as in maps over photos
GRID_COLUMNS = 6  # so that a row can be divided among one, two or three panels
# The marker, line and colour of each model, by its label.
STYLES = {"before": ("s--", "#5aae61"), "after": ("o-", "#40004b"), "model": ("o-", "#40004b")}


def draw_scores(
    path: Path, scores: Mapping[ScoreKey, Score], names: Mapping[str, str], title: str
) -> str:
    """Draw how much of the class token's attention falls on the pet, in times chance.

    The upper row has a heat map of heads by blocks for each model. The lower row has a plot for
    each method, of the mean over heads by block, with intervals. `names` has the name of the
    "model" and, if there is one, of its "base". Returns what save returns.
    """
    labels = {"model": "model"}
    if "base" in names:
        labels = {"base": "before", "model": "after"}
    blocks = sorted({key.block for key in scores})
    heads = sorted({key.head for key in scores} - {"mean"})
    methods = list(dict.fromkeys(key.method for key in scores))
    on_pet = {
        (key.model, key.method, key.block, key.head): score.times_chance
        for key, score in scores.items()
        if key.region == "pet" and key.group == "all"
    }

    panel_width = max(1.5 + 0.42 * len(blocks), 4)
    width = max(len(labels), len(methods)) * panel_width + 0.8
    upper_height = 0.3 * len(heads) + 0.7
    with new_figure((width, upper_height + 4.1), layout="constrained", dpi=110) as figure:
        grid = figure.add_gridspec(2, GRID_COLUMNS, height_ratios=[upper_height, 3.2])

        maps = {}
        for model, label in labels.items():
            rows = [[on_pet[model, "attention", b, head].mean for b in blocks] for head in heads]
            maps[f"{label}: {shorten(names[model], 30)}"] = np.array(rows)
        draw_heat_maps(add_panels(figure, grid, 0, len(maps)), maps, blocks, heads)
        for method, ax in zip(methods, add_panels(figure, grid, 1, len(methods))):
            lines = {
                label: np.array([on_pet[model, method, block, "mean"] for block in blocks])
                for model, label in labels.items()
            }
            draw_lines(ax, lines, blocks)
            ax.set_title(f"{method}, mean of heads")
        figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
        return save(figure, path)


def add_panels(figure: Figure, grid: GridSpec, row: int, count: int) -> list[Axes]:
    """Divide a row of the grid among `count` panels."""
    span = GRID_COLUMNS // count
    return [figure.add_subplot(grid[row, i * span : (i + 1) * span]) for i in range(count)]


def draw_heat_maps(
    panels: Sequence[Axes],
    maps: Mapping[str, np.ndarray],
    blocks: Sequence[int],
    heads: Sequence[int | str],
) -> None:
    """Draw maps (H, L), keyed by title, on one colour scale and with the value in each cell."""
    values = np.stack(list(maps.values()))
    scale = Normalize(values.min(), values.max())
    for ax, (title, times_chance) in zip(panels, maps.items()):
        ax.imshow(times_chance, cmap=COLOURS, norm=scale, aspect="auto")
        ax.set(xlabel="block", ylabel="head")
        ax.set_xticks(range(len(blocks)), map(str, blocks), fontsize=8)
        ax.set_yticks(range(len(heads)), map(str, heads), fontsize=8)
        ax.set_title(title, fontsize=10, parse_math=False)
        for (i, j), value in np.ndenumerate(times_chance):
            colour = "black" if scale(value) > 0.6 else "white"
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    colours = ScalarMappable(scale, COLOURS)
    label = "attention on the pet,\ntimes chance"
    panels[0].figure.colorbar(colours, ax=panels, label=label, fraction=0.05)


def draw_lines(ax: Axes, lines: Mapping[str, np.ndarray], blocks: Sequence[int]) -> None:
    """Draw the estimates (L, 3) of each model by block: the mean and the ends of its interval."""
    # The points of two models lie beside each other, so that no interval hides another.
    for offset, (label, estimates) in zip((-0.06, 0.06), lines.items()):
        style, colour = STYLES[label]
        mean, low, high = estimates.T
        x = np.arange(len(blocks)) + offset
        # These are lists because matplotlib 3.10 warns about arrays for a single block.
        errors = [(mean - low).tolist(), (high - mean).tolist()]
        ax.errorbar(
            x,
            mean,
            errors,
            fmt=style,
            color=colour,
            capsize=3,
            markersize=4,
            label=label,
        )
    ax.axhline(1, color="0.4", linestyle=":", label="chance")
    ax.set_xticks(range(len(blocks)), map(str, blocks), fontsize=8)
    ax.set(xlabel="block", ylabel="times chance, with 95% intervals")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
