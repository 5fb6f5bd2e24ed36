"""Weights of classes in the loss, so that a class with few photos counts as much as any other.

Shapes: n photos, C classes.
"""

from __future__ import annotations

from torch import Tensor

CLASS_WEIGHTS = ("none", "balanced")


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return a weight for each class (C,), inversely proportional to its photos in labels (n,).

    A class has the weight n / (number of classes with photos x its number of photos). The mean of
    the weights over the n photos is then 1, so that a sum of weighted losses is still divided by
    the number of photos. Over all photos, that is torch's cross_entropy(weight=...).
    """
    counts = labels.bincount(minlength=num_classes)
    num_present = int((counts > 0).sum())
    return len(labels) / (num_present * counts.clamp(min=1).float())
