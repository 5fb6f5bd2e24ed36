"""The linear head: regularised logistic regression on what the head reads of a frozen model.

It is the baseline that fine-tuning must beat, and all that `--blocks none` trains.

Shapes: n photos, D numbers that the head reads of each, C classes, P problems solved together, A
principal axes of the photos.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..system.signals import stop_here
from .cuda_graph import CudaGraph

# Weights of the penalty to choose from, strongest first, for features of unit variance.
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)
FOLDS = 5
MAX_STEPS = 500
# A descent ends once a step changes no problem's loss by more than about this.
TOLERANCE = 1e-8
STEPS_PER_CHECK = 10
# For so many features, the CPU finds the principal axes before CUDA's library has started.
MOST_AXES_ON_CPU = 1024


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
    # One scale for all features: the model's final norm has given each its own.
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
    solutions = solve(inputs, labels, used * photo_weights, num_classes, STRENGTHS)
    for strength, solution in zip(STRENGTHS, solutions):
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
            weight = (solution[-1, :-1].T / scale).contiguous()  # Files need it so.
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


def solve(
    inputs: Tensor, labels: Tensor, used: Tensor, num_classes: int, strengths: Iterable[float]
) -> Iterator[Tensor]:
    """Yield for each strength the weights (P, D + 1, C) of regularised logistic regression.

    The last row of the weights is the bias, which is not penalised. `inputs` are (n, D), and `used`
    (P, n) is how much a photo counts in a problem, 0 if it is left out. Strong penalties come
    first: each solution is the start for the next one, which is near.
    """
    targets = F.one_hot(labels, num_classes)[:, None].to(inputs.dtype)  # (n, 1, C)
    # A problem that uses no photo at all has the solution 0.
    share = used / used.sum(1, keepdim=True).clamp(min=1e-12)
    # The weights are found in principal axes, of which few photos have only few. The curvature
    # along each axis, and along the bias, is at most the one with the largest share of each photo.
    largest_share = share.amax(0)
    mean = largest_share @ inputs / largest_share.sum()
    centred = inputs - mean
    scatter = centred.T @ (largest_share[:, None] * centred)
    scatter = scatter.double()
    if len(scatter) <= MOST_AXES_ON_CPU:
        scatter = scatter.cpu()
    squares, axes = torch.linalg.eigh(scatter)  # in increasing order
    num_axes = min(inputs.shape)
    squares = squares.to(inputs)
    axes = axes[:, -num_axes:].to(inputs)  # (D, A)
    curvature = 0.5 * torch.cat([squares[-num_axes:].clamp(min=0), share.new_ones(1)])
    positions = with_ones(centred @ axes)  # (n, A + 1)

    shares = share.T[:, :, None]  # (n, P, 1)

    def steps_from(bound: Tensor, penalty: Tensor, *state: Tensor) -> Descent:
        return take_steps(positions, targets, shares, bound, penalty, Descent(*state))

    weights = inputs.new_zeros(num_axes + 1, len(used), num_classes)
    ones = torch.ones_like(shares[0])  # (P, 1)
    state = Descent(weights, ahead=weights, t=ones, change=ones)
    steps: Callable[..., Descent] = steps_from
    if inputs.is_cuda:
        # The kernels are so small that launching them takes most of the time.
        steps = CudaGraph(steps_from, curvature, curvature, *state)
    for strength in strengths:
        penalty = torch.full_like(curvature, strength)
        penalty[-1] = 0.0
        # A small number more, because the curvature along the last axes may be 0.
        bound = curvature + penalty + 1e-6
        state = Descent(state.weights, ahead=state.weights, t=ones, change=ones)
        for _ in range(0, MAX_STEPS, STEPS_PER_CHECK):
            state = steps(bound, penalty, *state)
            stop_here()
            if state.change.max() < TOLERANCE:  # Here the host waits for a GPU.
                break
        of_inputs = torch.einsum("da,apc->pdc", axes, state.weights[:-1])
        bias = state.weights[-1] - mean @ of_inputs
        yield torch.cat([of_inputs, bias[:, None]], dim=1)


class Descent(NamedTuple):
    """How far a descent has come in each problem."""

    weights: Tensor  # (A + 1, P, C)
    ahead: Tensor  # (A + 1, P, C), the weights, moved on by their momentum
    t: Tensor  # (P, 1), of Nesterov's sequence
    change: Tensor  # (P, 1), about how much the last step changed the loss


def take_steps(
    X: Tensor, targets: Tensor, share: Tensor, bound: Tensor, penalty: Tensor, state: Descent
) -> Descent:
    """Take STEPS_PER_CHECK steps towards the weights that minimise the losses of all problems.

    `X` (n, A + 1) has orthogonal columns, `targets` are (n, 1, C) and `share` is (n, P, 1). Along
    each column, `penalty` (A + 1,) is the weight of the penalty, and `bound` (A + 1,) is the most
    that the second derivative of a loss with its penalty can be.

    This is Nesterov's gradient descent, restarted where the momentum points uphill
    (https://arxiv.org/abs/1204.3982). Each step is divided by the bound of Boehning 1992, half of
    X'X (https://doi.org/10.1007/BF00048682), and the penalty, so that it cannot overshoot.
    torch.optim.LBFGS would do, but like all its optimizers imports torch's compiler, for seconds.
    """
    bound = bound[:, None, None]
    penalty = penalty[:, None, None]
    num_problems = share.shape[1]
    weights, ahead, t, change = state
    for _ in range(STEPS_PER_CHECK):
        logits = (X @ ahead.flatten(1)).unflatten(1, (num_problems, -1))  # (n, P, C)
        errors = share * (logits.softmax(2) - targets)
        gradient = (X.T @ errors.flatten(1)).view_as(ahead) + penalty * ahead
        step = gradient / bound
        previous = weights
        weights = ahead - step
        change = (gradient * step).sum((0, 2))[:, None]
        uphill = (gradient * (weights - previous)).sum((0, 2))[:, None]
        t = torch.where(uphill > 0, 1.0, t)
        next_t = (1 + (1 + 4 * t * t).sqrt()) / 2
        ahead = weights + (t - 1) / next_t * (weights - previous)
        t = next_t
    return Descent(weights, ahead, t, change)


def with_ones(inputs: Tensor) -> Tensor:
    """Add a column of ones, which the bias is multiplied by."""
    return torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
