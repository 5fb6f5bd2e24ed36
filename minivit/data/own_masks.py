"""Masks of one's own: `masks/` beside class folders, with a PNG for each photo.

Only the measuring tools read these masks. Here is decided where they lie, and whether a folder
called masks is one of them or a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .folder import read_folder

MASKS_FOLDER = "masks"
HALF_GREY = 127  # Values above this are pet.
# A mask is black and white, but for its edges. Of this many files it is checked.
NUM_CHECKED = 8
BLACK_OR_WHITE = 0.9  # at least this fraction of the pixels
DARK, BRIGHT = 64, 191


def own_mask_paths(photo: Path) -> tuple[Path, Path]:
    """Return where the mask of a photo in a class folder may lie: the first one goes first."""
    masks = photo.parents[1] / MASKS_FOLDER
    name = f"{photo.stem}.png"
    return masks / photo.parent.name / name, masks / name


def check_own_masks(photos: Iterable[Path]) -> None:
    """Raise UserError if a mask could be that of two photos; `photos` are those of all splits."""
    first: dict[Path, Path] = {}
    for photo in photos:
        mask = next((path for path in own_mask_paths(photo) if path.is_file()), None)
        if mask is None:
            continue
        other = first.setdefault(mask, photo)
        if other != photo:
            advice = "rename one of the photos"
            if other.parent != photo.parent:
                advice = f"put it into {MASKS_FOLDER}/{photo.parent.name}/ or the other's folder"
            raise UserError(f"{photo}: its mask {mask} could also be that of {other}; {advice}")


def holds_masks(folder: Path, class_folders: Sequence[str]) -> bool:
    """Return whether `folder`/masks holds masks of the photos in class folders beside it.

    Each image in it must have the name of a photo, and must be black and white, since a class could
    be called masks, too.
    """
    masks = folder / MASKS_FOLDER
    stems: dict[str, set[str]] = {}
    for name in class_folders:
        if name != MASKS_FOLDER:
            stems[name] = {Path(photo).stem for photo in read_folder(folder / name).photos}
    contents = read_folder(masks)
    found = [masks / name for name in contents.like_photos()]
    if not {path.stem for path in found} <= set().union(*stems.values()):
        return False
    for name in contents.folders:
        inner = read_folder(masks / name)
        of_class = [masks / name / image for image in inner.like_photos()]
        if inner.folders or not {path.stem for path in of_class} <= stems.get(name, set()):
            return False
        found += of_class
    checked = found[:: max(1, len(found) // NUM_CHECKED)]
    return bool(found) and all(map(_is_black_and_white, checked))


def _is_black_and_white(path: Path) -> bool:
    try:
        values = read_grey(path)
    except Exception:  # Decoders may raise any exception for a broken file.
        return False
    return ((values < DARK) | (values > BRIGHT)).mean() >= BLACK_OR_WHITE


def read_grey(path: Path) -> np.ndarray:
    """Read a mask (H, W) as grey values from 0 to 255; what is transparent is black.

    Raises ValueError if it is in colour, OSError if it cannot be read, and what a decoder raises.
    """
    with Image.open(path, formats=("PNG",)) as image:
        if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
            return (np.asarray(image) // 257).astype(np.uint8)
        rgba = np.asarray(image.convert("RGBA"))
    if np.ptp(rgba[..., :3], axis=2).max() > 0:
        raise ValueError(f"{path}: expected grey values")
    return np.where(rgba[..., 3] > HALF_GREY, rgba[..., 0], 0).astype(np.uint8)
