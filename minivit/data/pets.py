"""Oxford-IIIT Pet's listings, and its masks and head boxes on a patch grid. Without torch, for processes that read photos.

Shapes: P = gh x gw patches of a photo.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError

SPLITS = ("trainval", "test")  # as Oxford-IIIT Pet lists them


def read_listing(pets: Path, split: str) -> list[tuple[str, int, str]]:
    """Return the photos of "trainval" or "test": stem, label from 1 on, and whether it is a "cat" or a "dog".

    Raises UserError if the listing is not there, or holds anything else.
    """
    listing, found = pets / "annotations" / f"{split}.txt", []
    if not listing.is_file():
        raise UserError(f"{listing}: no such file; remove {pets} to have it downloaded again")
    for line in listing.read_text("utf-8", "backslashreplace").splitlines():
        if line.strip() and not line.startswith("#"):
            try:
                stem, label, species, _ = line.split()
                found.append((stem, int(label), "cat" if species == "1" else "dog"))
            except ValueError:
                raise UserError(
                    f"{listing}: expected lines as `Abyssinian_1 1 1 1`, found {line!r}"
                ) from None
    return found
