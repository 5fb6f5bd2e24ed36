"""What a review finds: its sentences, a row for each photo, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import printable
from .labels import (
    NEIGHBOURS,
    Accuracy,
    HeldOut,
    accuracy_of_folds,
    find_suspicious,
    listed_first,
    measure_accuracy,
    nearest_neighbours,
)
from .measure import Measured

# What may be odd about a photo, as the column "flags" of review.csv says it.
MISTAKE, SUSPICIOUS, COPY, UNREADABLE = "mistake", "suspicious label", "copy", "unreadable"

# If more of the labels are suspicious, it is the model that cannot tell the classes.
TOO_MANY = 0.2


@dataclass(frozen=True)
class Photos:
    """The n photos that are reviewed."""

    classes: Sequence[str]
    paths: Sequence[Path]
    splits: Sequence[str]  # train, val or test
    labels: Tensor  # (n,)

    def take(self, indices: Sequence[int]) -> Photos:
        """Return some of the photos, in the order of their indices."""
        paths = [self.paths[i] for i in indices]
        splits = [self.splits[i] for i in indices]
        return Photos(self.classes, paths, splits, self.labels[indices])


@dataclass(frozen=True)
class Findings:
    """All that a review finds out about n photos, which are referred to by their index."""

    run: str
    photos: Photos
    held_out: list[int]  # the validation and test photos
    # The run's answers: these mean something for held-out photos only.
    answers: Tensor  # (n,)
    answer_probabilities: Tensor  # (n,)
    run_label_probabilities: Tensor  # (n,), of the labels
    mistakes: list[int]  # the held-out photos that are wrong, the most confident answer first
    # Of models that had not seen a photo:
    folds: HeldOut
    label_probabilities: Tensor  # (n,), by which suspicious labels are ranked
    predictions: Tensor  # (n,)
    likeness: Tensor  # (n,), the likeliest class but for the label
    likeness_probabilities: Tensor  # (n,)
    suspicious: list[int]  # the least believed label first
    neighbours: Tensor  # (n, k)
    copies: list[list[int]]  # groups that span two splits or two labels
    leaked: list[int]  # the held-out photos of which a copy was trained on


def find(
    run: str,
    photos: Photos,
    measured: Measured,
    folds: HeldOut,
    groups: Iterable[Sequence[int]],
) -> Findings:
    """Bring together what the parts of a review find. `groups` are those of all copies."""
    labels = photos.labels
    rows = torch.arange(len(labels))
    probabilities = measured.logits.softmax(1)
    answer_probabilities, answers = probabilities.max(1)
    is_held_out = torch.tensor([split != "train" for split in photos.splits])
    label_probabilities = folds.probabilities[rows, labels]
    others = folds.probabilities.clone()
    others[rows, labels] = -1.0
    likeness_probabilities, likeness = others.max(1)
    copies, leaked = sort_copies(groups, photos)
    return Findings(
        run=run,
        photos=photos,
        held_out=is_held_out.nonzero()[:, 0].tolist(),
        answers=answers,
        answer_probabilities=answer_probabilities,
        run_label_probabilities=probabilities[rows, labels],
        mistakes=listed_first(-answer_probabilities, is_held_out & (answers != labels)),
        folds=folds,
        label_probabilities=label_probabilities,
        predictions=folds.probabilities.argmax(1),
        likeness=likeness,
        likeness_probabilities=likeness_probabilities,
        suspicious=listed_first(label_probabilities, find_suspicious(folds.probabilities, labels)),
        neighbours=nearest_neighbours(measured.features),
        copies=copies,
        leaked=leaked,
    )


def sort_copies(
    groups: Iterable[Sequence[int]], photos: Photos
) -> tuple[list[list[int]], list[int]]:
    """Return the groups of copies in two splits or under two labels, and what was trained on.

    The latter are the validation and test photos of which a copy is in training.
    """
    copies = []
    leaked = []
    for group in groups:
        splits = {photos.splits[i] for i in group}
        if len(splits) > 1 or len({int(photos.labels[i]) for i in group}) > 1:
            copies.append(list(group))
        if "train" in splits:
            leaked += [i for i in group if photos.splits[i] != "train"]
    return copies, leaked


def describe(findings: Findings) -> dict[str, str]:
    """Return a sentence for each part of the review."""
    return {
        "mistakes": describe_mistakes(findings),
        "suspicious labels": describe_labels(findings),
        "how sure the accuracy is": describe_accuracy(findings),
        "nearly the same photo": describe_copies(findings),
    }


def describe_mistakes(findings: Findings) -> str:
    held_out = len(findings.held_out)
    wrong = len(findings.mistakes)
    if wrong == 0:
        return f"none of the {held_out} validation and test photos is wrong."
    labels = findings.photos.labels[findings.mistakes].tolist()
    answers = findings.answers[findings.mistakes].tolist()
    [((label, answer), count)] = Counter(zip(labels, answers)).most_common(1)
    classes = findings.photos.classes
    commonest = f"{printable(classes[label])} taken for {printable(classes[answer])}"
    if count > 1:
        commonest = f"most often {commonest} ({count})"
    elif wrong > 1:
        commonest = f"no two in the same way; the most confident is {commonest}"
    return (
        f"{wrong} of {held_out} validation and test photos {is_or_are(wrong)} wrong, {commonest}."
    )


def describe_labels(findings: Findings) -> str:
    judge = f"{findings.folds.source} that had not seen the photos"
    num_photos = len(findings.photos.paths)
    num_suspicious = len(findings.suspicious)
    if num_suspicious == 0:
        return f"none of {num_photos} labels surprises {judge}."
    surprise = "labels surprise" if num_suspicious > 1 else "labels surprises"
    sentence = f"{num_suspicious} of {num_photos} {surprise} {judge}. "
    if num_suspicious > TOO_MANY * num_photos:
        return sentence + (
            "So many can hardly all be wrong: it does not tell the classes apart well, so look at "
            "the first ones only."
        )
    return sentence + "Look at them: some are wrong, others are photos that are hard to tell."


def describe_accuracy(findings: Findings) -> str:
    is_right = findings.predictions == findings.photos.labels
    folds = accuracy_of_folds(is_right, findings.folds.fold_of)
    sentence = (
        f"{findings.folds.source} has an accuracy of {measure_accuracy(is_right)} over "
        f"{len(folds)} folds, from {min(folds):.3f} in the worst to {max(folds):.3f} in the best. "
        "The interval is Wilson's over all photos."
    )
    test = accuracy_of_test(findings)
    if test is not None:
        sentence += f" The run itself has {test} on the test photos."
    return sentence


def accuracy_of_test(findings: Findings) -> Accuracy | None:
    """Return the run's accuracy on the test photos, or None if none of them can be read."""
    test = [i for i in findings.held_out if findings.photos.splits[i] == "test"]
    if not test:
        return None
    return measure_accuracy(findings.answers[test] == findings.photos.labels[test])


