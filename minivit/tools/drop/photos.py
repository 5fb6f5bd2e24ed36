"""Read photos, and decide which of their patches each condition shows.

This module does not import torch, so that worker processes start quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...data.preprocess import Preprocess
from ..score.masks import PetPhoto, read_pets
from .conditions import PatchSets, Shown, patch_sets, reason_to_leave_out, show_own


class DropPhoto(NamedTuple):
    """A photo that is taken, and what is shown of it."""

    pixels: np.ndarray  # uint8 (3, h, w)
    sets: PatchSets
    shown: dict[str, Shown]  # by condition, as far as it needs no other photo


def read_photos(
    paths: Sequence[Path], first: int, preprocess: Preprocess, grid: tuple[int, int], seed: int
) -> list[DropPhoto | str]:
    """Read photos, of which the first has the number `first` among all photos.

    In place of a photo that is not taken, the list has the reason.
    """
    results: list[DropPhoto | str] = []
    for number, photo in enumerate(read_pets(paths, preprocess, grid), start=first):
        if isinstance(photo, str):
            results.append(photo)
        else:
            # Each photo has a seed of its own, so that its patches are the same in any batch.
            results.append(choose_patches(photo, grid, np.random.default_rng([seed, number])))
    return results


def choose_patches(
    photo: PetPhoto, grid: tuple[int, int], rng: np.random.Generator
) -> DropPhoto | str:
    """Return the photo with what is shown of it, or the reason why it is not taken."""
    pet, background = photo.regions[0]
    sets = patch_sets(pet, background, grid)
    reason = reason_to_leave_out(sets)
    if reason:
        return reason
    return DropPhoto(photo.pixels, sets, show_own(sets, rng))
