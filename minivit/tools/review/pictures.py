"""The pictures in the page: small photos, and what spoke for the wrong answer and the right one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...attention import class_relevance, query_maps
from ...data.photos import PhotoError, open_photo
from ...figures.pages import data_url, encode_jpeg
from ...figures.panels import HEAT, overlay, value_range
from ...model import ViT
from ...system.progress import progress_bar
from ...system.workers import read_ahead


class Size(NamedTuple):
    """The longer side of a picture in pixels, and the most bytes that it takes."""

    side: int
    limit: int


# A page of 60 mistakes, 60 labels and 600 small photos stays below 20 MB even if all are noise.
LARGE = Size(280, 40_000)
SMALL = Size(128, 9_000)


def to_uri(picture: Image.Image, limit: int) -> str:
    """Return a picture as the data URI of a JPEG of at most `limit` bytes, if any quality does."""
    for quality in (80, 60, 40, 20):
        jpeg = encode_jpeg(picture, quality)
        if len(jpeg) <= limit:
            break
    return data_url(jpeg)


def shrink(photo: Image.Image, side: int) -> Image.Image:
    """Return a copy of a photo whose longer side has at most so many pixels."""
    small = photo.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def draw_photos(
    paths: Sequence[Path], indices: Collection[int], size: Size, workers: int
) -> dict[int, str]:
    """Return the data URI of some of the photos, or "" for one that can be read no more."""

    def draw(path: Path) -> str:
        try:
            photo = open_photo(path)
        except PhotoError:
            return ""
        return to_uri(shrink(photo, size.side), size.limit)

    return dict(zip(indices, read_ahead(draw, [paths[i] for i in indices], workers)))


def draw_maps(
    model: ViT, paths: Sequence[Path], answers: Sequence[int], labels: Sequence[int]
) -> list[tuple[str, str]]:
    """Return two data URIs for each photo: what spoke for the answer, and what for the label.

    Both are maps of relevance up to the last block over the photo.
    """
    pictures = []
    progress = progress_bar(paths, "maps", unit="photo")
    for path, answer, label in zip(progress, answers, labels):
        try:
            photo = open_photo(path)
        except PhotoError:
            pictures.append(("", ""))
            continue
        small = np.asarray(shrink(photo, LARGE.side))
        uris = []
        for values in relevance_maps(model, photo, [answer, label]):
            heat = model.preprocess.to_photo(values, photo.size, small.shape[:2])
            low, high = value_range([heat])
            picture = Image.fromarray(overlay(small, heat, low, high, HEAT))
            uris.append(to_uri(picture, LARGE.limit))
        pictures.append((uris[0], uris[1]))
    return pictures


def relevance_maps(model: ViT, photo: Image.Image, targets: Sequence[int]) -> Tensor:
    """Return a map (gh, gw) for each target class of what in the photo speaks for it."""
    image = model.preprocess(photo).to(model.cls_token.device)
    images = image.expand(len(targets), -1, -1, -1)
    last = model.config.depth - 1
    rows = class_relevance(model, images, torch.tensor(targets, device=images.device), [last])
    return query_maps(
        rows[last], model.config.grid, num_registers=model.config.num_registers
    ).float()
