"""What a study found: study.csv, the tables of accuracies over all seeds, and the advice."""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...cli import parse_blocks
from ...errors import UserError, printable
from ...system.files import whole_file
from ...training import metrics


class Spread(NamedTuple):
    """A value over all seeds."""

    mean: float
    low: float
    high: float


class Summary(NamedTuple):
    """What the runs of all seeds came to, for one number of shots and one choice of blocks."""

    num_blocks: float  # trained blocks; infinity for all of them
    photos: float  # training photos in all
    seeds: int
    val: Spread  # validation accuracy
    val_error: float  # the standard error of its mean
    val_photos: int  # photos that validate one run: all that are new to it, besides the test
    test: Spread  # test accuracy
    test_error: float
    test_photos: int
    gap: Spread  # training accuracy minus validation accuracy


# Choices of blocks are compared where at least so many photos validate each run: with 100, one
# standard error of an accuracy of 0.9 is 0.03 for one seed, and less for several.
ENOUGH_PHOTOS = 100

# The summaries by the name of the blocks, then by shots in increasing order.
Table = Mapping[str, Mapping[str, Summary]]

COLUMNS = (
    "shots",
    "blocks",
    "seed",
    "photos",
    "val_photos",
    "test_photos",
    "epochs",
    "train_accuracy",
    "val_accuracy",
    "test_accuracy",
    "seconds",
)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of study.csv; there are none if there is no such file.

    Raises UserError if the file is not one of a study.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(
                f"{path}: expected the columns of a study ({', '.join(COLUMNS)}), found "
                f"{printable(','.join(reader.fieldnames or ()))[:80]!r}; give another --out"
            )
        return list(reader)


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write study.csv."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summarize(rows: Sequence[Mapping[str, str]], num_val: Mapping[str, int]) -> Table:
    """Summarize the rows of study.csv over the seeds; fewer blocks come first.

    `num_val` is how many different photos the seeds validate on, for each number of shots: they
    share many of the photos that few shots leave over.
    """
    groups: dict[str, dict[str, list[Mapping[str, str]]]] = {}
    for row in rows:
        rows_of_blocks = groups.setdefault(row["blocks"], {})
        rows_of_blocks.setdefault(row["shots"], []).append(row)
    table = {}
    for blocks, rows_of_blocks in sorted(groups.items(), key=lambda group: _count_blocks(group[0])):
        shots_in_order = sorted(rows_of_blocks, key=_shots_as_number)
        table[_name_blocks(blocks)] = {
            shots: _summarize_seeds(rows_of_blocks[shots], num_val[shots])
            for shots in shots_in_order
        }
    return table


def _shots_as_number(shots: str) -> float:
    return math.inf if shots == "all" else int(shots)


def _name_blocks(blocks: str) -> str:
    if blocks == "none":
        return "the head alone"
    if blocks == "all":
        return "all blocks"
    return f"block {blocks}" if blocks.isdecimal() else f"blocks {blocks}"


def _count_blocks(blocks: str) -> float:
    return math.inf if blocks == "all" else len(parse_blocks(blocks, sys.maxsize))


def _summarize_seeds(rows: Sequence[Mapping[str, str]], num_val: int) -> Summary:
    val_photos = int(rows[0]["val_photos"])
    test_photos = int(rows[0]["test_photos"])
    train, val, test = (
        [float(row[f"{split}_accuracy"]) for row in rows] for split in ("train", "val", "test")
    )
    return Summary(
        num_blocks=_count_blocks(rows[0]["blocks"]),
        photos=statistics.mean(int(row["photos"]) for row in rows),
        seeds=len(rows),
        val=_spread(val),
        val_error=error_of_mean(val, min(num_val, val_photos * len(rows))),
        val_photos=val_photos,
        test=_spread(test),
        test_error=error_of_mean(test, test_photos),
        test_photos=test_photos,
        gap=_spread([of_train - of_val for of_train, of_val in zip(train, val)]),
    )


def error_of_mean(accuracies: Sequence[float], num_photos: int) -> float:
    """Return the standard error of the mean of each seed's accuracy.

    `num_photos` is how many different photos these were measured on. Other photos and other seeds
    would both give another mean, so the variances of the two are added.
    """
    variance = metrics.standard_error(statistics.mean(accuracies), num_photos) ** 2
    if len(accuracies) > 1:
        variance += statistics.variance(accuracies) / len(accuracies)
    return math.sqrt(variance)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.mean(values), min(values), max(values))


