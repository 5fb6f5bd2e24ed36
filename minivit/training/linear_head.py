"""The linear head: regularised logistic regression on what the head reads of a frozen model.

It is the baseline that fine-tuning must beat, and all that `--blocks none` trains.

Shapes: n photos, D numbers that the head reads of each, C classes, P problems solved together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Weights of the penalty to choose from, strongest first, for features of unit variance.
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
FOLDS = 5
MAX_ITERATIONS = 500
# Iterations end once a step changes no problem's loss by more than this.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class LinearHead:
    """Logits (n, C) are features (n, D) @ weight.T + bias."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    strength: float  # the weight of the penalty, chosen by cross-validation
    accuracy: float  # of the cross-validation: photos predicted by heads that had not seen them
    fold_of: Tensor  # (n,), the fold of each photo
    # (n, C), of each photo by the head that had not seen its fold, with the penalty of the lowest
    # loss: the one of the highest accuracy may be sure of what is wrong.
    held_out_logits: Tensor


def fit_linear_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    folds: int = FOLDS,
    class_weights: Tensor | None = None,
) -> LinearHead:
    """Fit a linear head to features, float32 (n, D), and labels (n,), on the features' device.

    With `class_weights` (C,), a photo counts as much as its class's weight says, in the fit and in
    the choice of the penalty. Of STRENGTHS it takes the one with which heads fitted to the other
    folds predict most photos right; of equal ones, that with the lowest loss.
    """
    mean = features.mean(0)
    scale = (features - mean).square().mean().sqrt().clamp(min=1e-12)
    inputs = (features - mean) / scale
    fold_of = assign_folds(labels, num_classes, folds)
    # One problem for each fold, which leaves out its photos, and a last one with all photos.
    problems = torch.arange(folds + 1, device=inputs.device)
    used = (fold_of != problems[:, None]).float()  # (P, n)
    photo_weights = torch.ones_like(inputs[:, 0])
    if class_weights is not None:
        photo_weights = class_weights[labels]

    best: tuple[float, float] = (-1.0, 0.0)
    lowest_loss = math.inf
    solution = inputs.new_zeros(folds + 1, inputs.shape[1] + 1, num_classes)
    for strength in STRENGTHS:
        # The solution of the stronger penalty is near, so that few iterations are needed.
        solution = solve(inputs, labels, used * photo_weights, strength, start=solution)
        logits = (with_ones(inputs) @ solution)[fold_of, torch.arange(len(labels))]
        is_right = (logits.argmax(1) == labels).float()
        accuracy = (is_right * photo_weights).mean().item()  # The weights have a mean of 1.
        loss = F.cross_entropy(logits, labels, weight=class_weights).item()
        if loss < lowest_loss:
            lowest_loss = loss
            held_out_logits = logits
        if (accuracy, -loss) > best:
            best = (accuracy, -loss)
            chosen = strength
            weight = solution[-1, :-1].T / scale
            bias = solution[-1, -1] - weight @ mean
    return LinearHead(weight, bias, chosen, best[0], fold_of, held_out_logits)


def assign_folds(labels: Tensor, num_classes: int, folds: int = FOLDS) -> Tensor:
    """Assign the photos (n,) to folds, of each class equally many to each fold.

    Photos are listed in the order of their names, so that photos of one series, whose names follow
    each other, fall into one fold.
    """
    fold_of = torch.empty_like(labels)
    for c in range(num_classes):
        indices = (labels == c).nonzero()[:, 0]
        count = len(indices)
        # Small classes begin with different folds, so that all folds are equally large.
        place = torch.arange(count, device=labels.device) * folds // max(folds, count) + c
        fold_of[indices] = place % folds
    return fold_of


def solve(inputs: Tensor, labels: Tensor, used: Tensor, strength: float, start: Tensor) -> Tensor:
    """Return the weights (P, D + 1, C) of logistic regression on the photos that each problem uses.

    `inputs` are (n, D) with mean 0; the last row of the weights is the bias, which is not
    penalised. `used` (P, n) is how much a photo counts in a problem, 0 if it is left out.

    This is Nesterov's gradient descent, restarted where the momentum points uphill
    (https://arxiv.org/abs/1204.3982). Each step is divided by a bound of the second derivative,
    X'X / 2n + strength (Boehning 1992, https://doi.org/10.1007/BF00048682), so it cannot overshoot.
    torch.optim.LBFGS would do, but like all its optimizers imports torch's compiler, for seconds.
    """
    X = with_ones(inputs)  # (n, D + 1)
    targets = F.one_hot(labels, start.shape[2]).to(X.dtype)
    share = used / used.sum(1, keepdim=True)  # (P, n), the weight of each photo in the mean
    penalty = torch.full((X.shape[1], 1), strength, device=X.device)
    penalty[-1] = 0.0
    curvature = 0.5 * X.T @ (share[:, :, None] * X)  # (P, D + 1, D + 1)
    bound = curvature + torch.diag(penalty[:, 0] + 1e-6)
    inverse_bound = torch.cholesky_inverse(torch.linalg.cholesky(bound))

    weights = start
    ahead = start  # the weights, moved on by their momentum
    t = 1.0
    for _ in range(MAX_ITERATIONS):
        errors = share[:, :, None] * ((X @ ahead).softmax(2) - targets)  # (P, n, C)
        gradient = X.T @ errors + penalty * ahead
        step = inverse_bound @ gradient
        previous = weights
        weights = ahead - step
        if (gradient * step).sum((1, 2)).max() < TOLERANCE:
            break
        is_uphill = (gradient * (weights - previous)).sum() > 0
        if is_uphill:
            t = 1.0
        next_t = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead = weights + (t - 1) / next_t * (weights - previous)
        t = next_t
    return weights


def with_ones(inputs: Tensor) -> Tensor:
    """Add a column of ones, which the bias is multiplied by."""
    return torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
