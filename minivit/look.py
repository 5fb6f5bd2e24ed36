"""What models make of a photo, and the figure, page and arrays that show it.

This is the work of infer.py, without its flags.
Shapes: B photos, C classes, H heads, Q queries (the tokens whose rows are kept), N tokens (the
class token, then the patches); gh, gw patches of a map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .attention import (
    CLASS_TOKEN,
    DOMINANT_SHARE,
    class_relevance,
    class_token_and_top_patch_shares,
    difference,
    head_inputs_and_rows,
    query_maps,
    shares,
)
from .data import prepared
from .data.photos import open_photo
from .data.prepared import Needs, PanelSize, Photo
from .errors import UserError
from .figures import explorer
from .figures.explorer import Pane
from .figures.pages import thumbnail_url
from .figures.panels import AttentionFigure, Panel, Row
from .model import ViT
from .system.files import whole_file
from .training.reference import Comparison

UNLIKE = "unlike the training photos"
THUMBNAIL_SIDE = 96  # pixels, of a training photo on the explorer's page
KEEPS_MOST = 0.5  # above this, the class token keeps more attention than all patches get


@dataclass(frozen=True)
class Target:
    """The class that relevance explains, by index, and the class to contrast it with, if any."""

    index: int
    against: int | None = None


@dataclass(frozen=True)
class Explanation:
    """One model's answer to one photo: its predictions, and where it looks by each method.

    `rows` holds, by method and block, the attention (H, Q, N) that the tokens `tokens[method]`
    pay; H is 1 for rollout and relevance. `probabilities` (C,) are empty without a classifier.
    """

    model: ViT
    probabilities: Tensor
    rows: Mapping[str, Mapping[int, Tensor]]
    tokens: Mapping[str, Sequence[int]]
    query: int  # the token whose attention is shown
    target: str  # the class that relevance explains
    against: str  # the class that it is contrasted with, or ""
    comparison: Comparison | None  # with the training photos, if they are known
    _sink_shares: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=dict)

    def predictions(self, k: int) -> list[tuple[str, int, float]]:
        """Return the k likeliest classes as (label, index, probability)."""
        labels = self.model.labels
        top = self.probabilities.topk(min(k, len(labels)))
        indices = top.indices.tolist()
        return [(labels[i], i, p) for i, p in zip(indices, top.values.tolist())]

    def mean_and_heads(self, method: str, block: int) -> Tensor:
        """Return how the query spreads over all tokens, (1 + H, N).

        The first row is the mean of the heads; the heads follow.
        """
        heads = self.rows[method][block][:, self.tokens[method].index(self.query)]
        return torch.cat([heads.mean(0, keepdim=True), heads])

    def sink_shares(self, method: str, block: int) -> list[tuple[float, float]]:
        """Return two shares for each row of `mean_and_heads`, which the figure and JSON show.

        They are the class token's share of the attention and the largest patch's share of the map.
        They are computed once and remembered.
        """
        key = method, block
        if key not in self._sink_shares:
            rows = self.mean_and_heads(method, block)[None, :, None]
            if method == "relevance":  # Its rows have no fixed sum.
                rows = rows / rows.sum(-1, keepdim=True)
            class_token, top_patch = class_token_and_top_patch_shares(rows)
            self._sink_shares[key] = list(zip(class_token[0].tolist(), top_patch[0].tolist()))
        return self._sink_shares[key]

    def headline(self, method: str) -> str:
        """Return the first prediction, and the class that relevance explains if it is another."""
        if not self.model.labels:
            return "no classifier"
        [(label, _, probability)] = self.predictions(1)
        headline = f"{label} {probability:.3f}"
        if self.comparison is not None and self.comparison.is_unlike:
            headline += f", {UNLIKE}"
        if method == "relevance" and self.against:
            headline += f", relevance for {self.target} against {self.against}"
        elif method == "relevance" and self.target != label:
            headline += f", relevance for {self.target}"
        return headline


def needs_of(
    models: Sequence[ViT],
    query: tuple[float, float] | None = None,
    *,
    panel: PanelSize | None = None,
    page: bool = False,
) -> Needs:
    """Say what photos need so that these models can explain them.

    `query` is the pixel (x, y) whose patch, in the last model, is the query; without it, the query
    is the class token. `panel` is for a figure, and `page` for the explorer's page.
    """
    preprocesses = [model.preprocess for model in models]
    return Needs(preprocesses, models[-1].config.grid, query, panel, page)


def prepare_photo(photo: Image.Image, models: Sequence[ViT]) -> Photo:
    """Prepare an open photo for these models and for the explorer's page."""
    return prepared.prepare_photo(photo, needs_of(models, page=True))


