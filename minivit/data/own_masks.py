"""Masks of one's own: `masks/` beside class folders or beside train/, with a PNG for each photo.

Only the measuring tools read these masks. Here is decided where they lie, and whether a folder
called masks is one of them or a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .folder import is_split_name, read_folder

MASKS_FOLDER = "masks"
HALF_GREY = 127  # Values above this are pet.
# A mask is black and white, but for its edges. Of this many files it is checked.
NUM_CHECKED = 8
BLACK_OR_WHITE = 0.9  # at least this fraction of the pixels
DARK, BRIGHT = 64, 191


def own_mask_paths(photo: Path) -> list[Path]:
    """Return where the mask of a photo in a class folder may lie: the first one goes first.

    A folder of masks beside class folders goes before one that lies beside train/ and test/.
    """
    parents = [photo.parents[1]]
    if is_split_name(photo.parents[1].name):
        parents.append(photo.parents[2])
    paths = []
    for parent in parents:
        masks = parent / MASKS_FOLDER
        paths += [masks / photo.parent.name / f"{photo.stem}.png", masks / f"{photo.stem}.png"]
    return paths


def own_mask_path(photo: Path) -> Path | None:
    """Return the mask of a photo in a class folder, if it has one."""
    return next((path for path in own_mask_paths(photo) if path.is_file()), None)


def check_own_masks(root: Path, photos: Iterable[Path]) -> None:
    """Raise UserError if a mask could be that of two photos, or lies outside of the data folder.

    `photos` are those of all splits in `root`. It can be train/ alone, with masks/ beside it.
    """
    first: dict[Path, Path] = {}
    clashes = []
    for photo in sorted(photos):  # so that all commands name the same photo first
        mask = own_mask_path(photo)
        if mask is None:
            continue
        if not mask.is_relative_to(root):
            raise UserError(
                f"{photo}: its mask {mask} lies outside of {root}; name the folder that holds "
                f"both with --data, or move the masks into {root / MASKS_FOLDER}"
            )
        if first.setdefault(mask, photo) != photo:
            clashes.append((mask, photo))
    if not clashes:
        return
    mask, photo = clashes[0]
    other = first[mask]
    # Each photo has a place of its own, beside the class folders of its split.
    place, place_of_other = own_mask_paths(photo)[0], own_mask_paths(other)[0]
    advice = f"move it to {place} or to {place_of_other}"
    if place == place_of_other:
        advice = "rename one of the photos"
    more = f" (and {len(clashes) - 1:,} more masks like it)" if len(clashes) > 1 else ""
    raise UserError(f"{photo}: its mask {mask} could also be that of {other}; {advice}{more}")


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
    if not _stems(contents.like_photos()) <= set().union(*stems.values()):
        return False
    for name in contents.folders:
        inner = read_folder(masks / name)
        if inner.folders or not _stems(inner.like_photos()) <= stems.get(name, set()):
            return False
    return is_folder_of_masks(masks)


def _stems(names: Iterable[str]) -> set[str]:
    return {Path(name).stem for name in names}


def is_folder_of_masks(folder: Path) -> bool:
    """Return whether a folder is called masks, and what lies in it and in its folders are masks.

    This is enough beside train/, where no class can lie.
    """
    if folder.name != MASKS_FOLDER:
        return False
    images: list[Path] = []
    try:
        for place in (folder, *(folder / name for name in read_folder(folder).folders)):
            images += [place / name for name in read_folder(place).like_photos()]
    except PermissionError:
        return False
    checked = images[:: max(1, len(images) // NUM_CHECKED)]
    return bool(images) and all(map(_is_black_and_white, checked))


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
