"""The confusion matrix, and every figure of merit that follows from it.

Shapes: C classes. Definitions are scikit-learn's, a class that was never predicted counting as precision 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RISE = 1.02  # of validation loss over its lowest; what is less may be noise


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count photos by true class (row) and predicted class (column): int64 (C, C) from two of (n,)."""
    index = labels.long() * num_classes + predicted.long()
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def per_class(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each class's precision, recall and F1: three float64 (C,), 0 where nothing is there to divide by."""
    hits, confusion = confusion.diagonal().double(), confusion.double()
    predicted, true = confusion.sum(0), confusion.sum(1)
    return (
        hits / predicted.clamp(min=1),
        hits / true.clamp(min=1),
        2 * hits / (predicted + true).clamp(min=1),
    )


def summarize(confusion: Tensor) -> dict[str, float]:
    """Return accuracy; precision, recall and f1 weighted by each class's photos; macro_f1 over the classes present."""
    precision, recall, f1 = per_class(confusion)
    true = confusion.sum(1).double()
    weight = true / true.sum()
    present = (true + confusion.sum(0)) > 0
    return {
        "accuracy": (confusion.diagonal().sum() / true.sum()).item(),
        "precision": (weight * precision).sum().item(),
        "recall": (weight * recall).sum().item(),
        "f1": (weight * f1).sum().item(),
        "macro_f1": f1[present].mean().item(),
    }


def confused_pairs(confusion: Tensor, most: int) -> list[tuple[int, int, int]]:
    """Return the most confused pairs of classes: (true, predicted, photos), the most photos first."""
    wrong = confusion - confusion.diagonal().diag()
    counts, flat = wrong.flatten().sort(descending=True, stable=True)
    return [
        (i // len(wrong), i % len(wrong), n) for n, i in zip(counts.tolist(), flat.tolist()) if n
    ][:most]


def best_row(rows: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return the epoch of highest validation accuracy; of equals the last, which a lower learning rate refined."""
    return max(rows, key=lambda row: (row["val_accuracy"], row["epoch"]))


def overfits_from(rows: Sequence[Mapping[str, float]]) -> int | None:
    """Return the first epoch after validation loss was lowest, if it has risen since while training loss fell; else None."""
    lowest, last = min(rows, key=lambda row: row["val_loss"]), rows[-1]
    rises = (
        last["val_loss"] > RISE * lowest["val_loss"] and last["train_loss"] < lowest["train_loss"]
    )
    return int(lowest["epoch"]) + 1 if rises else None


def verdict(rows: Sequence[Mapping[str, float]]) -> str:
    """Say in a sentence whether training overfits, by the last of the epochs."""
    first, last = overfits_from(rows), rows[-1]
    gap = 100 * (last["train_accuracy"] - last["val_accuracy"])
    found = f"training {last['train_accuracy']:.1%}, validation {last['val_accuracy']:.1%}"
    kept = f"the weights of epoch {best_row(rows)['epoch']} were kept"
    if first:
        return f"overfitting from epoch {first}: {found}; {kept}; try fewer blocks or more photos"
    return f"no overfitting: {found}, a gap of {gap:.1f} points; {kept}"
