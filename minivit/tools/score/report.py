"""The text that `score` prints, and its files score.csv and score.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import first_few, printable
from ...system.files import write_json
from .outputs import write_csv
from .statistics import METRICS, REGIONS, Estimate, Score, ScoreKey

if TYPE_CHECKING:
    from .measure import Measured

TableKey = tuple[str, str, int, int | str]  # model, group, block, and head or "mean"


def overview(
    names: Mapping[str, str],
    measured: Measured,
    groups: Mapping[str, np.ndarray],
    split: str,
    blocks: Sequence[int],
) -> Iterator[str]:
    """Yield lines that say what was scored, what was left out, and what the models share."""
    sizes = [f"{members.sum()} {group}" for group, members in groups.items() if group != "all"]
    model = printable(names["model"])
    yield f"{model} on {len(measured.photos)} photos of the {split} split: {', '.join(sizes)}"
    if "right" not in groups:
        yield "the model does not know these classes, so no prediction is right or wrong"
    for reason, files in measured.left_out.items():
        yield f"left out, {reason}: {named(files)}"
    for reason, files in measured.without_head.items():
        yield f"scored on the pet alone, {reason}: {named(files)}"
    yield (
        f"the pet covers {measured.pet_area.mean():.3f} of what the model sees: the chance level "
        "of mass and average precision, and roughly of pointing"
    )
    if "base" in names:
        base = printable(names["base"])
        yield f"before: {base}; {equal_weights(measured.equal_blocks, blocks)}"


def named(files: Sequence[str]) -> str:
    """Return how many files there are, and the names of the first few."""
    return f"{len(files)} ({first_few(map(printable, files), 5)})"


def equal_weights(equal_blocks: int, blocks: Sequence[int]) -> str:
    """Say which blocks, from the first on, have the same weights in both models."""
    if equal_blocks == 0:
        return "the weights of the embeddings or of block 0 differ, so any map may differ"
    first = "block 0 has" if equal_blocks == 1 else f"blocks 0-{equal_blocks - 1} have"
    num_scored = sum(block < equal_blocks for block in blocks)
    if num_scored == 0:
        return f"{first} the same weights in both models, but are not scored"
    return (
        f"{first} the same weights in both models and, where scored "
        f"({num_scored} of {equal_blocks}), identical maps on every photo"
    )


def tables(scores: Mapping[ScoreKey, Score], methods: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table for each region and method."""
    for region in REGIONS:
        for method in methods:
            rows = {
                (key.model, key.group, key.block, key.head): score
                for key, score in scores.items()
                if key.region == region and key.method == method
            }
            if rows:
                yield from table(rows, f"{method} on the {region}")


def table(rows: Mapping[TableKey, Score], title: str) -> Iterator[str]:
    """Yield the lines of one table: a block on each line, the mean over heads in the columns."""
    blocks = sorted({block for _, _, block, _ in rows})
    heads = sorted({head for _, _, _, head in rows} - {"mean"})
    groups = dict.fromkeys(group for _, group, _, _ in rows if group != "all")
    compared = ("base", "all", blocks[0], "mean") in rows
    photos = rows["model", "all", blocks[0], "mean"].photos
    yield f"\n{title}, times chance, with 95% intervals over {photos} photos"
    if compared:
        intervals = f"{'before':^18}  {'after':^18}  {'change':^22}"
    else:
        intervals = f"{'times chance':^18}"
    header = f"block  {intervals}   mass  pointing     AP  "
    for group in groups:
        header += f"{group:>7}"
    if heads:
        header += "   highest head"
    yield header
    for block in blocks:
        mean = rows["model", "all", block, "mean"]
        intervals = format_interval(mean.times_chance)
        if compared:
            before = format_interval(rows["base", "all", block, "mean"].times_chance)
            change = format_change(rows["change", "all", block, "mean"].times_chance)
            intervals = f"{before}  {intervals}  {change}"
        line = f"{block:5}  {intervals}  {mean.mass.mean:5.3f}  {mean.pointing.mean:8.3f}"
        line += f"  {mean.average_precision.mean:5.3f}  "
        for group in groups:
            line += f"{rows['model', group, block, 'mean'].times_chance.mean:7.2f}"
        if heads:
            by_head = {h: rows["model", "all", block, h].times_chance.mean for h in heads}
            highest = max(heads, key=by_head.__getitem__)
            line += f"  {highest:4}: {by_head[highest]:.2f}"
        yield line


def format_interval(estimate: Estimate) -> str:
    return f"{estimate.mean:4.2f} [{estimate.low:4.2f}, {estimate.high:4.2f}]"


def format_change(change: Estimate) -> str:
    if change.low == change.high == 0:  # The maps are identical.
        return f"{'same':^22}"
    return f"{change.mean:+5.2f} [{change.low:+5.2f}, {change.high:+5.2f}]"


def one_sentence(scores: Mapping[ScoreKey, Score], block: int, names: Mapping[str, str]) -> str:
    """Say how much of its attention a block puts on the pet, and whether fine-tuning changed it."""
    times = {
        model: scores[ScoreKey(model, "pet", "all", "attention", block, "mean")].times_chance
        for model in ("model", "base", "change")
        if model == "model" or "base" in names
    }
    mean, low, high = times["model"]
    sentence = (
        f"block {block} of {printable(names['model'])} puts {mean:.2f} times chance on the pet "
        f"(95% interval {low:.2f} to {high:.2f})"
    )
    if "base" not in names:
        return sentence
    change, low, high = times["change"]
    if low > 0:
        verdict = "more"
    elif high < 0:
        verdict = "less"
    elif change:
        verdict = "no clear change"
    else:
        verdict = "no change"
    return (
        f"{sentence}, before tuning {times['base'].mean:.2f}: {verdict} "
        f"({change:+.2f}, {low:+.2f} to {high:+.2f})"
    )


def write_scores(
    out: Path, scores: Mapping[ScoreKey, Score], summary: Mapping[str, object]
) -> None:
    """Write score.json with the summary and the means over heads, and score.csv with all scores."""
    rows = score_rows(scores)
    head_means = [row for row in rows if row["head"] == "mean"]
    write_json(out / "score.json", {**summary, "scores": head_means})
    write_csv(out / "score.csv", rows)


def score_rows(scores: Mapping[ScoreKey, Score]) -> list[dict[str, object]]:
    """Return a flat row for each score. The unknown interval of a single photo is None."""
    rows = []
    for key, score in scores.items():
        row: dict[str, object] = {**key._asdict(), "photos": score.photos}
        for metric in METRICS:
            row |= getattr(score, metric).columns(metric)
        rows.append(row)
    return rows
