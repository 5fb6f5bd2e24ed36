"""Oxford-IIIT Pet's masks and head boxes on a model's patch grid.

This module does not import torch, so that worker processes start quickly.
Shapes: P = gh x gw patches of a photo; W, H a photo's width and height in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ...data.photos import PhotoError, open_photo
from ...data.preprocess import Preprocess
from ...errors import UserError

# The values of a mask's pixels. The rest, 3, is the border, which belongs to neither.
PET = 1
BACKGROUND = 2


def read_pets(
    paths: Sequence[Path], preprocess: Preprocess, grid: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray] | str]:
    """Return the pixels, uint8 (3, h, w), and the regions (2, 2, P) of each photo (read_regions).

    In place of a photo that cannot be scored, the list has a string with the reason.
    """
    results: list[tuple[np.ndarray, np.ndarray] | str] = []
    for path in paths:
        try:
            photo = open_photo(path)
            pixels = preprocess.array(photo)
            results.append((pixels, read_regions(path, photo.size, preprocess, grid)))
        except PhotoError:
            results.append("photo cannot be read")
        except UserError as error:
            results.append(str(error))
    return results


def mask_path(photo: Path) -> Path:
    return photo.parents[1] / "annotations" / "trimaps" / f"{photo.stem}.png"


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Read the mask (H, W) of a photo of `size` (W, H).

    Raises UserError with the reason if there is no mask, or none of this size.
    """
    try:
        with Image.open(mask_path(path), formats=("PNG",)) as image:
            mask = np.asarray(image)
    except FileNotFoundError:
        raise UserError("mask missing") from None
    except Exception:  # Decoders may raise any exception for a broken file.
        raise UserError("mask cannot be read") from None
    if mask.shape != size[::-1]:
        raise UserError("mask not of the photo's size")
    return mask


def read_head_box(path: Path) -> list[float] | None:
    """Read the left, top, right and bottom of a photo's head box, in its pixels, if it has one."""
    xml = path.parents[1] / "annotations" / "xmls" / f"{path.stem}.xml"
    if not xml.is_file():
        return None
    text = xml.read_text("utf-8", "replace")
    edges = dict(re.findall(r"<([xy]m(?:in|ax))>\s*(\d+)", text)[:4])
    if len(edges) < 4:
        return None
    return [float(edges[name]) for name in ("xmin", "ymin", "xmax", "ymax")]


def read_regions(
    path: Path, size: tuple[int, int], preprocess: Preprocess, grid: tuple[int, int]
) -> np.ndarray:
    """Return the fraction of each patch's area in the pet, around it, in its head and around that.

    The result is float32 (2, 2, P): pet and head, inside and outside. `size` is the photo's
    (W, H). The border of the mask counts neither as pet nor as background. Without a head box, the
    head's fractions are 0. Raises UserError with the reason if the model sees no pet in the photo.
    """
    mask = read_mask(path, size)
    if not (mask == PET).any():
        raise UserError("no pet in the mask")
    left, top, right, bottom = preprocess.box(size)
    ys = np.linspace(top, bottom, grid[0] + 1)
    xs = np.linspace(left, right, grid[1] + 1)
    pet = mean_by_patch(mask == PET, ys, xs)
    background = mean_by_patch(mask == BACKGROUND, ys, xs)
    if not pet.any():
        raise UserError("pet outside of what the model sees")
    head = np.zeros(grid)
    around_head = np.zeros(grid)
    box = read_head_box(path)
    if box is not None:
        x_min, y_min, x_max, y_max = box
        head = np.outer(fraction_covered(ys, y_min, y_max), fraction_covered(xs, x_min, x_max))
        if head.any():
            around_head = 1 - head
    regions = np.stack([pet, background, head, around_head])
    return regions.reshape(2, 2, -1).astype(np.float32)


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


def fraction_covered(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return the fraction (g,) of each stretch between edges (g + 1,) that start to end covers."""
    low = edges[:-1]
    high = edges[1:]
    return (np.minimum(high, end) - np.maximum(low, start)).clip(0) / (high - low)
