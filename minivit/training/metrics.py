"""The confusion matrix, every metric that follows from it, and what the epochs' metrics say.

Metrics are defined as in scikit-learn; a class that was never predicted has precision 0. Nothing is
imported from torch, so that processes that draw figures start quickly.

Shapes: n photos, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A validation loss of up to this many times the lowest one may be noise.
NOISE = 1.02
# Which weights a run keeps: "auto" those of the last epoch, unless an earlier one is clearly
# better; "best" those with the highest validation accuracy; "last" those of the last epoch; and
# "average" the mean of those of the second half of the epochs.
KEEP = ("auto", "best", "last", "average")
# An earlier epoch is clearly better if its validation accuracy is higher by more than so many
# standard errors. benchmarks/recipe.py compares the rules.
CLEARLY = 2


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count photos by true class (row) and predicted class (column).

    `predicted` and `labels` are class indices (n,); the counts are int64 (C, C).
    """
    cells = labels.long() * num_classes + predicted.long()
    return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def per_class(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, recall and F1 of each class, as three float64 tensors (C,).

    A score is 0 where its denominator is 0.
    """
    confusion = confusion.double()
    hits = confusion.diagonal()
    predicted = confusion.sum(0)
    true = confusion.sum(1)
    precision = hits / predicted.clamp(min=1)
    recall = hits / true.clamp(min=1)
    f1 = 2 * hits / (predicted + true).clamp(min=1)
    return precision, recall, f1


def summarize(confusion: Tensor) -> dict[str, float]:
    """Return accuracy, precision, recall, f1 and macro_f1 over all photos.

    Precision, recall and f1 are means over the classes, weighted by each one's number of photos.
    macro_f1 is the plain mean over the classes that are a label or a prediction of some photo.
    """
    precision, recall, f1 = per_class(confusion)
    true = confusion.sum(1).double()
    weights = true / true.sum()
    present = (true + confusion.sum(0)) > 0
    return {
        "accuracy": (confusion.diagonal().sum() / true.sum()).item(),
        "precision": (weights * precision).sum().item(),
        "recall": (weights * recall).sum().item(),
        "f1": (weights * f1).sum().item(),
        "macro_f1": f1[present].mean().item(),
    }


def confused_pairs(confusion: Tensor, most: int) -> list[tuple[int, int, int]]:
    """Return the pairs of classes confused most often: (true, predicted, number of photos).

    The most frequent pair comes first; there are at most `most` pairs.
    """
    wrong = confusion - confusion.diagonal().diag()
    counts, cells = wrong.flatten().sort(descending=True, stable=True)
    pairs = []
    for count, cell in zip(counts[:most].tolist(), cells[:most].tolist()):
        if count:
            true, predicted = divmod(cell, len(wrong))
            pairs.append((true, predicted, count))
    return pairs


@dataclass(frozen=True)
class Kept:
    """Which weights a run keeps, and why."""

    epoch: int  # 0 is the head alone
    weights: str  # those of the "last" epoch, of an "earlier" one, or an "average"
    reason: str  # a clause that follows a semicolon


def choose_kept(
    rows: Sequence[Mapping[str, float]], keep: str, num_val: int, *, ended_early: bool = False
) -> Kept:
    """Choose which epoch's weights to keep, by one of the rules of KEEP.

    `num_val` is the number of validation photos. With `ended_early` the learning rate has not
    reached 0, so that the last epoch has no advantage: "auto" is then the same as "best".
    """
    last = rows[-1]
    epoch = int(last["epoch"])
    if epoch == 0:
        return Kept(0, "last", "the head alone was trained")
    if keep == "last":
        return Kept(epoch, "last", f"epoch {epoch} was kept, the last one, as asked")
    if keep == "average":
        first = first_averaged(epoch)
        reason = f"the mean of the weights of epochs {first} to {epoch} was kept, as asked"
        return Kept(epoch, "average", reason)
    best = best_row(rows)
    best_epoch = int(best["epoch"])
    weights = "last" if best is last else "earlier"
    if keep == "best" or ended_early:
        reason = f"{name_epoch(best)} was kept, which has the highest validation accuracy"
        return Kept(best_epoch, weights, reason)
    margin = CLEARLY * standard_error(last["val_accuracy"], num_val)
    evidence = f"by more than {CLEARLY} standard errors of {num_val} photos"
    if best["val_accuracy"] - last["val_accuracy"] > margin:
        reason = f"{name_epoch(best)} was kept, which is better than the last epoch {evidence}"
        return Kept(best_epoch, weights, reason)
    reason = f"epoch {epoch} was kept, the last: none before it is better {evidence}"
    return Kept(epoch, "last", reason)


def name_epoch(row: Mapping[str, float]) -> str:
    return f"epoch {row['epoch']}" if row["epoch"] else "the head alone"


def first_averaged(last_epoch: int) -> int:
    """Return the first of the epochs whose weights `--keep average` takes the mean of."""
    return last_epoch // 2 + 1


def standard_error(accuracy: float, num_photos: int) -> float:
    """Return the standard error of an accuracy that was measured on so many photos."""
    # With a right and a wrong answer more, an accuracy of 1 has an error, too.
    rate = (accuracy * num_photos + 1) / (num_photos + 2)
    return math.sqrt(rate * (1 - rate) / num_photos)


def best_row(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return the row with the highest validation accuracy; row 0 is that of the head alone.

    Of equal epochs it is the last, which a lower learning rate refined.
    """
    return max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))


def epochs_without_better(rows: Sequence[Mapping[str, float]]) -> int:
    """Return how many epochs have passed since the highest validation accuracy was first reached.

    An epoch that is only equal is not better, although best_row keeps it. The head alone counts as
    no epoch.
    """
    accuracies = [row["val_accuracy"] for row in rows if row["epoch"] > 0]
    if not accuracies:
        return 0
    return len(accuracies) - 1 - accuracies.index(max(accuracies))


def overfits_from(rows: Sequence[Mapping[str, float]]) -> int | None:
    """Return the first epoch of overfitting, or None if there is no overfitting.

    Training overfits if by the last epoch the validation loss has risen above its lowest value,
    while the training loss has gone on falling. It did so from the epoch after the lowest value.
    """
    epochs = [row for row in rows if row["epoch"] > 0]
    if not epochs:
        return None
    lowest = min(epochs, key=lambda row: row["val_loss"])
    last = epochs[-1]
    has_risen = last["val_loss"] > NOISE * lowest["val_loss"]
    if has_risen and last["train_loss"] < lowest["train_loss"]:
        return int(lowest["epoch"]) + 1
    return None


def verdict(rows: Sequence[Mapping[str, float]], kept: Kept) -> str:
    """Say in one sentence whether training overfits, what it gains, and which weights are kept."""
    first = overfits_from(rows)
    train, val = rows[-1]["train_accuracy"], rows[-1]["val_accuracy"]
    text = f"training {train:.1%}, validation {val:.1%}"
    val_losses = [row["val_loss"] for row in rows if row["epoch"] > 0]
    if first:
        text = f"overfitting from epoch {first}: {text}"
    else:
        text = f"{text}, a gap of {100 * (train - val):.1f} points"
        if val_losses and val_losses[-1] <= NOISE * min(val_losses):
            text = f"the validation loss has not risen: {text}"
    if rows[0]["epoch"] == 0 and len(rows) > 1:
        text += f", the head alone {rows[0]['val_accuracy']:.1%}"
    text += f"; {kept.reason}"
    if first:
        text += "; try fewer blocks or more photos"
    return text
