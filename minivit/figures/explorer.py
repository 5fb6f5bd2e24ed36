"""The explorer: one HTML file in which each patch of a photo shows where it looks.

The page is laid out in explorer.html beside this file.
Shapes: L blocks, H heads, N tokens (1 class token, then the patches), P = gh x gw patches, Q query
rows (N or 1).
"""

from __future__ import annotations

import base64
import html
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image

from ..errors import UserError
from .pages import data_url, encode_jpeg, fill_template
from .text import shorten

TEMPLATE = Path(__file__).with_name("explorer.html")
MAX_BYTES = 3_000_000  # of a page: small enough to mail, and to keep one for every photo
MAX_NAME = 200  # characters of any name
# This leaves room for blocks 8-11 of ViT-B/16, which take 1.9 MB if they do not compress at all.
MAX_PHOTO_BYTES = 300_000


@dataclass(frozen=True)
class Pane:
    """What one model makes of the photo.

    `predictions` are (label, probability), the likeliest first, and empty for a model without a
    classifier. `attn` is {block: (H, Q, N)}. `methods` holds further maps by name, of the same
    blocks: (gh, gw) for the class token only, (N, N), or (H, Q, N). All are arrays or tensors of
    shares, 0 or more; relevance has no fixed sum, so take attention.shares of it. `box` is the part
    of the photo that the model sees, as Preprocess.box gives it. `comparison` says how far the
    photo is from the training photos, of which `nearest` has (label, name, image as a data URL).
    """

    name: str
    predictions: Sequence[tuple[str, float]]
    attn: Mapping[int, ArrayLike]
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    methods: Mapping[str, Mapping[int, ArrayLike]] = field(default_factory=dict)
    comparison: str = ""
    nearest: Sequence[tuple[str, str, str]] = ()


class Page(str):
    """An HTML page, which notebooks show in a frame without access to them or to the network."""

    def __repr__(self) -> str:
        # Notebooks save this beside the frame.
        return f"<Page of {len(self):,} bytes>"

    def _repr_html_(self) -> str:
        return (
            '<iframe title="attention explorer" sandbox="allow-scripts" '
            'style="width: 100%; height: 60rem; border: 0" '
            f'srcdoc="{html.escape(self)}"></iframe>'
        )


def explorer_page(panes: Sequence[Pane], photo: Image.Image, title: str) -> Page:
    """Return the page that shows a photo as one model sees it, or several models side by side.

    Each row is stored in 255 steps of its largest value. If that would make the page larger than
    MAX_BYTES, fewer steps or fewer rows are stored, and the page says so. Raises UserError for maps
    that do not fit their grid or are not finite shares, and for panes whose blocks or methods
    differ.
    """
    all_maps = [_read_maps(pane) for pane in panes]
    if len({(*sorted(pane.attn), *maps) for pane, maps in zip(panes, all_maps)}) != 1:
        raise UserError("expected one pane or more, all of the same blocks and methods")
    data = {
        "title": shorten(title, MAX_NAME),
        "size": photo.size,
        "photo": data_url(_jpeg(photo)),
        "blocks": sorted(panes[0].attn),
    }
    for levels, description, kept in _plans(all_maps):
        # Even in 15 steps, maps compress to a third at best, so larger ones could not fit.
        if sum(stack.size for maps in kept for stack in maps.values()) > 5 * MAX_BYTES:
            continue
        data["stored"] = (
            f"{description}; rows are rounded to {levels} steps of their largest value."
        )
        data["panes"] = [_pane(pane, maps, levels, photo.size) for pane, maps in zip(panes, kept)]
        page = fill_template(TEMPLATE, data)
        if len(page) <= MAX_BYTES:
            break
    return Page(page)


