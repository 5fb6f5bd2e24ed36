"""Augment images on the device: a random flip, rotation and crop in a single resampling.

Shapes: B images of a batch; h, w pixels of the model's input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROTATION = math.radians(10)
MIN_CROP = 0.8  # fraction of the image's side


def draw_augmentation(n: int, generator: torch.Generator) -> Tensor:
    """Draw the random numbers that augment() takes for n photos: (n, 5), each in [0, 1)."""
    return torch.rand(n, 5, generator=generator)


def augment(images: Tensor, draws: Tensor) -> Tensor:
    """Flip, rotate and crop images (B, 3, h, w), each as its own row of `draws` (B, 5) says.

    Half of the images are flipped, the rotation is at most 10 degrees either way, and the crop
    keeps 80 to 100% of each side. Reflection fills the corners that a rotation leaves empty.
    """
    if images.device.type == "mps":
        # torch samples with reflection there in some versions only.
        return augment(images.cpu(), draws.cpu()).to(images.device)
    h, w = images.shape[-2:]
    flip_draw, angle_draw, size_draw, x_draw, y_draw = draws.to(images.device).unbind(1)
    flip = torch.where(flip_draw < 0.5, -1.0, 1.0)
    angle = (2 * angle_draw - 1) * MAX_ROTATION
    size = MIN_CROP + (1 - MIN_CROP) * size_draw
    cos = angle.cos() * size
    sin = angle.sin() * size
    # A crop of this size can move by so much before it leaves the image.
    x_shift = (2 * x_draw - 1) * (1 - size)
    y_shift = (2 * y_draw - 1) * (1 - size)

    # For each output pixel (x, y), the matrix says which input point to sample:
    #     x_in = x_from_x * x + x_from_y * y + x_shift,    and y_in likewise.
    # Coordinates run from -1 to 1 along both sides. A rotation is only a rotation in pixels, so
    # the entries that mix x and y are corrected by the aspect ratio.
    aspect = h / w
    x_from_x = flip * cos
    x_from_y = -sin * aspect
    y_from_x = flip * sin / aspect
    y_from_y = cos
    x_row = torch.stack([x_from_x, x_from_y, x_shift], dim=1)
    y_row = torch.stack([y_from_x, y_from_y, y_shift], dim=1)
    matrices = torch.stack([x_row, y_row], dim=1)  # (B, 2, 3)

    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
