"""What a model makes of a photo, and the figure, page and arrays that show it: infer.py's work, without its flags.

Shapes: H heads, Q rows, one for each token that asks, N tokens; gh, gw patches; h, w pixels of a figure's panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .attention import (
    CLASS_TOKEN,
    DOMINANT_SHARE,
    difference,
    method_rows,
    query_maps,
    shares,
    sinks,
)
from .data.photos import open_photo
from .figures.explorer import Pane
from .figures.plots import Panel, Row, panel_shape
from .model import ViT
from .system.files import whole_file

PAGE_SIDE = 1000  # pixels; as large as the page shows a photo
KEEPS_MOST = 0.5  # a class token that gives itself more than it gives to all patches


@dataclass(frozen=True)
class Photo:
    """A photo (W, H), as small as a figure and the page show it, and as each model's input (3, h, w)."""

    size: tuple[int, int]
    panel: np.ndarray  # uint8 (h, w, 3)
    picture: Image.Image
    inputs: list[Tensor]
    query: int  # the token that asks


@dataclass(frozen=True)
class Look:
    """One model's answer to one photo: probabilities (C,), and by method and block the rows (H, Q, N) of `tokens`."""

    model: ViT
    probabilities: Tensor
    rows: Mapping[str, Mapping[int, Tensor]]
    tokens: Mapping[str, Sequence[int]]
    query: int
    target: str  # the class that relevance speaks for

    def names(self, k: int) -> list[tuple[str, int, float]]:
        """Return the k likeliest classes: label, index, probability; none without a classifier."""
        labels = self.model.labels
        top = self.probabilities.topk(min(k, len(labels)))
        return [(labels[i], i, p) for p, i in zip(top.values.tolist(), top.indices.tolist())]

    def row(self, method: str, block: int) -> Tensor:
        """Return how the token that asks spreads over all tokens: (H, N)."""
        return self.rows[method][block][:, list(self.tokens[method]).index(self.query)]

    def says(self, method: str) -> str:
        """Return what the model calls the photo, and the class that a map is for where it is for one."""
        if not self.model.labels:
            return "no classifier"
        ((label, _, probability),) = self.names(1)
        spoke = (
            f", relevance for {self.target}"
            if method == "relevance" and self.target != label
            else ""
        )
        return f"{label} {probability:.3f}{spoke}"


def read_photo(
    path: Path, models: Sequence[ViT], query: tuple[float, float] | None, *, small: bool
) -> Photo:
    """Open a photo for these models, the last of which says which patch sees the pixel `query`; `small` as panel_shape's.

    Raises PhotoError, or UserError where the model does not see that pixel.
    """
    photo, model = open_photo(path), models[-1]
    token = (
        CLASS_TOKEN
        if query is None
        else 1 + model.preprocess.patch_at(*query, photo.size, model.config.grid)
    )
    inputs = [m.preprocess(photo) for m in models]
    size, (h, w) = photo.size, panel_shape(photo.size, small=small)
    panel = np.asarray(photo.resize((w, h), Image.Resampling.LANCZOS, reducing_gap=2))
    photo.thumbnail((PAGE_SIDE, PAGE_SIDE))
    return Photo(size, panel, photo, inputs, token)


