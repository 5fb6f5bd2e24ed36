"""Which labels are hard to believe, which photos are alike, and how sure an accuracy is.

Shapes: n photos, D numbers that the head reads, C classes, K folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 5
COMPARED_AT_ONCE = 512  # photos, each with all others
NORMAL_95 = 1.959964  # standard deviations on either side of a normal mean that hold 95%


@dataclass(frozen=True)
class HeldOut:
    """What a model says of each photo that had not seen its fold."""

    fold_of: Tensor  # (n,)
    probabilities: Tensor  # (n, C)
    source: str  # which model that is, for the sentences


class Accuracy(NamedTuple):
    """An accuracy with its 95% interval over photos."""

    right: int
    photos: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        return self.right / self.photos

    def __str__(self) -> str:
        return (
            f"{self.mean:.3f} ({self.right}/{self.photos}, "
            f"95% interval {self.low:.3f} to {self.high:.3f})"
        )


def measure_accuracy(is_right: Tensor) -> Accuracy:
    """Return the accuracy on photos, given which are right (n,), with Wilson's interval.

    Unlike an interval from the spread of a few folds, it holds for few photos and for an accuracy
    of 1. Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    photos = len(is_right)
    right = int(is_right.sum())
    z = NORMAL_95
    rate = right / photos
    centre = (rate + z * z / (2 * photos)) / (1 + z * z / photos)
    spread = z * math.sqrt(rate * (1 - rate) / photos + z * z / (4 * photos**2))
    half_width = spread / (1 + z * z / photos)
    return Accuracy(right, photos, max(0.0, centre - half_width), min(1.0, centre + half_width))


def accuracy_of_folds(is_right: Tensor, fold_of: Tensor) -> list[float]:
    """Return the accuracy within each fold that has photos."""
    return [is_right[fold_of == fold].double().mean().item() for fold in fold_of.unique()]


def find_suspicious(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return which labels are suspicious: bool (n,).

    The label must not be the likeliest class. The likeliest class must be as probable as it is on
    average where it is the label, so that a class which is hard to tell does not accuse others.
    The only photo of a class is never suspicious, because nothing could be learnt of the class.
    Source: Northcutt et al. 2021, confident learning, https://arxiv.org/abs/1911.00068
    """
    num_classes = probabilities.shape[1]
    sizes = labels.bincount(minlength=num_classes)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    sums = torch.zeros(num_classes).index_add(0, labels, own)
    usual = sums / sizes.clamp(min=1)
    highest, predicted = probabilities.max(1)
    return (predicted != labels) & (highest >= usual[predicted]) & (sizes[labels] > 1)


def nearest_neighbours(features: Tensor) -> Tensor:
    """Return the nearest other photos of each photo by the cosine of their features: (n, k).

    There are k = NEIGHBOURS of them, or all others if there are fewer.
    """
    unit = F.normalize(features - features.mean(0))
    n = len(unit)
    k = min(NEIGHBOURS, n - 1)
    nearest = []
    for start in range(0, n, COMPARED_AT_ONCE):
        similarity = unit[start : start + COMPARED_AT_ONCE] @ unit.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -2.0  # A photo is no neighbour of its own.
        nearest.append(similarity.topk(k).indices)
    return torch.cat(nearest)


def listed_first(scores: Tensor, is_listed: Tensor) -> list[int]:
    """Return the indices of the photos to list, that with the lowest score first."""
    order = scores.argsort(stable=True)
    return order[is_listed[order]].tolist()
