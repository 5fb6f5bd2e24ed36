"""Masks and head boxes on a model's patch grid: Oxford-IIIT Pet's, and masks of one's own.

This module does not import torch, so that worker processes start quickly.
Shapes: P = gh x gw patches of a photo; W, H a photo's width and height in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from ...data.own_masks import HALF_GREY, own_mask_path, read_grey
from ...data.photos import PhotoError, open_photo
from ...data.preprocess import Preprocess
from ...errors import UserError

# The values of a mask's pixels.
PET = 1
BACKGROUND = 2
BORDER = 3  # This counts neither as pet nor as background.


class PetPhoto(NamedTuple):
    """What is read of one photo to score maps of it."""

    pixels: np.ndarray  # uint8 (3, h, w)
    regions: np.ndarray  # float32 (2, 2, P): pet and head, inside and outside
    head_problem: str  # why its head box cannot be used; "" if it can, or if there is none


def read_pets(
    paths: Sequence[Path], preprocess: Preprocess, grid: tuple[int, int]
) -> list[PetPhoto | str]:
    """Read photos and their regions.

    In place of a photo that cannot be scored, the list has a string with the reason.
    """
    results: list[PetPhoto | str] = []
    for path in paths:
        try:
            results.append(read_pet(path, preprocess, grid))
        except PhotoError:
            results.append("photo cannot be read")
        except UserError as error:
            results.append(str(error))
    return results


def read_pet(path: Path, preprocess: Preprocess, grid: tuple[int, int]) -> PetPhoto:
    """Read one photo and its regions.

    Raises PhotoError if the photo cannot be read, and UserError with the reason if its mask cannot
    be used. Without a head box that can be used, the photo is scored on the pet alone.
    """
    photo = open_photo(path)
    edges = patch_edges(preprocess.box(photo.size), grid)
    pet = read_pet_region(path, photo.size, edges)
    head_problem = ""
    try:
        head = read_head_region(path, photo.size, edges)
    except UserError as error:
        head = np.zeros_like(pet)
        head_problem = str(error)
    return PetPhoto(preprocess.array(photo), np.stack([pet, head]), head_problem)


def mask_path(photo: Path) -> Path:
    """Return the file of a photo's mask: Oxford-IIIT Pet's, or one of the user's own.

    Without any, returns where Oxford-IIIT Pet's would be.
    """
    trimap = photo.parents[1] / "annotations" / "trimaps" / f"{photo.stem}.png"
    own = own_mask_path(photo)
    if own is None or trimap.is_file():
        return trimap
    return own


def head_box_path(photo: Path) -> Path:
    return photo.parents[1] / "annotations" / "xmls" / f"{photo.stem}.xml"


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read the mask (H, W) of a photo of `size` (W, H), in Oxford-IIIT Pet's values.

    Raises UserError with the reason if there is no mask, or if it has another size, or if it is
    Oxford-IIIT Pet's and has other values than these.
    """
    file = mask_path(path)
    if not file.is_file():
        raise UserError("mask missing")
    is_own = file == own_mask_path(path)
    try:
        if is_own:
            mask = np.where(read_grey(file) > HALF_GREY, PET, BACKGROUND)
        else:
            with Image.open(file, formats=("PNG",)) as image:
                mask = np.asarray(image)
    except Exception:  # Decoders may raise any exception for a broken file.
        raise UserError("mask cannot be read") from None
    if mask.shape[:2] != size[::-1]:
        raise UserError("mask not of the photo's size")
    if is_own and not (mask == PET).any():
        raise UserError("mask with nothing above half grey, which is the pet")
    if mask.ndim != 2 or mask.min() < PET or mask.max() > BORDER:
        raise UserError("mask with values other than 1, 2 and 3")
    return mask