def explain_photos(
    model: ViT,
    photos: Sequence[Photo],
    model_index: int,
    blocks: Sequence[int],
    *,
    methods: Sequence[str] = ("attention",),
    all_rows: bool = False,
    target: Target | None = None,
) -> list[Explanation]:
    """Run a batch of photos through a model and return its explanation of each.

    `model_index` says which of each photo's inputs belongs to this model. Relevance explains the
    class `target` or, without it, each photo's first prediction. With `all_rows`, every token is
    a query. Registers are left out of the rows and do not count as tokens. Without methods, there
    are predictions only.
    """
    pixels = torch.from_numpy(np.stack([photo.inputs[model_index] for photo in photos]))
    images = model.preprocess.normalize(pixels.to(model.cls_token.device))
    config = model.config
    # The model's own index of each token, where registers follow the class token.
    kept = [CLASS_TOKEN, *range(1 + config.num_registers, config.num_tokens)]
    queries = range(len(kept)) if all_rows else sorted({photo.query for photo in photos})
    tokens = {}
    rows = {}  # by method and block, (B, H, Q, N)
    with torch.inference_mode():
        inputs = None  # what the head reads
        for method in methods:
            if method != "relevance":
                tokens[method] = queries
                indices = [kept[token] for token in queries]
                inputs, rows[method] = head_inputs_and_rows(
                    model, images, blocks, method=method, queries=indices
                )
        if inputs is None:
            inputs = model.head_inputs(model.tokens(images))
        logits = model.head(inputs)
        if "relevance" in methods:
            tokens["relevance"] = [CLASS_TOKEN]
            targets, against = _target_tensors(target, logits)
            relevance = class_relevance(model, images, targets, blocks, against=against)
            rows["relevance"] = {block: row[:, None] for block, row in relevance.items()}
    # A model without a classifier has no labels, and its logits are features.
    probabilities = logits[:, : len(model.labels)].float().softmax(1).cpu()
    comparisons: Sequence[Comparison | None] = [None] * len(photos)
    if model.reference is not None:
        comparisons = model.reference.compare(inputs)

    on_cpu = {}  # rows without registers
    for method, by_block in rows.items():
        on_cpu[method] = {
            block: _without_registers(attn.float().cpu(), config.num_registers)
            for block, attn in by_block.items()
        }
    explanations = []
    for i, photo in enumerate(photos):
        photo_rows: dict[str, dict[int, Tensor]] = {}
        for method, batch_rows in on_cpu.items():
            photo_rows[method] = {block: attn[i] for block, attn in batch_rows.items()}
        label = ""
        against_label = ""
        if model.labels:
            label = model.labels[probabilities[i].argmax() if target is None else target.index]
        if target is not None and target.against is not None:
            against_label = model.labels[target.against]
        explanations.append(
            Explanation(
                model,
                probabilities[i],
                photo_rows,
                tokens,
                photo.query,
                label,
                against_label,
                comparisons[i],
            )
        )
    return explanations


