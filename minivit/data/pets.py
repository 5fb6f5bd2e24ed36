"""The layout of Oxford-IIIT Pet and its two listings.

This module does not import torch, so that processes that only read photos start quickly.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

PETS_FOLDER = "oxford-iiit-pet"  # as torchvision names it
SPLITS = ("trainval", "test")  # as Oxford-IIIT Pet names them


class ListedPet(NamedTuple):
    """One line of a listing."""

    stem: str  # the photo's file name without its suffix
    number: int  # of the breed, from 1 on
    species: str  # "cat" or "dog"


def read_listing(pets: Path, split: str) -> list[ListedPet]:
    """Read the listing of a split, "trainval" or "test".

    Raises UserError if the file is missing or contains a line that cannot be parsed.
    """
    listing = pets / "annotations" / f"{split}.txt"
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; remove {pets} to have it downloaded again")
    photos = []
    for line in listing.read_text("utf-8", "backslashreplace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        try:
            stem, number, species, _ = line.split()
            photos.append(ListedPet(stem, int(number), "cat" if species == "1" else "dog"))
        except ValueError:
            raise UserError(
                f"{listing}: expected lines like `Abyssinian_1 1 1 1`, found {line!r}"
            ) from None
    return photos