def look_at(
    model: ViT,
    photos: Sequence[Photo],
    which: int,
    blocks: Sequence[int],
    *,
    methods: Sequence[str] = ("attention",),
    all_rows: bool = False,
    target: int | None = None,
) -> list[Look]:
    """Return what a model, the one of inputs `which`, makes of each photo.

    Relevance is for the class `target`, None for each photo's first prediction. With `all_rows`, each token asks. Registers
    are left out: tokens are the class token, 0, and the patches.
    """
    images = torch.stack([photo.inputs[which] for photo in photos]).to(model.cls_token.device)
    num_registers = model.config.num_registers

    def drop(rows: Tensor) -> Tensor:  # (B, H, Q, N) without what registers get
        return (
            torch.cat([rows[..., :1], rows[..., 1 + num_registers :]], -1)
            if num_registers
            else rows
        )

    asked = (
        range(model.config.num_tokens - num_registers)
        if all_rows
        else sorted({photo.query for photo in photos})
    )
    targets = None if target is None else torch.full((len(photos),), target, device=images.device)
    rows, tokens = (
        {},
        {method: [CLASS_TOKEN] if method == "relevance" else asked for method in methods},
    )
    with torch.inference_mode():
        for method in methods:
            queries = [token + num_registers if token else CLASS_TOKEN for token in tokens[method]]
            logits, found = method_rows(
                model, images, blocks, method=method, queries=queries, targets=targets
            )
            rows[method] = {
                block: drop(of_block.float().cpu()) for block, of_block in found.items()
            }
    probabilities = (
        logits[:, : len(model.labels)].float().softmax(1).cpu()
    )  # of a backbone, none: those are its features
    looks = []
    for i, photo in enumerate(photos):
        own = {
            method: {block: r[i] for block, r in of_method.items()}
            for method, of_method in rows.items()
        }
        spoke = (
            model.labels[probabilities[i].argmax() if target is None else target]
            if model.labels
            else ""
        )
        looks.append(Look(model, probabilities[i], own, tokens, photo.query, spoke))
    return looks


def figure_rows(
    photo: Photo, looks: Sequence[Look], method: str, blocks: Sequence[int], *, heads: bool
) -> list[Row]:
    """Lay a figure out: a row a model, with two the difference below; with `heads`, so for each block."""
    rows = []
    for group in [[block] for block in blocks] if heads else [blocks]:
        shown = [
            [cell for block in group for cell in _cells(a, method, block, heads)] for a in looks
        ]
        for a, cells in zip(looks, shown):
            label = "photo" if len(looks) == 1 else f"{a.model.origin.source}\n{a.says(method)}"
            rows.append(Row(label, [_panel(photo, a, method, title, row) for title, row in cells]))
        if len(looks) == 2:
            panels = []
            for (title, before), (_, after) in zip(*shown):
                change = difference(_map(looks[1], method, after), _map(looks[0], method, before))
                panels.append(Panel(title, _percent(photo, looks[1], change)))
            rows.append(Row("difference", panels, signed=True))
    return rows


def _cells(a: Look, method: str, block: int, heads: bool) -> list[tuple[str, Tensor]]:
    """Return what is drawn of a block: a title and a row (N,) each."""
    row = a.row(method, block)
    if not heads:
        return [(f"block {block}", row.mean(0))]
    return [
        (f"block {block}, mean", row.mean(0)),
        *((f"block {block}, head {i}", head) for i, head in enumerate(row)),
    ]


def _map(a: Look, method: str, row: Tensor) -> Tensor:
    values = query_maps(row[None], a.model.config.grid, 0)
    return shares(values) if method == "relevance" else values  # relevance has no sum of its own


def _percent(photo: Photo, a: Look, values: Tensor) -> np.ndarray:
    return a.model.preprocess.to_photo(100 * values, photo.size, photo.panel.shape[:2])


def _panel(photo: Photo, a: Look, method: str, title: str, row: Tensor) -> Panel:
    keeps, largest = (share.item() for share in sinks(row[None, None, None]))
    note = f"top patch {100 * largest:.0f}%"
    if method == "attention":
        note = (
            f"{'keeps' if a.query == CLASS_TOKEN else 'to class token'} {100 * keeps:.0f}% · {note}"
        )
    warn = largest > DOMINANT_SHARE or (method == "attention" and keeps > KEEPS_MOST)
    return Panel(title, _percent(photo, a, _map(a, method, row)), note, warn)


