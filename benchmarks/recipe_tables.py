"""The tables of what recipe.py found, from the rows in recipe.jsonl.

Each row of the file is a run: its stage, recipe, data set, repeat and fold, and under `kept` the
accuracy on the fold left out, by the rule for the weights that are kept.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

ROWS = Path(__file__).parent / "recipe.jsonl"
DATA = {"pets3": "3 breeds", "pets37": "37 breeds", "drawings": "drawings"}
LAST = "last epoch"
RULES = {
    "highest accuracy": "highest validation accuracy (the rule before)",
    "lowest loss": "lowest validation loss",
    "average of the last half": "mean weights of the last half of the epochs",
    "average of the last fifth": "mean weights of the last fifth",
    "exponential average": "exponential average of the weights",
    "last, unless 1 errors worse": "last, unless an earlier one is better by 1 standard error",
    "last, unless 2 errors worse": "the same with 2 standard errors (**the rule now**)",
}
STAGES = {
    "rates": "start and learning rates, 120 steps of 32",
    "steps": "steps and batch",
    "regularisation": "regularisation, 120 steps of 16",
    "views": "kept views, 120 steps of 16",
    "blocks": "blocks, 120 steps of 16",
}
HEAD = "the head alone"
SOURCE = (
    "<sub>Measured on NVIDIA H100 80GB HBM3, 16 cores, torch 2.11, 2026-11-28, the first two "
    "parts just before commit 223556b and the others at it, "
    "`python benchmarks/recipe.py --repeats 1 --data pets3=DIR pets37=DIR drawings=DIR,demo`, with "
    "DINOv2 ViT-S/14 but for the drawings.</sub>"
)


def read_runs() -> list[dict]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def mean_and_error(values: Sequence[float], style: str) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{format(100 * statistics.mean(values), style)} ± {100 * error:.1f}"


def rules() -> str:
    """Return the table of rules: the mean difference to the last epoch, in points, by data set.

    A fold's difference is the mean over all recipes; the error is that of the mean over folds.
    """
    differences: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    num_runs = 0
    for run in read_runs():
        if LAST not in run["kept"] or run["recipe"].startswith("fitted"):
            continue
        num_runs += 1
        for rule in RULES:
            difference = run["kept"][rule] - run["kept"][LAST]
            differences[rule, run["data"]][run["fold"]].append(difference)
    lines = [f"| kept weights, against the last epoch's | {' | '.join(DATA.values())} |"]
    lines.append("|---|" + "---|" * len(DATA))
    for rule, name in RULES.items():
        cells = []
        for data in DATA:
            by_fold = [statistics.mean(values) for values in differences[rule, data].values()]
            cells.append(mean_and_error(by_fold, "+.1f"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = f"Points of accuracy, from {num_runs} runs; five folds, means and standard errors."
    return "\n".join([*lines, "", note, "", SOURCE])


def settings() -> str:
    """Return the table of settings: the accuracy of the last epoch by data set."""
    accuracies: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run in read_runs():
        rule = LAST if LAST in run["kept"] else HEAD
        accuracies[run["stage"], run["recipe"], run["data"]].append(run["kept"][rule])
    lines = [f"| | setting | {' | '.join(DATA.values())} |", "|---|---|" + "---|" * len(DATA)]
    for stage, title in STAGES.items():
        for recipe in dict.fromkeys(key[1] for key in accuracies if key[0] == stage):
            cells = []
            for data in DATA:
                values = accuracies[stage, recipe, data]
                cells.append(mean_and_error(values, ".1f") if len(values) > 1 else "")
            lines.append(f"| {title} | {recipe} | {' | '.join(cells)} |")
            title = ""
    note = "Accuracy in per cent on the fold left out; five folds, means and standard errors."
    return "\n".join([*lines, "", note, "", SOURCE])
