"""The text that `drop` prints, and its files drop.csv and drop.json."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import UserError, first_few, printable
from ...system.files import read_json, refuse_to_overwrite, whole_file, write_json
from ..score.statistics import Estimate
from .conditions import CONDITIONS
from .measure import Answers, MapKey
from .statistics import Result, Summary

# Everything that `drop` may write; the last two only if the model knows the classes.
OUTPUTS = ("drop.json", "drop.csv", "drop.png", "gallery.png", "gallery.html")
# What was published for another model, a ViT-B fine-tuned on Oxford-IIIT Pet, with another formula:
# the area between the two curves, in points. Its GenAtt is the relevance of this package.
# Source: LibraGrad, CVPR 2025, table 2
PUBLISHED = "random 13.7, rollout 21.2, attention 37.2, relevance 44.1"


def overview(names: Mapping[str, str], answers: Answers, num_classes: int) -> Iterator[str]:
    """Yield lines that say which photos were taken and which were left out."""
    model = printable(names["model"])
    yield f"{model}: {len(answers.photos)} photos of {num_classes} classes"
    for reason, files in answers.left_out.items():
        yield f"left out, {reason}: {len(files)} ({first_few(map(printable, files), 5)})"
    if "base" in names:
        yield f"before: {printable(names['base'])}"


def tables(summaries: Mapping[str, Summary]) -> Iterator[str]:
    """Yield the lines of all tables of each model, the model before fine-tuning first."""
    titles = {"base": "before fine-tuning", "model": "after fine-tuning"}
    for name in ("base", "model"):
        if name in summaries:
            yield ""
            if len(summaries) > 1:
                yield f"{titles[name]}:"
            yield from model_tables(summaries[name])


def model_tables(summary: Summary) -> Iterator[str]:
    knows_classes = summary.chance is not None
    accuracy = "accuracy [95% interval]  " if knows_classes else ""
    yield f"{'what is shown':34}  photos  {accuracy}same answer [95% interval]  commonest answer"
    for key in CONDITIONS:
        if key in summary.results:
            yield f"{key:34}  {result_columns(summary.results[key])}"
    yield ""
    unit = "accuracy" if knows_classes else "share of answers that stay"
    yield f"in {unit}, with 95% intervals:"
    for name, number in summary.numbers.items():
        yield f"  {name:23} {interval(number)}"
    if knows_classes:
        yield f"  {'chance':23} {summary.chance:.3f}"
    if summary.faithfulness:
        yield ""
        yield "how much more the least important patches can be spared than the most important ones"
        yield "(difference in the share of answers that stay, averaged over 10 to 90% left out):"
        for (method, block), number in summary.faithfulness.items():
            yield f"  {map_name(method, block):23} {interval(number)}"
        yield f"  published for another model, by another formula, in points: {PUBLISHED}"


def result_columns(result: Result) -> str:
    accuracy = "" if result.accuracy is None else f"{interval(result.accuracy):25}"
    return f"{result.photos:6}  {accuracy}{interval(result.agreement):28}{result.commonest:.3f}"


def interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def map_name(method: str, block: int | None) -> str:
    return method if block is None else f"{method}, block {block}"


def csv_rows(summaries: Mapping[str, Summary]) -> list[dict[str, object]]:
    """Return a flat row for each model and condition."""
    rows = []
    for model, summary in summaries.items():
        for key, result in summary.results.items():
            row: dict[str, object] = {
                "model": model,
                "condition": key if isinstance(key, str) else "in the order of a map",
                "method": "",
                "block": "",
                "first": "",
                "fraction": "",
                "photos": result.photos,
            }
            if isinstance(key, MapKey):
                row["method"] = key.method
                row["block"] = "" if key.block is None else key.block
                row["first"] = "most important" if key.most_important_first else "least important"
                row["fraction"] = key.fraction
            for name in ("accuracy", "agreement"):
                estimate = getattr(result, name)
                for suffix in ("mean", "low", "high"):
                    column = name if suffix == "mean" else f"{name}_{suffix}"
                    row[column] = "" if estimate is None else getattr(estimate, suffix)
            row["commonest"] = result.commonest
            rows.append(row)
    return rows


def earlier_outputs(out: Path) -> set[str]:
    """Return the names of the files in a folder that an earlier `drop` wrote there."""
    try:
        about = read_json(out / "drop.json")
    except (UserError, OSError):
        return set()
    files = about.get("files")
    if "models" not in about or not isinstance(files, list):
        return set()  # Another program wrote this file.
    return {name for name in OUTPUTS if name in files}


def check_folder(out: Path) -> None:
    """Raise UserError if writing into a folder might overwrite what no `drop` wrote."""
    earlier = earlier_outputs(out)
    refuse_to_overwrite(out, [name for name in OUTPUTS if name not in earlier])


def remove_earlier(out: Path) -> None:
    """Remove what an earlier `drop` wrote, so that results of two models never lie together."""
    for name in earlier_outputs(out) - {"drop.json"}:  # This one is replaced first.
        (out / name).unlink(missing_ok=True)


def write_files(out: Path, summaries: Mapping[str, Summary], about: Mapping[str, object]) -> None:
    """Write drop.json with the numbers, and drop.csv with all conditions.

    The JSON file comes first, because its list says which other files are of a `drop`.
    """
    models = {}
    for model, summary in summaries.items():
        conditions = {
            key: {
                "photos": result.photos,
                "accuracy": result.accuracy and result.accuracy._asdict(),
                "agreement": result.agreement._asdict(),
                "commonest": result.commonest,
            }
            for key, result in summary.results.items()
            if isinstance(key, str)
        }
        models[model] = {
            "chance": summary.chance,
            "numbers": {name: number._asdict() for name, number in summary.numbers.items()},
            "conditions": conditions,
            "faithfulness": [
                {"method": method, "block": block, **number._asdict()}
                for (method, block), number in summary.faithfulness.items()
            ],
        }
    write_json(out / "drop.json", {**about, "models": models})
    rows = csv_rows(summaries)
    with whole_file(out / "drop.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
