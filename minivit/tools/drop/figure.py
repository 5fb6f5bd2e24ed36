"""The figure of `drop`: accuracy under each condition, and the curves of the maps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...figures.drawing import new_figure, save
from ...figures.mpl_charts import Axes
from .conditions import CONDITIONS, EVERYTHING
from .measure import FRACTIONS, MASK, RANDOM, MapKey
from .report import map_name
from .statistics import Summary

COLOURS = {"before": "#a6dba0", "after": "#af8dc3", "model": "#af8dc3"}
# Each map's colour and marker in the curves, so that they can be told apart in grey, too.
STYLES = {
    "attention": ("#40004b", "o"),
    "rollout": ("#e08214", "s"),
    "relevance": ("#1b7837", "^"),
    MASK: ("#2166ac", "D"),
    RANDOM: ("0.5", "x"),
}


def draw_drop(path: Path, summaries: Mapping[str, Summary], title: str) -> None:
    """Draw a bar for each condition and model and, if maps were asked for, their curves."""
    labels = {"model": "model"}
    if "base" in summaries:
        labels = {"base": "before", "model": "after"}
    summary = summaries["model"]
    has_maps = bool(summary.faithfulness)
    height = 2 + 0.36 * len(CONDITIONS) * len(summaries) ** 0.5
    width = 14 if has_maps else 7.6
    characters = 130 if has_maps else 80  # of a line of the title
    with new_figure((width, height), layout="constrained", dpi=110) as figure:
        if has_maps:
            bars, curves = figure.subplots(1, 2, width_ratios=[1.2, 1])
            draw_curves(curves, summary)
        else:
            bars = figure.subplots()
        draw_bars(bars, {labels[name]: summaries[name] for name in labels})
        figure.suptitle("\n".join(textwrap.wrap(title, characters)), fontsize=11, parse_math=False)
        save(figure, path)


def draw_bars(ax: Axes, summaries: Mapping[str, Summary]) -> None:
    """Draw the accuracy under each condition, or the share of answers that stay."""
    last = list(summaries.values())[-1]
    chance = last.chance
    knows_classes = all(summary.chance is not None for summary in summaries.values())
    keys = [key for key in CONDITIONS if key in last.results]
    if not knows_classes:
        keys.remove(EVERYTHING)  # All answers stay.
    height = 0.8 / len(summaries)
    for i, (label, summary) in enumerate(summaries.items()):
        for row, key in enumerate(keys):
            result = summary.results[key]
            value = summary.accuracy(key) if knows_classes else result.agreement
            y = row + (i - (len(summaries) - 1) / 2) * height
            ax.barh(
                y,
                value.mean,
                height * 0.92,
                xerr=[[value.mean - value.low], [value.high - value.mean]],
                color=COLOURS[label],
                error_kw={"ecolor": "0.15", "capsize": 2, "elinewidth": 1},
                label=label if row == 0 and len(summaries) > 1 else None,
            )
            ax.text(
                value.high + 0.015,
                y,
                f"{value.mean:.0%}",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
    if chance is not None and knows_classes:
        ax.axvline(chance, color="0.4", linestyle=":", label="chance")
    ax.set_yticks(range(len(keys)), keys, fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1)
    ax.set_xticks(np.linspace(0, 1, 6))
    unit = "accuracy, mean of classes" if knows_classes else "answers as to the whole photo"
    ax.set_xlabel(unit)
    if len(summaries) > 1 or knows_classes:
        ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def draw_curves(ax: Axes, summary: Summary) -> None:
    """Draw how many answers stay while patches are left out in the order of each map."""
    percent = [0, *(100 * fraction for fraction in FRACTIONS)]
    blocks = [block for _, block in summary.faithfulness if block is not None]
    for method, block in summary.faithfulness:
        colour, marker = STYLES[method]
        alpha = 1.0
        if block is not None and len(set(blocks)) > 1:  # The earlier the block, the paler.
            alpha = 0.3 + 0.7 * (block - min(blocks)) / (max(blocks) - min(blocks))
        for most_first, line in ((True, "-"), (False, "--")):
            keys = [MapKey(method, block, most_first, fraction) for fraction in FRACTIONS]
            stays = [1.0, *(summary.results[key].agreement.mean for key in keys)]
            label = map_name(method, block) if most_first else None
            ax.plot(
                percent,
                stays,
                line,
                color=colour,
                marker=marker,
                markersize=4,
                alpha=alpha,
                label=label,
            )
    ax.plot([], [], "-", color="0.2", label="most important first\n(lower is better)")
    ax.plot([], [], "--", color="0.2", label="least important first\n(higher is better)")
    ax.set(xlabel="patches left out, %", ylabel="answers that stay the same", ylim=(0, 1.03))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
