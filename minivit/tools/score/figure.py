"""The figure of score: heads and blocks against chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ...figures.plots import HEAT, save, shorten


def draw_scores(
    path: Path, scores: Mapping[tuple, Mapping[str, float]], names: Mapping[str, str], title: str
) -> None:
    """Draw how the class token's attention falls on the pet: heads by blocks, and blocks with intervals for each method.

    `scores` are score.summarize's; `names` are the model's and, if it is compared, the base's.
    """
    pet = {
        (of, *key): row
        for (of, region, group, *key), row in scores.items()
        if (region, group) == ("pet", "all")
    }
    blocks, heads = sorted({key[2] for key in pet}), sorted({key[3] for key in pet} - {"mean"})
    methods = list(dict.fromkeys(key[1] for key in pet))
    which = {
        "base": ("before", "s--", "#5aae61"),
        "model": ("after" if "base" in names else "model", "o-", "#40004b"),
    }
    which = {of: style for of, style in which.items() if of in names}
    wide = max(1.5 + 0.42 * len(blocks), 4)
    columns = max(len(which), len(methods))
    figure = Figure(
        (columns * wide + 0.8, 1.6 + 0.3 * len(heads) + 3.2), layout="constrained", dpi=110
    )
    grid = figure.add_gridspec(2, 6, height_ratios=[0.3 * len(heads) + 0.7, 3.2])
    maps = {
        of: np.array([[pet[of, "attention", b, h]["times_chance"] for b in blocks] for h in heads])
        for of in which
    }
    shades = Normalize(min(m.min() for m in maps.values()), max(m.max() for m in maps.values()))
    axes = []
    for k, of in enumerate(which):
        axes.append(
            ax := figure.add_subplot(grid[0, 6 // len(which) * k : 6 // len(which) * (k + 1)])
        )
        ax.imshow(maps[of], cmap=HEAT, norm=shades, aspect="auto")
        ax.set(xlabel="block", ylabel="head")
        ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
        ax.set_yticks(range(len(heads)), heads, fontsize=8)
        ax.set_title(f"{which[of][0]}: {shorten(names[of], 30)}", fontsize=10, parse_math=False)
        for (i, j), value in np.ndenumerate(maps[of]):
            colour = "black" if shades(value) > 0.6 else "white"
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(
        ScalarMappable(shades, HEAT),
        ax=axes,
        label="attention on the pet,\ntimes chance",
        fraction=0.05,
    )
    for k, method in enumerate(methods):
        ax = figure.add_subplot(grid[1, 6 // len(methods) * k : 6 // len(methods) * (k + 1)])
        for shift, (of, (label, line, colour)) in zip((-0.06, 0.06), which.items()):
            rows = [pet[of, method, block, "mean"] for block in blocks]
            mean, low, high = (
                np.array([row["times_chance" + end] for row in rows])
                for end in ("", "_low", "_high")
            )
            at = (
                np.arange(len(blocks)) + shift
            )  # beside each other, so that intervals do not hide one another
            ends = [
                (mean - low).tolist(),
                (high - mean).tolist(),
            ]  # lists: of arrays of one block, matplotlib 3.10 warns
            ax.errorbar(
                at, mean, ends, fmt=line, color=colour, capsize=3, markersize=4, label=label
            )
        ax.axhline(1, color="0.4", linestyle=":", label="chance")
        ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
        ax.set(
            xlabel="block",
            ylabel="times chance, with 95% intervals",
            title=f"{method}, mean of heads",
        )
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    save(figure, path)
