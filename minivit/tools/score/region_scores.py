"""Scores for how maps fall on a region: mass, times chance, pointing and average precision.

Shapes: B photos, M maps of each, P patches.
"""

from __future__ import annotations

import torch
from torch import Tensor


def region_scores(maps: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """Return the four scores of maps (B, M, P) for a region, float32 (B, M, 4).

    `inside` and `outside` (B, P) are the fractions, 0 to 1, of each patch's area that lie in the
    region and around it. The rest, the border of a mask, counts as neither. The scores are:

    - mass: the region's share of the map's sum, 0 to 1;
    - times chance: mass divided by the region's share of the area, so that an even map gets 1;
    - pointing: 1 if the patch with the largest value lies more inside than outside, else 0;
      if several patches share the largest value, their mean;
    - average precision, 0 to 1: scikit-learn's, for the map as a detector of the region's pixels,
      where each pixel has the value of its patch.

    A map of zeros is treated as an even map. For a region without area, all scores are NaN.
    Sources: pointing, Zhang et al. 2016, https://arxiv.org/abs/1608.00507, without its tolerance
    of 15 pixels; average precision,
    https://scikit-learn.org/stable/modules/generated/sklearn.metrics.average_precision_score.html
    """
    inside = inside[:, None]  # (B, 1, P)
    outside = outside[:, None]
    known = inside + outside
    sums = (maps * known).sum(-1, keepdim=True)
    maps = maps.where(sums > 0, 1)

    mass = (maps * inside).sum(-1) / (maps * known).sum(-1)
    chance = inside.sum(-1) / known.sum(-1)
    candidates = maps.masked_fill(known == 0, -1)
    largest = candidates == candidates.amax(-1, keepdim=True)
    pointing = (largest & (inside > outside)).sum(-1) / largest.sum(-1)
    precision = average_precision(maps, inside, known)
    scores = torch.stack([mass, mass / chance, pointing, precision], -1)
    return scores.where(inside.sum(-1, keepdim=True) > 0, torch.nan)


def average_precision(maps: Tensor, inside: Tensor, known: Tensor) -> Tensor:
    """Return the average precision (B, M) of maps (B, M, P) as detectors of `inside` (B, 1, P)."""
    ranked, order = maps.sort(-1, descending=True)
    # Equal values share a threshold, and so make one step of the precision-recall curve.
    step = torch.zeros_like(order)
    step[..., 1:] = (ranked[..., 1:] != ranked[..., :-1]).cumsum(-1)
    hits = sum_by_step(inside.expand_as(maps).gather(-1, order), step)
    detected = sum_by_step(known.expand_as(maps).gather(-1, order), step)
    # The first steps may detect nothing but border. Then there are no hits to divide either.
    precision = hits.cumsum(-1) / detected.cumsum(-1).clamp(min=1e-12)
    return (hits * precision).sum(-1) / inside.sum(-1)


def sum_by_step(areas: Tensor, step: Tensor) -> Tensor:
    return torch.zeros_like(areas).scatter_add(-1, step, areas)