def read_head_mask(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """Read the head boxes of a photo of `size` (W, H) as a boolean mask (H, W), if it has any.

    If there are several pets in the photo, each head has a box. Oxford-IIIT Pet counts pixels from
    1, and the last row and column belong to the box. Raises UserError with the reason if the boxes
    cannot be used.
    """
    if not head_box_path(path).is_file():
        return None
    W, H = size
    mask = np.zeros((H, W), bool)
    try:
        annotation = ElementTree.parse(head_box_path(path))
        sizes = [_read_pixels(each, "width", "height") for each in annotation.iter("size")]
        boxes = [
            _read_pixels(box, "xmin", "ymin", "xmax", "ymax") for box in annotation.iter("bndbox")
        ]
    except (ElementTree.ParseError, OSError, LookupError, ValueError, OverflowError):
        raise UserError("head box cannot be read") from None
    if sizes not in ([], [[W, H]]):
        raise UserError("head box for another size of the photo")
    for x_min, y_min, x_max, y_max in boxes:
        box = mask[max(y_min, 1) - 1 : y_max, max(x_min, 1) - 1 : x_max]
        if box.size == 0 or x_max < 1 or y_max < 1:
            raise UserError("head box without an area in the photo")
        box[:] = True
    return mask if boxes else None


def _read_pixels(element: ElementTree.Element, *names: str) -> list[int]:
    """Return whole numbers of pixels from an element's children; raises ValueError if any lacks."""
    return [round(float(element.findtext(name, ""))) for name in names]


def patch_edges(
    box: tuple[float, float, float, float], grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges ys (gh + 1,) and xs (gw + 1,) of the patches of what the model sees.

    `box` is that part of the photo: left, top, right and bottom, in the photo's pixels.
    """
    left, top, right, bottom = box
    ys = np.linspace(top, bottom, grid[0] + 1)
    xs = np.linspace(left, right, grid[1] + 1)
    return ys, xs


def read_pet_region(
    path: Path, size: tuple[int, int], edges: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the fraction of each patch's area in the pet, and around it: float32 (2, P).

    `size` is the photo's (W, H). The border of the mask counts neither as pet nor as background.
    Raises UserError with the reason if the model sees no pet in the photo.
    """
    mask = read_mask(path, size)
    if not (mask == PET).any():
        raise UserError("no pet in the mask")
    pet = mean_by_patch(mask == PET, *edges)
    if not pet.any():
        raise UserError("pet outside of what the model sees")
    background = mean_by_patch(mask == BACKGROUND, *edges)
    return np.stack([pet, background]).reshape(2, -1).astype(np.float32)


def read_head_region(
    path: Path, size: tuple[int, int], edges: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the fraction of each patch's area in the head boxes, and around: float32 (2, P).

    All are 0 if there is no head box, or none that the model sees. Raises UserError with the reason
    if the head boxes cannot be used.
    """
    num_patches = (len(edges[0]) - 1) * (len(edges[1]) - 1)
    region = np.zeros((2, num_patches), np.float32)
    mask = read_head_mask(path, size)
    if mask is None:
        return region
    head = mean_by_patch(mask, *edges).ravel()
    if head.any():
        region[0] = head
        region[1] = 1 - region[0]
    return region


def mean_by_patch(mask: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Average a mask (H, W) over patches with edges ys (gh + 1,) and xs (gw + 1,): (gh, gw).

    Two matrix products would do the same, but NumPy's threads for them would take cores from the
    workers that decode photos.
    """
    by_row = mean_between(mask, ys)  # (gh, W)
    return mean_between(by_row.T, xs).T


def mean_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Average rows (n, m) from each edge (g + 1,) to the next: (g, m). Edges may cut rows."""
    whole_rows = np.minimum(edges.astype(int), len(values) - 1)
    sums = np.pad(values.cumsum(0, dtype=np.float64), ((1, 0), (0, 0)))
    sums_to_edges = sums[whole_rows] + (edges - whole_rows)[:, None] * values[whole_rows]
    return np.diff(sums_to_edges, axis=0) / np.diff(edges)[:, None]
