"""Prepare a photo for the models, the figure and the page, in worker processes without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError
from .photos import open_photo
from .preprocess import Preprocess

PAGE_SIDE = 1000  # pixels; the explorer shows a photo no larger
PIXELS_PER_INCH = 120  # of a figure
NO_PANEL = np.empty((0, 0, 3), np.uint8)
NO_PAGE = Image.new("RGB", (1, 1))


class PanelSize(NamedTuple):
    """How large a figure shows photos: so many square inches, and no side longer than `longest`."""

    area: float
    longest: float


LARGE = PanelSize(8.0, 6.0)
SMALL = PanelSize(1.8, 3.0)  # where each head has a panel


@dataclass(frozen=True)
class Needs:
    """What is prepared of each photo: the inputs of all models, and what the figure and page show.

    `grid` has the patches (gh, gw) of the last model, to one of which the query belongs.
    """

    preprocesses: Sequence[Preprocess]
    grid: tuple[int, int]
    query: tuple[float, float] | None = None  # x, y of a pixel; None: the class token
    panel: PanelSize | None = None  # None: there is no figure
    page: bool = False


@dataclass(frozen=True)
class Photo:
    """A photo, prepared for the models, the figure and the page."""

    size: tuple[int, int]  # of the whole photo, (W, H)
    panel: np.ndarray  # for the figure, uint8 (h, w, 3); empty if there is none
    page_image: Image.Image  # of one pixel if there is no page
    inputs: Sequence[np.ndarray]  # the pixels for each model, uint8 (3, height, width)
    query: int  # the token whose attention is shown


def read_photos(paths: Sequence[Path], needs: Needs) -> list[Photo | UserError]:
    """Read several photos, which a worker process sends together."""
    return [read_photo(path, needs) for path in paths]


def read_photo(path: Path, needs: Needs) -> Photo | UserError:
    """Open a photo and prepare it, or return the error that says why that is impossible."""
    try:
        return prepare_photo(open_photo(path), needs)
    except UserError as error:
        return error


def prepare_photo(photo: Image.Image, needs: Needs) -> Photo:
    """Prepare an open photo.

    Raises UserError if the last model does not see the pixel of the query.
    """
    size = photo.size
    token = 0  # the class token
    if needs.query is not None:
        token = 1 + needs.preprocesses[-1].patch_at(*needs.query, size, needs.grid)
    inputs = [preprocess.array(photo) for preprocess in needs.preprocesses]
    panel = NO_PANEL
    if needs.panel is not None:
        h, w = panel_shape(size, needs.panel)
        panel = np.asarray(photo.resize((w, h), Image.Resampling.LANCZOS, reducing_gap=2))
    page_image = NO_PAGE
    if needs.page:
        page_image = photo
        page_image.thumbnail((PAGE_SIDE, PAGE_SIDE))
    return Photo(size, panel, page_image, inputs, token)


def panel_shape(photo_size: tuple[int, int], limits: PanelSize = LARGE) -> tuple[int, int]:
    """Return the size (h, w) in pixels at which a figure shows a photo of (W, H).

    The aspect ratio is the photo's, up to 40:1.
    """
    W, H = photo_size
    ratio = min(max(W / H, 1 / 40), 40)
    width = math.sqrt(limits.area * ratio)
    height = math.sqrt(limits.area / ratio)
    scale = PIXELS_PER_INCH * min(1, limits.longest / max(width, height))
    return round(height * scale), round(width * scale)