def _target_tensors(target: Target | None, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the classes (B,) that relevance explains, and those that it contrasts them with."""
    if target is None:
        return logits.argmax(1), None
    targets = torch.full((len(logits),), target.index, device=logits.device)
    if target.against is None:
        return targets, None
    return targets, torch.full_like(targets, target.against)


def _without_registers(rows: Tensor, num_registers: int) -> Tensor:
    """Leave out of rows (B, H, Q, N) what the registers get."""
    if num_registers == 0:
        return rows
    return torch.cat([rows[..., :1], rows[..., 1 + num_registers :]], -1)


def figure_rows(
    explanations: Sequence[Explanation],
    method: str,
    blocks: Sequence[int],
    *,
    heads: bool,
) -> list[Row]:
    """Return the rows of a figure: one for each model and, between two models, their difference.

    A row shows all blocks. With `heads`, each block has rows of its own, which show the mean of the
    heads and each head.
    """
    rows = []
    for group in [[block] for block in blocks] if heads else [blocks]:
        for explanation in explanations:
            label = "photo"
            if len(explanations) > 1:
                label = f"{explanation.model.origin.source}\n{explanation.headline(method)}"
            rows.append(Row(label, _panels(explanation, method, group, heads)))
        if len(explanations) == 2:
            panels = _difference_panels(explanations, method, group, heads)
            rows.append(Row("difference", panels, signed=True))
    return rows


def _panels(
    explanation: Explanation, method: str, blocks: Sequence[int], heads: bool
) -> list[Panel]:
    """Return panels of a model's maps, each with a note on its sink shares."""
    panels = []
    for title, values, (kept, largest) in patch_maps(explanation, method, blocks, heads):
        note = f"top patch {100 * largest:.0f}%"
        warn = largest > DOMINANT_SHARE
        if method == "attention":
            receiver = "keeps" if explanation.query == CLASS_TOKEN else "to class token"
            note = f"{receiver} {100 * kept:.0f}% · {note}"
            warn = warn or kept > KEEPS_MOST
        panels.append(Panel(title, 100 * values.numpy(), note, warn))
    return panels


def _difference_panels(
    explanations: Sequence[Explanation],
    method: str,
    blocks: Sequence[int],
    heads: bool,
) -> list[Panel]:
    """Return panels of the second model's maps minus the first model's."""
    first, second = (patch_maps(each, method, blocks, heads) for each in explanations)
    panels = []
    for (title, before, _), (_, after, _) in zip(first, second):
        change = difference(after, before)
        panels.append(Panel(title, 100 * change.numpy()))
    return panels


def patch_maps(
    explanation: Explanation, method: str, blocks: Sequence[int], heads: bool
) -> list[tuple[str, Tensor, tuple[float, float]]]:
    """Return each panel's title, map (gh, gw) and sink shares.

    Each block has a panel for the mean of the heads and, with `heads`, one for each head.
    """
    maps: list[tuple[str, Tensor, tuple[float, float]]] = []
    for block in blocks:
        rows = explanation.mean_and_heads(method, block)
        titles = [f"block {block}"]
        if heads:
            titles = [f"block {block}, mean"]
            titles += [f"block {block}, head {head}" for head in range(len(rows) - 1)]
        values = query_maps(rows[:, None], explanation.model.config.grid)
        if method == "relevance":
            values = shares(values)  # A row of relevance has no fixed sum.
        maps += zip(titles, values, explanation.sink_shares(method, block))
    return maps


def attention_figure(
    photo: Photo,
    explanations: Sequence[Explanation],
    method: str,
    blocks: Sequence[int],
    *,
    title: str,
    heads: bool,
    shared_scale: bool,
) -> AttentionFigure:
    """Return the figure of a photo that was prepared with a panel.

    The title is followed by the prediction. With two models, each row is labelled with its own.
    """
    model = explanations[-1].model
    titles = [title]
    if len(explanations) == 1 and model.labels:
        titles.append(explanations[0].headline(method))
    return AttentionFigure(
        photo.panel,
        photo.size,
        model.preprocess,
        figure_rows(explanations, method, blocks, heads=heads),
        titles,
        figure_caption(photo, explanations, method, heads=heads, shared_scale=shared_scale),
        shared_scale,
        query_box(photo, model),
    )


def figure_caption(
    photo: Photo,
    explanations: Sequence[Explanation],
    method: str,
    *,
    heads: bool,
    shared_scale: bool,
) -> str:
    """Return what a figure's colours and notes mean."""
    of_class_token = photo.query == CLASS_TOKEN
    query = "the class token" if of_class_token else "the marked patch"
    if method == "attention":
        averaged = "for each head" if heads else "averaged over the heads"
        quantity = f"the attention that {query} pays to it, {averaged}"
    elif method == "rollout":
        quantity = f"the attention of {query}, followed through all blocks up to this one"
    else:
        quantity = "its positive contribution to the class, up to this block"
        target = explanations[-1].target
        against = explanations[-1].against
        if against:
            quantity = f"what speaks for {target} rather than for {against}, up to this block"
    scale = "all maps in a row share one scale" if shared_scale else "each map has its own scale"
    sentences = [f"The colours show, for each patch, {quantity}, in %; {scale}."]
    if method == "attention" and of_class_token:
        sentences.append("Keeps: the attention of the class token to itself.")
    sentences.append("Top patch: the largest patch's share of the map.")
    sentences.append("Red notes: a share over 30%, or a class token that keeps over half.")
    if len(explanations) == 2:
        sentences.append(
            "Difference: the second model's share of the map minus the first's, in percentage "
            "points on one scale; lighter means more."
        )
    if explanations[-1].model.preprocess.crop:
        sentences.append("Pale: cropped away and not seen by the model.")
    return " ".join(sentences)


def query_box(photo: Photo, model: ViT) -> tuple[float, float, float, float] | None:
    """Return where the query's patch lies on the photo, or None if the query is the class token.

    The box is left, top, right and bottom, as fractions of the photo's width and height.
    """
    if photo.query == CLASS_TOKEN:
        return None
    W, H = photo.size
    left, top, right, bottom = model.preprocess.box(photo.size)
    left, top, right, bottom = left / W, top / H, right / W, bottom / H
    gh, gw = model.config.grid
    row, column = divmod(photo.query - 1, gw)
    x = (right - left) / gw
    y = (bottom - top) / gh
    return left + column * x, top + row * y, left + (column + 1) * x, top + (row + 1) * y


def summary(explanation: Explanation, top_k: int, method: str | None) -> dict:
    """Return a model's answer for JSON: its predictions, and the sink shares of each block.

    The shares are those of the mean of the heads. Without a method there are none.
    """
    maps = {}
    if method is not None:
        for block in explanation.rows[method]:
            class_token, top_patch = explanation.sink_shares(method, block)[0]
            maps[block] = {"class_token": class_token, "top_patch": top_patch}
    comparison: dict[str, object] = {}
    if explanation.comparison is not None:
        comparison["distance"] = explanation.comparison.distance
        comparison["threshold"] = explanation.comparison.threshold
        comparison["unlike_training"] = explanation.comparison.is_unlike
    contrast = {}
    if method == "relevance" and explanation.against:
        contrast = {"target": explanation.target, "against": explanation.against}
    return {
        "model": explanation.model.origin.source,
        **contrast,
        **comparison,
        "predictions": [
            {"label": label, "index": index, "probability": probability}
            for label, index, probability in explanation.predictions(top_k)
        ],
        "maps": maps,
    }


def explorer_page(
    photo: Photo, explanations: Sequence[Explanation], top_k: int, title: str
) -> explorer.Page:
    """Return the explorer of a photo that was prepared for a page, with all rows explained."""
    panes = [explorer_pane(photo, each, top_k) for each in explanations]
    return explorer.explorer_page(panes, photo.page_image, title)


def explorer_pane(photo: Photo, explanation: Explanation, top_k: int) -> Pane:
    """Return one model's side of the explorer."""
    methods = {}
    for method, rows in explanation.rows.items():
        if method == "relevance":
            grid = explanation.model.config.grid
            methods[method] = {
                block: shares(query_maps(attn[0], grid)) for block, attn in rows.items()
            }
        elif method != "attention":
            methods[method] = {block: attn[0] for block, attn in rows.items()}
    x_scale = photo.page_image.width / photo.size[0]
    y_scale = photo.page_image.height / photo.size[1]
    left, top, right, bottom = explanation.model.preprocess.box(photo.size)
    return Pane(
        f"{explanation.model.origin.source}: {explanation.headline('relevance')}",
        [(label, probability) for label, _, probability in explanation.predictions(top_k)],
        explanation.rows["attention"],
        explanation.model.config.grid,
        (left * x_scale, top * y_scale, right * x_scale, bottom * y_scale),
        methods,
        describe_comparison(explanation.comparison),
        _nearest_photos(explanation.comparison),
    )


def describe_comparison(comparison: Comparison | None) -> str:
    """Say how far a photo is from the training photos, or "" if they are not known."""
    if comparison is None:
        return ""
    return (
        f"{'Unlike' if comparison.is_unlike else 'Like'} the training photos: distance "
        f"{comparison.distance:.3g}; at least 95% of the validation photos are within "
        f"{comparison.threshold:.3g}"
    )


def _nearest_photos(comparison: Comparison | None) -> list[tuple[str, str, str]]:
    """Return the class, the name and a small copy of each of the nearest training photos.

    The copy is a data URL, or "" if the photo is no longer where it was.
    """
    if comparison is None:
        return []
    nearest = []
    for neighbour in comparison.nearest:
        thumbnail = ""
        with contextlib.suppress(UserError, OSError):
            thumbnail = thumbnail_url(open_photo(neighbour.path), THUMBNAIL_SIDE)
        nearest.append((neighbour.label, neighbour.path.name, thumbnail))
    return nearest


def write_arrays(
    path: Path, photo: Photo, explanations: Sequence[Explanation], method: str
) -> None:
    """Write an .npz of `rows` (blocks, H, Q, N), for `blocks` and the query tokens `queries`.

    Token 0 is the class token, and the patches follow. The file also holds `grid` (gh, gw),
    `photo_size` (W, H), `box` (what the model sees of the photo: left, top, right, bottom in
    pixels) and `probabilities` (C,). With two models, `base_rows` and `base_probabilities` are the
    first model's.
    """
    last = explanations[-1]
    arrays: dict[str, Any] = {
        "blocks": list(last.rows[method]),
        "queries": list(last.tokens[method]),
        "grid": last.model.config.grid,
        "box": last.model.preprocess.box(photo.size),
        "photo_size": photo.size,
    }
    prefixes = ["base_", ""] if len(explanations) == 2 else [""]
    for prefix, explanation in zip(prefixes, explanations):
        arrays[f"{prefix}rows"] = torch.stack(list(explanation.rows[method].values()))
        arrays[f"{prefix}probabilities"] = explanation.probabilities
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