def format_table(table: Table, split: str) -> Iterator[str]:
    """Yield lines of text with the accuracies on a split, "validation" or "test".

    There is one line for each choice of blocks.
    """
    columns = {shots for summaries in table.values() for shots in summaries}
    columns_in_order = sorted(columns, key=_shots_as_number)
    yield f"{split} accuracy (lowest to highest seed) by photos per class"
    yield f"{'trained':14}" + "".join(f"{shots:>22}" for shots in columns_in_order)
    for name, summaries in table.items():
        line = f"{name:14}"
        for shots in columns_in_order:
            text = ""
            if shots in summaries:
                summary = summaries[shots]
                accuracy = summary.val if split == "validation" else summary.test
                text = f"{accuracy.mean:.3f} ({accuracy.low:.3f}-{accuracy.high:.3f})"
            line += f"{text:>22}"
        yield line


def choose_blocks(summaries: Mapping[str, Summary]) -> tuple[str, list[str]]:
    """Return which choice of blocks to train, and the others that are not clearly better or worse.

    Only validation decides. The test accuracy of the chosen blocks would be too high by chance if
    they were chosen by it. Of all choices within one standard error of the best one, the one that
    trains fewest blocks is taken.
    The error is that of the best mean. The paired error of a difference on the same photos is about
    as large: 0.014 to 0.017 between the head, one and two blocks of three breeds with 50 photos
    each, and 0.016 to 0.020 for one mean.
    Source: the 1-SE rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3
    """
    best = max(summaries.values(), key=lambda summary: summary.val.mean)
    enough = best.val.mean - best.val_error
    good = [name for name, summary in summaries.items() if summary.val.mean >= enough]
    good.sort(key=lambda name: (summaries[name].num_blocks, -summaries[name].val.mean))
    return good[0], good[1:]


def choose_shots(table: Table, most: str) -> str:
    """Return the number of shots with which to compare choices of blocks.

    Fewer shots leave more training photos to validate on, and then compare more precisely, but less
    like a run with all photos. So this is the largest number that leaves enough: ENOUGH_PHOTOS, or
    in a small data set half of what the smallest number leaves. Where none was run but `most`, it
    is that.
    """
    rows = [row for row in table.values() if most in row]
    usable = [shots for shots in rows[0] if all(shots in row for row in rows)]
    photos = {shots: rows[0][shots].val_photos for shots in usable}
    enough = min(ENOUGH_PHOTOS, max(photos.values()) / 2)
    return max((shots for shots in usable if photos[shots] >= enough), key=_shots_as_number)


def advice(table: Table) -> tuple[str, str]:
    """Say which blocks to train with the most photos, and in a second text why.

    Validation decides everything; the test accuracy is only reported.
    """
    most = max((shots for row in table.values() for shots in row), key=_shots_as_number)
    shots = choose_shots(table, most)
    candidates = {name: row[shots] for name, row in table.items() if most in row}
    chosen, as_good = choose_blocks(candidates)
    result = table[chosen][most]
    seeds = "1 seed" if result.seeds == 1 else f"{result.seeds} seeds"
    headline = (
        f"With {most} photos per class, train {chosen}: "
        f"test accuracy {result.test.mean:.3f} ± {result.test_error:.3f} (one standard error)"
    )
    summary = candidates[chosen]
    reasons = (
        f"on {result.test_photos} photos, with {seeds}. Chosen with {shots} photos per class, "
        f"where {summary.val_photos} others validate each run: "
        f"validation accuracy {summary.val.mean:.3f} ± {summary.val_error:.3f}"
    )
    if as_good:
        accuracies = [f"{name} ({candidates[name].val.mean:.3f})" for name in as_good]
        reasons += f"; also within one error of the best: {', '.join(accuracies)}"
    reasons += "."
    if shots == most and summary.val_photos < ENOUGH_PHOTOS:
        reasons += " These are few; smaller numbers for --shots would leave more to validate on."
    reasons += _say_gain(table[chosen], shots)
    gap = 100 * summary.gap.mean
    return headline, f"{reasons} Training is {gap:.1f} points above validation."


def _say_gain(summaries: Mapping[str, Summary], shots: str) -> str:
    """Say how much validation accuracy rose up to a number of shots from the number before it.

    For the lowest number, it is the rise to the next. With a single number, the text is empty.
    """
    in_order = list(summaries)
    last = max(1, in_order.index(shots))
    if len(in_order) == 1:
        return ""
    before, after = in_order[last - 1 : last + 1]
    gain = summaries[after].val.mean - summaries[before].val.mean
    error = math.hypot(summaries[after].val_error, summaries[before].val_error)
    helped = "helped" if gain > max(error, 0.01) else "helped little"
    return (
        f" More photos {helped}: {100 * gain:+.1f} ± {100 * error:.1f} points "
        f"from {before} to {after} per class."
    )
