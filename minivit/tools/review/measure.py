"""Read every photo once, and compute all that the parts of a review share.

Shapes: n photos that can be read, B of a batch, D numbers that the head reads, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...data.photos import PhotoError, open_photo
from ...errors import UserError
from ...model import ViT
from ...system.device import eval_batch
from ...system.progress import progress_bar
from ...system.workers import read_ahead
from ..doctor import file_md5, make_thumbnail


@dataclass(frozen=True)
class Measured:
    """What reading the photos shows. All but `unreadable` is of the n photos that can be read.

    A photo takes a few kB, mostly for its features; its pixels are not kept.
    """

    readable: list[int]  # indices into the paths that were given
    unreadable: dict[int, str]  # the reason for each of the others
    features: Tensor  # (n, D), what the head reads of the base
    logits: Tensor  # (n, C), the run's
    # By these two, copies are told.
    md5s: list[str]
    thumbnails: list[Image.Image]


@dataclass(frozen=True)
class ReadPhoto:
    """One photo: the pixels that the model sees, uint8 (3, h, w), and what tells its copies."""

    index: int
    pixels: np.ndarray
    md5: str
    thumbnail: Image.Image


@torch.no_grad()
def measure(
    model: ViT, base: ViT, cut: int, paths: Sequence[Path], workers: int, amp: torch.dtype | None
) -> Measured:
    """Read the photos, and run the run's model and its base on them.

    Both have the same weights before the cut, the first block that the run trained, so that these
    blocks run only once. Raises UserError if no photo can be read.
    """
    device = model.cls_token.device
    unreadable: dict[int, str] = {}

    def read(item: tuple[int, Path]) -> ReadPhoto | None:
        index, path = item
        try:
            photo = open_photo(path)
        except PhotoError as error:
            unreadable[index] = str(error)
            return None
        pixels = model.preprocess.array(photo)
        return ReadPhoto(index, pixels, file_md5(path), make_thumbnail(photo))

    progress = progress_bar(paths, unit="photo")
    photos = filter(None, read_ahead(read, enumerate(progress), workers))
    readable: list[int] = []
    md5s: list[str] = []
    thumbnails: list[Image.Image] = []
    features: list[Tensor] = []
    logits: list[Tensor] = []
    size = eval_batch(device, 1, 1, amp)
    while batch := list(itertools.islice(photos, size)):
        pixels = torch.from_numpy(np.stack([photo.pixels for photo in batch]))
        images = model.preprocess.normalize(pixels.to(device))
        tokens = model.tokens(images, stop=cut, only_read=True)
        features.append(base.head_inputs(tokens, start=cut).float().cpu())
        logits.append(model.logits(tokens, start=cut).float().cpu())
        readable += [photo.index for photo in batch]
        md5s += [photo.md5 for photo in batch]
        thumbnails += [photo.thumbnail for photo in batch]
    if not readable:
        raise UserError(f"none of the {len(paths)} photos can be read ({unreadable[0]})")
    return Measured(readable, unreadable, torch.cat(features), torch.cat(logits), md5s, thumbnails)
