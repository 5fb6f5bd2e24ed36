"""The explorer: one HTML file, laid out in report.html beside this one, in which a photo's patches show where they look.

Shapes: L blocks, H heads, N tokens (1 class token, then the patches), P = gh x gw patches, Q query rows: N, or 1.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image

from ..errors import UserError
from ..system.files import whole_file
from .plots import shorten

MAX_BYTES = 3_000_000  # of a page: small enough to mail, and to keep one for every photo
MAX_NAME = 200  # characters of what is called something
MAX_PHOTO_BYTES = (
    300_000  # leaves 1.9 MB to the attention: blocks 8-11 of ViT-B/16, however little they compress
)
# Tried in turn until the page fits: steps that each row is stored in, and what is kept of maps (L, H, Q, P).
_PLANS = (
    *((levels, "every head and patch", lambda a: a) for levels in (255, 100, 40, 15)),
    (
        255,
        "the mean of the heads; fewer blocks would leave room for each",
        lambda a: a.mean(1, keepdims=True),
    ),
    (
        255,
        "the class token's rows; fewer blocks would leave room for the patches'",
        lambda a: a[:, :, :1],
    ),
)


@dataclass(frozen=True)
class Pane:
    """What one model makes of the photo.

    `predictions` are (label, probability), the likeliest first; none for a model without a head. `attn` is
    {block: (H, Q, N)}; `methods` has further maps by name, of the same blocks: (gh, gw) for the class token only, (N, N),
    or (H, Q, N). All are shares of at least 0, arrays or tensors; relevance has no fixed sum, so take attention.shares of
    it. `box` is what the model sees of the photo, as Preprocess.box gives it: left, top, right, bottom in its pixels.
    """

    name: str
    predictions: Sequence[tuple[str, float]]
    attn: Mapping[int, ArrayLike]
    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    methods: Mapping[str, Mapping[int, ArrayLike]] = field(default_factory=dict)


class Page(str):
    """A page of HTML, which notebooks show in a frame that reaches neither them nor the network."""

    def __repr__(self) -> str:  # notebooks keep this too
        return f"<Page of {len(self):,} bytes>"

    def _repr_html_(self) -> str:
        frame = 'title="attention explorer" sandbox="allow-scripts" style="width: 100%; height: 60rem; border: 0"'
        return f'<iframe {frame} srcdoc="{html.escape(self)}"></iframe>'


def explorer(panes: Sequence[Pane], photo: Image.Image, title: str) -> Page:
    """Return the page that shows a photo as one model, or several side by side, see it.

    Each row is stored in 255 steps of its largest value. Where that would take the page over MAX_BYTES, in fewer steps,
    or fewer rows, and the page says so. Raises UserError for maps that do not fit their grid or are not finite shares,
    and for panes of unlike blocks or methods.
    """
    whole = [_stack(pane) for pane in panes]
    if len({(*sorted(pane.attn), *maps) for pane, maps in zip(panes, whole)}) != 1:
        raise UserError("expected one pane or more, all of the same blocks and methods")
    picture = "data:image/jpeg;base64," + base64.b64encode(_jpeg(photo)).decode()
    data = {
        "title": shorten(title, MAX_NAME),
        "size": photo.size,
        "photo": picture,
        "blocks": sorted(panes[0].attn),
    }
    for levels, stored, part in _PLANS:
        maps = [{method: part(a) for method, a in maps.items()} for maps in whole]
        if sum(a.size for pane in maps for a in pane.values()) > 5 * MAX_BYTES:
            continue  # in 15 steps they compress to a third, so this could not fit
        data["stored"] = f"Stored: {stored}, in {levels} steps of each row's largest value."
        data["panes"] = [_pane(pane, kept, levels, photo.size) for pane, kept in zip(panes, maps)]
        page = _fill(data)
        if len(page) <= MAX_BYTES:
            break
    return Page(page)


def write_report(path: Path, panes: Sequence[Pane], photo: Image.Image, title: str) -> None:
    """Write explorer's page, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(explorer(panes, photo, title).encode())


def _stack(pane: Pane) -> dict[str, np.ndarray]:
    """Return each method's maps as float32 (L, H, Q, P), without what the queries give to the class token."""
    stacks, (gh, gw), N = {}, pane.grid, 1 + pane.grid[0] * pane.grid[1]
    for method, blocks in {"attention": pane.attn, **pane.methods}.items():
        if not blocks or blocks.keys() != pane.attn.keys():
            raise UserError(
                f"{method}: expected maps of the blocks of attn, {sorted(pane.attn)}, found {sorted(blocks)}"
            )
        maps = [
            torch.as_tensor(blocks[block]).detach().float().cpu().numpy()
            for block in sorted(blocks)
        ]
        shapes = {a.shape if a.ndim == 3 else (1, *a.shape) for a in maps}
        shape = shapes.pop()
        if shapes or not (
            shape == (1, gh, gw) or (len(shape) == 3 and shape[1] in (1, N) and shape[2] == N)
        ):
            found = f"{method}: found maps of {', '.join(map(str, sorted({*shapes, shape})))}"
            raise UserError(
                f"{found}, expected one shape for all blocks, of {gh} x {gw} patches and a class token"
            )
        a = np.stack(maps)
        if not (np.isfinite(a).all() and a.min() >= 0):
            raise UserError(f"{method}: expected finite shares of at least 0")
        stacks[method] = (
            a.reshape(len(a), 1, 1, -1)
            if shape == (1, gh, gw)
            else a.reshape(len(a), *shape)[..., 1:]
        )
    return stacks


def _pane(pane: Pane, maps: dict[str, np.ndarray], levels: int, size: tuple[int, int]) -> dict:
    """Return a pane for JSON; `maps` is base64 of deflated bytes: the step of every row (float32), then all codes (uint8)."""
    steps = [a.max(3, keepdims=True) / np.float32(levels) for a in maps.values()]
    codes = [
        np.rint(a / np.maximum(step, 1e-30)).astype(np.uint8)
        for a, step in zip(maps.values(), steps)
    ]
    packed = b"".join([*(a.astype("<f4").tobytes() for a in steps), *(a.tobytes() for a in codes)])
    return {
        "name": shorten(pane.name, MAX_NAME),
        "predictions": [
            (shorten(label, MAX_NAME), round(float(p), 6)) for label, p in pane.predictions
        ],
        "grid": pane.grid,
        "box": [edge / side for edge, side in zip(pane.box, size * 2)],  # in shares of the photo
        "methods": [
            {"name": shorten(method, MAX_NAME), "heads": a.shape[1], "queries": a.shape[2]}
            for method, a in maps.items()
        ],
        "maps": base64.b64encode(zlib.compress(packed, 3)).decode(),
    }


def _jpeg(photo: Image.Image) -> bytes:
    for side, quality in ((1000, 88), (1000, 70), (640, 50)):  # the last is for pure noise
        shrink = min(1, side / max(photo.size))
        small = photo.convert("RGB").resize(
            [max(1, round(length * shrink)) for length in photo.size], Image.Resampling.LANCZOS
        )
        small.save(file := io.BytesIO(), "JPEG", quality=quality)
        if file.tell() <= MAX_PHOTO_BYTES:
            break
    return file.getvalue()


def _fill(data: dict) -> str:
    page = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    for tag in ("script", "style"):  # by these hashes, the page's policy lets only its own run
        own = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        page = page.replace(
            f"{tag.upper()}_HASH", base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        )
    return page.replace(
        "PAGE_DATA", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    )
