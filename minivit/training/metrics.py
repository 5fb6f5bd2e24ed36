"""The confusion matrix, every metric that follows from it, and what the epochs' metrics say.

Metrics are defined as in scikit-learn; a class that was never predicted has precision 0. Nothing is
imported from torch, so that processes that draw figures start quickly.

Shapes: n photos, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A validation loss of up to this many times the lowest one may be noise.
NOISE = 1.02


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


def best_row(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return the epoch with the highest validation accuracy.

    Of equal epochs it is the last, which a lower learning rate refined.
    """
    return max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))


def epochs_without_better(rows: Sequence[Mapping[str, float]]) -> int:
    """Return how many epochs have passed since the highest validation accuracy was first reached.

    An epoch that is only equal is not better, although best_row keeps it.
    """
    accuracies = [row["val_accuracy"] for row in rows]
    return len(rows) - 1 - accuracies.index(max(accuracies))


def overfits_from(rows: Sequence[Mapping[str, float]]) -> int | None:
    """Return the first epoch of overfitting, or None if there is no overfitting.

    Training overfits if by the last epoch the validation loss has risen above its lowest value,
    while the training loss has gone on falling. It did so from the epoch after the lowest value.
    """
    lowest = min(rows, key=lambda row: row["val_loss"])
    last = rows[-1]
    has_risen = last["val_loss"] > NOISE * lowest["val_loss"]
    if has_risen and last["train_loss"] < lowest["train_loss"]:
        return int(lowest["epoch"]) + 1
    return None


def verdict(rows: Sequence[Mapping[str, float]]) -> str:
    """Say in one sentence whether training overfits."""
    first = overfits_from(rows)
    train, val = rows[-1]["train_accuracy"], rows[-1]["val_accuracy"]
    accuracies = f"training {train:.1%}, validation {val:.1%}"
    kept = f"the weights of epoch {best_row(rows)['epoch']} were kept"
    if first:
        return (
            f"overfitting from epoch {first}: {accuracies}; {kept}; try fewer blocks or more photos"
        )
    return f"no overfitting: {accuracies}, a gap of {100 * (train - val):.1f} points; {kept}"
