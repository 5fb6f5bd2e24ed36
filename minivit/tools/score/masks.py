"""Masks and head boxes of Oxford-IIIT Pet on a model's patch grid. Without torch, for workers that decode photos.

Shapes: P = gh x gw patches of a photo.
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


def read_pets(
    paths: Sequence[Path], preprocess: Preprocess, grid: tuple[int, int]
) -> list[tuple[np.ndarray, np.ndarray] | str]:
    """Return photos' pixels, uint8 (3, h, w), and regions (2, 2, P), see read_regions; for one without them, why."""
    found: list[tuple[np.ndarray, np.ndarray] | str] = []
    for path in paths:
        try:
            photo = open_photo(path)
            found.append(
                (preprocess.array(photo), read_regions(path, photo.size, preprocess, grid))
            )
        except PhotoError:
            found.append("photo cannot be read")
        except UserError as error:
            found.append(str(error))
    return found


def annotation(path: Path, folder: str, suffix: str) -> Path:
    return path.parents[1] / "annotations" / folder / f"{path.stem}{suffix}"


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return the mask (H, W) of a photo of `size` (W, H): 1 is the pet, 2 around it. Raises UserError, saying why, if none."""
    try:
        with Image.open(annotation(path, "trimaps", ".png"), formats=("PNG",)) as image:
            mask = np.asarray(image)
    except FileNotFoundError:
        raise UserError("mask missing") from None
    except Exception:  # decoders of broken files raise anything
        raise UserError("mask cannot be read") from None
    if mask.shape != size[::-1]:
        raise UserError("mask not of the photo's size")
    return mask


def read_regions(
    path: Path, size: tuple[int, int], preprocess: Preprocess, grid: tuple[int, int]
) -> np.ndarray:
    """Return what share of each patch's area lies in and around the pet, and in and around its head: float32 (2, 2, P).

    `size` is the photo's (W, H). The mask's border counts as neither; without a head box its shares are 0. Raises
    UserError, saying why, where there is no pet to look at in what the model sees of the photo.
    """
    mask = read_mask(path, size)
    (gh, gw), (left, top, right, bottom) = grid, preprocess.box(size)
    ys, xs = np.linspace(top, bottom, gh + 1), np.linspace(left, right, gw + 1)
    pet, around = (mean_by_area(mask == value, ys, xs) for value in (1, 2))
    if not pet.any():
        raise UserError(
            "no pet in the mask" if not (mask == 1).any() else "pet outside of what the model sees"
        )
    head = np.zeros((2, gh, gw))
    xml = annotation(path, "xmls", ".xml")
    box = (
        dict(re.findall(r"<([xy]m(?:in|ax))>\s*(\d+)", xml.read_text("utf-8", "replace"))[:4])
        if xml.is_file()
        else {}
    )
    if len(box) == 4:
        x0, y0, x1, y1 = (float(box[edge]) for edge in ("xmin", "ymin", "xmax", "ymax"))
        inside = np.outer(covered(ys, y0, y1), covered(xs, x0, x1))
        head = np.stack([inside, 1 - inside]) if inside.any() else head
    return np.stack([[pet, around], head]).reshape(2, 2, -1).astype(np.float32)


def mean_by_area(mask: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Average a mask (H, W) over patches, whose edges ys (gh + 1,) and xs (gw + 1,) may cut through pixels: (gh, gw)."""
    for edges in (
        ys,
        xs,
    ):  # not by matrix products, whose threads would be in the way of those that decode
        whole = np.minimum(edges.astype(int), len(mask) - 1)
        up_to = (
            np.pad(mask.cumsum(0, dtype=np.float64), ((1, 0), (0, 0)))[whole]
            + (edges - whole)[:, None] * mask[whole]
        )
        mask = (np.diff(up_to, axis=0) / np.diff(edges)[:, None]).T
    return mask


def covered(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return the share (g,) of each stretch between edges (g + 1,) that an interval covers."""
    low, high = edges[:-1], edges[1:]
    return (np.minimum(high, end) - np.maximum(low, start)).clip(0) / (high - low)
