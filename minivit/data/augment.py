"""Augmentation on the device: a random flip, rotation and crop of each image, in one resampling.

Shapes: B images of a batch, h, w pixels of the model's input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROTATION = math.radians(10)
MIN_CROP = 0.8  # fraction of the image's side


def draw_augmentation(n: int, generator: torch.Generator) -> Tensor:
    """Draw one random flip, rotation and crop for each of n photos: (n, 5) numbers in [0, 1), for augment."""
    return torch.rand(n, 5, generator=generator)


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Flip, rotate by up to 10 degrees and crop images (B, 3, h, w) in one resampling, each by its own draws (B, 5).

    The crop keeps 80 to 100 per cent of each side; what a rotation leaves empty is filled by reflection.
    """
    B, _, h, w = images.shape
    flip, turn, scale, x, y = draws.to(images.device).unbind(1)
    flip = torch.where(flip < 0.5, -1.0, 1.0)
    turn = (2 * turn - 1) * MAX_ROTATION
    scale = MIN_CROP + (1 - MIN_CROP) * scale
    cos, sin, aspect = turn.cos() * scale, turn.sin() * scale, h / w
    theta = torch.zeros(
        B, 2, 3, device=images.device
    )  # from output to input coordinates, both -1 to 1
    theta[:, 0, 0], theta[:, 0, 1], theta[:, 0, 2] = (
        flip * cos,
        -sin * aspect,
        (2 * x - 1) * (1 - scale),
    )
    theta[:, 1, 0], theta[:, 1, 1], theta[:, 1, 2] = (
        flip * sin / aspect,
        cos,
        (2 * y - 1) * (1 - scale),
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
