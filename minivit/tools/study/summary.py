"""What a study found: study.csv, the table of accuracies over all seeds, and the advice."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...system.files import whole_file


class Spread(NamedTuple):
    """A value over all seeds."""

    mean: float
    low: float
    high: float


class Summary(NamedTuple):
    """What the runs of all seeds came to, for one number of shots and one choice of blocks."""

    photos: float  # training photos in all
    seeds: int
    test: Spread  # test accuracy
    gap: Spread  # training accuracy minus validation accuracy


# The summaries by the name of the blocks, then by shots in increasing order.
Table = Mapping[str, Mapping[str, Summary]]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of study.csv; there are none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write study.csv, whose columns are the keys of each row."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summarize(rows: Sequence[Mapping[str, str]]) -> Table:
    """Summarize the rows of study.csv over the seeds."""
    groups: dict[str, dict[str, list[Mapping[str, str]]]] = {}
    for row in rows:
        rows_of_blocks = groups.setdefault(_name_blocks(row["blocks"]), {})
        rows_of_blocks.setdefault(row["shots"], []).append(row)
    table = {}
    for name, rows_of_blocks in groups.items():
        shots_in_order = sorted(rows_of_blocks, key=_shots_as_number)
        table[name] = {shots: _summarize_seeds(rows_of_blocks[shots]) for shots in shots_in_order}
    return table


def _shots_as_number(shots: str) -> float:
    return math.inf if shots == "all" else int(shots)


def _name_blocks(blocks: str) -> str:
    if blocks == "none":
        return "the head alone"
    if blocks == "all":
        return "all blocks"
    return f"block {blocks}" if blocks.isdecimal() else f"blocks {blocks}"


def _summarize_seeds(rows: Sequence[Mapping[str, str]]) -> Summary:
    return Summary(
        photos=statistics.mean(int(row["photos"]) for row in rows),
        seeds=len(rows),
        test=_spread([float(row["test_accuracy"]) for row in rows]),
        gap=_spread([float(row["train_accuracy"]) - float(row["val_accuracy"]) for row in rows]),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.mean(values), min(values), max(values))


def format_table(table: Table) -> Iterator[str]:
    """Yield lines of text with the test accuracies, one line for each choice of blocks."""
    columns = {shots for summaries in table.values() for shots in summaries}
    columns_in_order = sorted(columns, key=_shots_as_number)
    yield "test accuracy (lowest to highest seed) by photos per class"
    yield f"{'trained':14}" + "".join(f"{shots:>22}" for shots in columns_in_order)
    for name, summaries in table.items():
        line = f"{name:14}"
        for shots in columns_in_order:
            text = ""
            if shots in summaries:
                test = summaries[shots].test
                text = f"{test.mean:.3f} ({test.low:.3f}-{test.high:.3f})"
            line += f"{text:>22}"
        yield line


def advice(table: Table) -> str:
    """Say in a sentence which blocks to train, and whether more photos would help.

    The blocks are those that are best with the most photos. Others are as good if they lie within
    half the range of the seeds.
    """
    most = max((shots for row in table.values() for shots in row), key=_shots_as_number)
    with_most = {name: row[most] for name, row in table.items() if most in row}
    best = max(with_most, key=lambda name: with_most[name].test.mean)
    test = with_most[best].test
    half_range = (test.high - test.low) / 2
    sentence = f"with {most} photos per class train {best}: test accuracy {test.mean:.3f}"
    as_good = []
    for name, summary in with_most.items():
        if name != best and summary.test.mean >= test.mean - half_range:
            as_good.append(name)
    if as_good:
        sentence += f" ({' and '.join(as_good)} as good within the seeds' spread)"
    fewer = list(table[best])[:-1]
    if fewer:
        gain = test.mean - table[best][fewer[-1]].test.mean
        helps = "would help little"
        if gain > max(half_range, 0.01):
            helps = "would still help"
        sentence += f"; {100 * gain:+.1f} points since {fewer[-1]} photos, so more photos {helps}"
    gap = 100 * with_most[best].gap.mean
    return f"{sentence}; training is {gap:.1f} points above validation there"