def describe_copies(findings: Findings) -> str:
    leaked = len(findings.leaked)
    if leaked == 0:
        return "none of the validation and test photos is also in training."
    return (
        f"{leaked} of {len(findings.held_out)} validation and test photos "
        f"{is_or_are(leaked)} also in training, which makes accuracy look better than it is."
    )


def is_or_are(count: int) -> str:
    return "is" if count == 1 else "are"


def rows(findings: Findings) -> list[dict[str, object]]:
    """Return a row of review.csv for each photo that was read."""
    flags: dict[str, set[int]] = {
        MISTAKE: set(findings.mistakes),
        SUSPICIOUS: set(findings.suspicious),
        COPY: {i for group in findings.copies for i in group},
    }
    photos = findings.photos
    classes = [printable(name) for name in photos.classes]
    table = []
    for i in range(len(photos.paths)):
        row = empty_row(photos, i)
        row["flags"] = "; ".join(flag for flag, indices in flags.items() if i in indices)
        row["label_probability"] = round(float(findings.label_probabilities[i]), 6)
        row["predicted"] = classes[findings.predictions[i]]
        row["fold"] = int(findings.folds.fold_of[i])
        if photos.splits[i] != "train":
            row["run_predicted"] = classes[findings.answers[i]]
            row["run_probability"] = round(float(findings.answer_probabilities[i]), 6)
        for place, neighbour in enumerate(findings.neighbours[i].tolist(), 1):
            row[f"neighbour_{place}"] = printable(photos.paths[neighbour])
        table.append(row)
    return table


def empty_row(photos: Photos, i: int) -> dict[str, object]:
    """Return a row with all columns, of which only those that are always known are filled in."""
    row: dict[str, object] = {
        "path": printable(photos.paths[i]),
        "split": photos.splits[i],
        "label": printable(photos.classes[int(photos.labels[i])]),
    }
    columns = ["flags", "label_probability", "predicted", "fold"]
    columns += ["run_predicted", "run_probability"]
    columns += [f"neighbour_{place}" for place in range(1, NEIGHBOURS + 1)]
    return row | dict.fromkeys(columns, "")


def unreadable_row(photos: Photos, i: int) -> dict[str, object]:
    return empty_row(photos, i) | {"flags": UNREADABLE}


def summary(findings: Findings) -> dict[str, object]:
    """Return what review.json says of the findings."""
    is_right = findings.predictions == findings.photos.labels
    test = accuracy_of_test(findings)
    names = [str(path) for path in findings.photos.paths]
    return {
        "sentences": describe(findings),
        "run": findings.run,
        "photos": len(names),
        "held_out_photos": len(findings.held_out),
        "mistakes": [names[i] for i in findings.mistakes],
        "suspicious_labels": [names[i] for i in findings.suspicious],
        "cross_validation": {
            "model": findings.folds.source,
            "folds": accuracy_of_folds(is_right, findings.folds.fold_of),
            **interval(measure_accuracy(is_right)),
        },
        "test": None if test is None else interval(test),
        "copies": [[names[i] for i in group] for group in findings.copies],
        "copies_in_training": [names[i] for i in findings.leaked],
    }


def interval(accuracy: Accuracy) -> Mapping[str, object]:
    return {"accuracy": accuracy.mean, **accuracy._asdict()}
