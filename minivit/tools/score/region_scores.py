"""How maps fall on a region of the photo: mass, times chance, pointing, average precision."""

from __future__ import annotations

import torch
from torch import Tensor


def region_scores(maps: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """Say how maps (B, M, P) fall on a region: mass, times chance, pointing and average precision, float32 (B, M, 4).

    `inside` and `outside` (B, P) are the shares, 0 to 1, of each patch's area in the region and around it; the rest, a
    mask's border, counts as neither. Mass is the region's part of the map, 0 to 1; over the region's part of the area it
    is times chance: 1 for an even map. Pointing is 1 if the largest patch lies more inside than outside, else 0; of
    equals, their mean. Average precision, 0 to 1, is scikit-learn's of the map as a detector of the region, each pixel
    having its patch's value. A map of zeros counts as even. A region without area gives NaN.
    Sources: pointing, Zhang et al. 2016, https://arxiv.org/abs/1608.00507, without its tolerance of 15 pixels; average
    precision, https://scikit-learn.org/stable/modules/generated/sklearn.metrics.average_precision_score.html
    """
    inside, known = inside[:, None], (inside + outside)[:, None]  # (B, 1, P)
    total = (maps * known).sum(-1, keepdim=True)
    maps = maps.where(total > 0, 1)
    mass = (maps * inside).sum(-1) / (maps * known).sum(-1)
    times = mass / (inside.sum(-1) / known.sum(-1))
    candidates = maps.masked_fill(known == 0, -1)
    top = candidates == candidates.amax(-1, keepdim=True)
    pointing = (top & (inside > outside[:, None])).sum(-1) / top.sum(-1)
    ranked, order = maps.sort(-1, descending=True)
    step = torch.zeros_like(order)  # equal values are one step of the curve
    step[..., 1:] = (ranked[..., 1:] != ranked[..., :-1]).cumsum(-1)
    hits, found = (
        torch.zeros_like(maps).scatter_add(-1, step, w.expand_as(maps).gather(-1, order))
        for w in (inside, known)
    )
    precision = hits.cumsum(-1) / found.cumsum(-1).clamp(
        min=1e-12
    )  # before the first known patch, nothing is hit
    scores = torch.stack([mass, times, pointing, (hits * precision).sum(-1) / inside.sum(-1)], -1)
    return scores.where(inside.sum(-1)[..., None] > 0, torch.nan)