def _read_maps(pane: Pane) -> dict[str, np.ndarray]:
    """Return each method's maps as float32 (L, H, Q, P), without the share of the class token."""
    stacks = {}
    for method, blocks in {"attention": pane.attn, **pane.methods}.items():
        if not blocks or blocks.keys() != pane.attn.keys():
            raise UserError(
                f"{method}: expected maps of the blocks of attn, {sorted(pane.attn)}, "
                f"found {sorted(blocks)}"
            )
        tensors = [torch.as_tensor(blocks[block]) for block in sorted(blocks)]
        maps = [tensor.detach().float().cpu().numpy() for tensor in tensors]
        stacks[method] = _stack(method, maps, pane.grid)
    return stacks


def _stack(method: str, maps: list[np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    gh, gw = grid
    N = 1 + gh * gw
    shapes = {array.shape if array.ndim == 3 else (1, *array.shape) for array in maps}
    shape = next(iter(shapes))
    patches_only = shape == (1, gh, gw)
    whole_rows = len(shape) == 3 and shape[1] in (1, N) and shape[2] == N
    if len(shapes) > 1 or not (patches_only or whole_rows):
        raise UserError(
            f"{method}: found maps of {', '.join(map(str, sorted(shapes)))}, "
            f"expected one shape for all blocks, of {gh} x {gw} patches and a class token"
        )
    stack = np.stack(maps)
    if not np.isfinite(stack).all() or stack.min() < 0:
        raise UserError(f"{method}: expected finite shares of at least 0")
    if patches_only:
        return stack.reshape(len(maps), 1, 1, gh * gw)
    return stack.reshape(len(maps), *shape)[..., 1:]


def _plans(
    all_maps: list[dict[str, np.ndarray]],
) -> Iterator[tuple[int, str, list[dict[str, np.ndarray]]]]:
    """Yield what to store, in the order to try: steps, a description and each pane's maps."""
    for levels in (255, 100, 40, 15):
        yield levels, "All heads and patches are stored", all_maps
    yield (
        255,
        "Only the mean of the heads is stored (choose fewer blocks to store each head)",
        [{name: a.mean(1, keepdims=True) for name, a in maps.items()} for maps in all_maps],
    )
    yield (
        255,
        "Only the class token's rows are stored (choose fewer blocks to store the patches' rows)",
        [{name: a[:, :, :1] for name, a in maps.items()} for maps in all_maps],
    )


def _pane(pane: Pane, maps: dict[str, np.ndarray], levels: int, size: tuple[int, int]) -> dict:
    """Return a pane for JSON.

    Its `maps` are base64 of deflated bytes: first the step of every row (float32), then all codes
    (uint8).
    """
    steps = []
    codes = []
    for stack in maps.values():
        step = stack.max(3, keepdims=True) / np.float32(levels)
        steps.append(step.astype("<f4").tobytes())
        codes.append(np.rint(stack / np.maximum(step, 1e-30)).astype(np.uint8).tobytes())
    packed = zlib.compress(b"".join(steps + codes), 3)
    return {
        "name": shorten(pane.name, MAX_NAME),
        "predictions": [
            (shorten(label, MAX_NAME), round(float(p), 6)) for label, p in pane.predictions
        ],
        "comparison": pane.comparison,
        "nearest": [
            (shorten(label, MAX_NAME), shorten(name, MAX_NAME), image)
            for label, name, image in pane.nearest
        ],
        "grid": pane.grid,
        # As fractions of the photo's width and height.
        "box": [edge / side for edge, side in zip(pane.box, size * 2)],
        "methods": [
            {"name": shorten(method, MAX_NAME), "heads": stack.shape[1], "queries": stack.shape[2]}
            for method, stack in maps.items()
        ],
        "maps": base64.b64encode(packed).decode(),
    }


def _jpeg(photo: Image.Image) -> bytes:
    """Return a photo as a JPEG of at most MAX_PHOTO_BYTES."""
    for side, quality in ((1000, 88), (1000, 70), (640, 50)):  # Only noise needs the last.
        shrink = min(1, side / max(photo.size))
        size = [max(1, round(length * shrink)) for length in photo.size]
        small = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        jpeg = encode_jpeg(small, quality)
        if len(jpeg) <= MAX_PHOTO_BYTES:
            break
    return jpeg
