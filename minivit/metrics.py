"""The confusion matrix, and every figure of merit that follows from it.

Shapes: C classes. Definitions are scikit-learn's, a class that was never predicted counting as precision 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count photos by true class (row) and predicted class (column): int64 (C, C) from two of (n,)."""
    index = labels.long() * num_classes + predicted.long()
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def per_class(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each class's precision, recall and F1: three float64 (C,), 0 where nothing is there to divide by."""
    hits, confusion = confusion.diagonal().double(), confusion.double()
    predicted, true = confusion.sum(0), confusion.sum(1)
    return hits / predicted.clamp(min=1), hits / true.clamp(min=1), 2 * hits / (predicted + true).clamp(min=1)


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
