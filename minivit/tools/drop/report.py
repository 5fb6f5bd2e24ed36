"""The text that `drop` prints, and its files drop.csv and drop.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import printable
from ...system.files import write_json
from ..score.outputs import write_csv
from ..score.report import named
from ..score.statistics import Estimate
from .conditions import CONDITIONS
from .measure import Answers, MapKey
from .statistics import Result, Summary

UNKNOWN = Estimate(math.nan, math.nan, math.nan)  # the accuracy of a model of other classes
# What was published for another model, a ViT-B fine-tuned on Oxford-IIIT Pet, with another formula:
# the area between the two curves, in points. Its GenAtt is the relevance of this package.
# Source: LibraGrad, CVPR 2025, table 2
PUBLISHED = "random 13.7, rollout 21.2, attention 37.2, relevance 44.1"


def overview(names: Mapping[str, str], answers: Answers, num_classes: int) -> Iterator[str]:
    """Yield lines that say which photos were taken and which were left out."""
    model = printable(names["model"])
    yield f"{model}: {len(answers.photos)} photos of {num_classes} classes"
    for reason, files in answers.left_out.items():
        yield f"left out, {reason}: {named(files)}"
    if "base" in names:
        yield f"before: {printable(names['base'])}"


def timing(num_photos: int, seconds: Mapping[str, float]) -> str:
    """Say how long it took, and where the time went."""
    parts = ", ".join(f"{part} {each:.1f} s" for part, each in seconds.items() if each)
    return f"{num_photos} photos asked about in {sum(seconds.values()):.1f} s ({parts})"


def tables(summaries: Mapping[str, Summary]) -> Iterator[str]:
    """Yield the lines of all tables of each model, the model before fine-tuning first."""
    titles = {"base": "before fine-tuning", "model": "after fine-tuning"}
    all_know_classes = all(summary.chance is not None for summary in summaries.values())
    for name in ("base", "model"):
        if name in summaries:
            yield ""
            if len(summaries) > 1:
                yield f"{titles[name]}:"
            yield from model_tables(summaries[name], with_same_answers=not all_know_classes)


def model_tables(summary: Summary, *, with_same_answers: bool) -> Iterator[str]:
    """Yield the lines of a model's tables. Its same answers compare with those of any model."""
    accuracy = "accuracy [95% interval]  "
    if summary.chance is None:
        accuracy = ""
        yield "this model does not know the classes: no answer is right or wrong, but it may stay"
    yield f"{'what is shown':34}  photos  {accuracy}same answer [95% interval]  commonest answer"
    for key in CONDITIONS:
        if key in summary.results:
            yield f"{key:34}  {result_columns(summary.results[key])}"
    if summary.chance is not None:
        yield from number_lines("accuracy", summary.numbers)
        yield f"  {'chance':23} {summary.chance:.3f}"
    if with_same_answers:
        yield from number_lines("the share of answers that stay", summary.numbers_of_same_answers)
    if summary.faithfulness:
        yield ""
        yield "how much more the least important patches can be spared than the most important ones"
        yield "(difference in the share of answers that stay, averaged over 10 to 90% left out):"
        for (method, block), number in summary.faithfulness.items():
            yield f"  {map_name(method, block):23} {interval(number)}"
        yield f"  published for another model, by another formula, in points: {PUBLISHED}"


def number_lines(unit: str, numbers: Mapping[str, Estimate]) -> Iterator[str]:
    """Yield the lines of the four numbers."""
    yield ""
    yield f"in {unit}, with 95% intervals:"
    for name, number in numbers.items():
        yield f"  {name:23} {interval(number)}"


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
            accuracy = UNKNOWN if result.accuracy is None else result.accuracy
            row |= accuracy.columns("accuracy") | result.agreement.columns("agreement")
            row["commonest"] = result.commonest
            rows.append(row)
    return rows


def write_files(out: Path, summaries: Mapping[str, Summary], about: Mapping[str, object]) -> None:
    """Write drop.json with the numbers, and then drop.csv with all conditions."""
    models = {}
    for model, summary in summaries.items():
        conditions = {}
        for key, result in summary.results.items():
            if not isinstance(key, MapKey):
                accuracy = None if result.accuracy is None else result.accuracy._asdict()
                conditions[key] = {
                    "photos": result.photos,
                    "accuracy": accuracy,
                    "agreement": result.agreement._asdict(),
                    "commonest": result.commonest,
                }
        models[model] = {
            "chance": summary.chance,
            "numbers": as_dicts(summary.numbers),
            "numbers_of_same_answers": as_dicts(summary.numbers_of_same_answers),
            "conditions": conditions,
            "faithfulness": [
                {"method": method, "block": block, **number._asdict()}
                for (method, block), number in summary.faithfulness.items()
            ],
        }
    write_json(out / "drop.json", {**about, "models": models})
    write_csv(out / "drop.csv", csv_rows(summaries))


def as_dicts(numbers: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: number._asdict() for name, number in numbers.items()}