def caption(photo: Photo, looks: Sequence[Look], method: str, *, heads: bool, common: bool) -> str:
    """Say what a figure's colours and notes mean."""
    who = "the class token" if photo.query == CLASS_TOKEN else "the marked patch"
    what = {
        "attention": f"of the attention that {who} pays, {'by head' if heads else 'mean of the heads'}",
        "rollout": f"of the attention of {who}, followed through the blocks up to this one",
        "relevance": "of what speaks for the class up to this block, positive part",
    }[method]
    said = f"Colours: % per patch {what}; {'one scale along each row' if common else 'each map has its own scale'}."
    if method == "attention" and photo.query == CLASS_TOKEN:
        said += " Keeps: what the class token gives itself."
    said += " Top patch: the largest share of the map. Red: over 30%, or the class token keeps over half."
    if len(looks) == 2:
        said += " Difference: second less first, of shares of the map, in percentage points, on one scale; light: more."
    return said + (" Pale: cropped away, not seen." if looks[-1].model.preprocess.crop else "")


def mark(photo: Photo, model: ViT) -> tuple[float, float, float, float] | None:
    """Return the patch that asks, in shares of the photo: left, top, right, bottom; None for the class token."""
    if photo.query == CLASS_TOKEN:
        return None
    left, top, right, bottom = (
        edge / side for edge, side in zip(model.preprocess.box(photo.size), photo.size * 2)
    )
    (gh, gw), (row, column) = model.config.grid, divmod(photo.query - 1, model.config.grid[1])
    x, y = (right - left) / gw, (bottom - top) / gh
    return left + column * x, top + row * y, left + (column + 1) * x, top + (row + 1) * y


def summary(a: Look, top_k: int, method: str) -> dict:
    """Return for JSON what a model calls a photo, and of each block what the asking token gives the class token, and the
    largest patch's share of the map."""
    names = [{"label": label, "index": i, "probability": p} for label, i, p in a.names(top_k)]
    sunk = {
        block: sinks(a.row(method, block).mean(0)[None, None, None]) for block in a.rows[method]
    }
    maps = {
        block: {"class_token": keeps.item(), "top_patch": largest.item()}
        for block, (keeps, largest) in sunk.items()
    }
    return {"model": a.model.origin.source, "predictions": names, "maps": maps}


def pane(photo: Photo, a: Look, top_k: int) -> Pane:
    """Return one model's side of the page."""
    scale = [small / side for small, side in zip(photo.picture.size, photo.size)] * 2
    left, top, right, bottom = (
        edge * factor for edge, factor in zip(a.model.preprocess.box(photo.size), scale)
    )
    box = left, top, right, bottom
    methods = {
        method: {block: rows[0] for block, rows in a.rows[method].items()}
        for method in a.rows
        if method != "attention"
    }
    if "relevance" in methods:
        methods["relevance"] = {
            block: _map(a, "relevance", rows[0]) for block, rows in methods["relevance"].items()
        }
    name = f"{a.model.origin.source}: {a.says('relevance')}"
    return Pane(
        name,
        [(label, p) for label, _, p in a.names(top_k)],
        a.rows["attention"],
        a.model.config.grid,
        box,
        methods,
    )


def write_arrays(path: Path, photo: Photo, looks: Sequence[Look], method: str) -> None:
    """Write an .npz: `rows` (blocks, H, Q, N) of `blocks` and the tokens `queries`: 0 is the class token, then the patches.

    Also `grid` (gh, gw), `photo_size` (W, H), `box`, what the model sees of it (left, top, right, bottom in pixels), and
    `probabilities` (C,). With two models, those of the other are `base_rows` and `base_probabilities`.
    """
    model, last = looks[-1].model, looks[-1]
    arrays: dict[str, Any] = {
        "blocks": list(last.rows[method]),
        "queries": list(last.tokens[method]),
    }
    arrays |= {
        "grid": model.config.grid,
        "box": model.preprocess.box(photo.size),
        "photo_size": photo.size,
    }
    for prefix, a in zip(("base_", "")[-len(looks) :], looks):
        arrays |= {
            f"{prefix}rows": torch.stack(list(a.rows[method].values())),
            f"{prefix}probabilities": a.probabilities,
        }
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
