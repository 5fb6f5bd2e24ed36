"""Calibrated probabilities: a temperature, fitted on validation photos and folded into the head.

Logits are divided by the temperature. That changes how sure a prediction is, never which class is
predicted. The validation photos have chosen nothing but the epoch, so they can be used for one more
number. Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599

Nothing is imported from torch, so that processes that draw figures start quickly.

Shapes: n photos, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import ViT

CALIBRATE = ("auto", "on", "off")
LEAST_PHOTOS = 100  # of validation, for "auto"
HIGHEST = 20.0  # The temperature lies between this and its inverse.
STEPS = 30  # of bisection, each of which halves the interval: up to 1e-8 of the temperature
NUM_BINS = 15


class Bin(NamedTuple):
    """Photos whose predictions are about equally confident."""

    num_photos: int
    confidence: float  # the mean probability of their predictions
    accuracy: float


def choose_temperature(calibrate: str, logits: Tensor, labels: Tensor) -> float | None:
    """Return the temperature to fold into the head, or None if probabilities stay as they are.

    `calibrate` is one of CALIBRATE; the logits (n, C) and labels (n,) are the validation photos'.
    """
    if calibrate == "off" or (calibrate == "auto" and len(labels) < LEAST_PHOTOS):
        return None
    return fit_temperature(logits, labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature with the lowest cross-entropy of logits (n, C) and labels (n,).

    The cross-entropy is a convex function of the inverse temperature, so its derivative rises, and
    bisection finds where it is 0. If all photos are right, that would be nowhere: so each label
    gives 1 / (n + 2) of its share to all classes, as if one photo more had a wrong label (after
    Platt 1999).
    """
    logits = logits.double()
    n, num_classes = logits.shape
    wrong = 1 / (n + 2)
    targets = logits.new_full((n, num_classes), wrong / num_classes)
    targets.scatter_(1, labels[:, None], 1 - wrong + wrong / num_classes)
    low = -math.log(HIGHEST)  # of the logarithm of the inverse temperature
    high = math.log(HIGHEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        errors = (math.exp(middle) * logits).softmax(1) - targets
        derivative = (errors * logits).sum().item()
        if derivative < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


def fold_temperature(temperature: float, model: ViT, *copies: ViT) -> None:
    """Divide the weight and the bias of a model's head by the temperature.

    The heads of its working copies become that head, in their own precision.
    """
    for name in ("weight", "bias"):
        parameter = model.get_parameter(f"head.{name}")
        parameter.data = parameter.data / temperature
        for copy in copies:
            copy.get_parameter(f"head.{name}").data.copy_(parameter.data)


def reliability(logits: Tensor, labels: Tensor) -> list[Bin]:
    """Sort photos by how confident their predictions are into NUM_BINS bins of equal width.

    Empty bins are left out.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    is_right = (predicted == labels).double()
    index = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    bins = []
    for i in range(NUM_BINS):
        inside = index == i
        count = int(inside.sum())
        if count:
            mean_confidence = confidence[inside].mean().item()
            bins.append(Bin(count, mean_confidence, is_right[inside].mean().item()))
    return bins


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error: how far accuracy is from confidence, by photos."""
    total = sum(each.num_photos for each in bins)
    return sum(each.num_photos * abs(each.accuracy - each.confidence) for each in bins) / total


def summarize(
    temperature: float | None, num_val: int, logits: Tensor, labels: Tensor
) -> dict[str, object]:
    """Return what summary.json says, from the test photos' final logits (n, C) and labels (n,)."""
    error = calibration_error(reliability(logits, labels))
    if temperature is None:
        return {"temperature": None, "test_calibration_error": error}
    before = calibration_error(reliability(logits * temperature, labels))
    return {
        "temperature": temperature,
        "val_photos": num_val,
        "test_calibration_error": error,
        "test_calibration_error_before": before,
    }
