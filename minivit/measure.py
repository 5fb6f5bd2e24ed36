"""Measuring where photos' maps fall: the masks on the patch grid, the maps of each model, their scores, photo by photo.

Shapes: n photos, B of a batch, P = gh x gw patches, L blocks, H heads, M maps of a photo: each block's heads and their
mean, L (H + 1), then L of rollout and L of relevance where asked for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .ahead import read_ahead
from .attention import CLASS_TOKEN, class_relevance, method_rows, query_maps, region_scores
from .errors import UserError
from .model import ViT
from .photos import PhotoError, Preprocess, open_photo

BATCH = 64


@dataclass
class Measured:
    """What measure finds. A photo takes 5 kB of rows and 0.8 kB of its map for each model of ViT-B/16's size."""

    photos: list[int]  # which of those given have a mask, in order
    left_out: dict[str, list[Path]]  # the others, by reason
    rows: dict[str, np.ndarray]  # by model: (n, M, 2 regions, 4 metrics), NaN where there is no head box
    maps: dict[str, Tensor]  # by model: (n, gh, gw), mean of the last block's heads
    times: dict[str, np.ndarray]  # by model: (n,), times chance of these maps on the pet
    area: np.ndarray  # (n,), the pet's share of what the model sees, the mask's border aside
    predicted: np.ndarray  # (n,) classes of the first model, and their probabilities
    probability: np.ndarray
    equal_blocks: int  # from block 0, those of the same weights in all models; their maps are the same too


def measure(
    models: Mapping[str, ViT], paths: Sequence[Path], *, blocks: Sequence[int], methods: Sequence[str], workers: int
) -> Measured:
    """Score models of one shape on photos, which threads decode meanwhile; blocks are sorted.

    Raises UserError if no photo has a mask, and RuntimeError if blocks whose weights, and those before, are equal do not
    give equal maps.
    """
    model, *others = models.values()
    equal = min((count_equal_blocks(model, other) for other in others), default=0)
    per_block = 1 + model.config.num_heads
    num_equal, last = per_block * sum(b < equal for b in blocks), per_block * len(blocks) - 1  # of the maps
    device, kept, left_out, areas, answers = model.cls_token.device, [], {}, [], []
    num_maps = len(map_keys(blocks, model.config.num_heads, methods))
    # At once, since kept tensors in between those of batches would keep the memory in pieces, and growing.
    rows = {which: torch.empty(len(paths), num_maps, 2, 4, device=device) for which in models}
    maps = {which: torch.empty(len(paths), *model.config.grid, device=device) for which in models}
    differ = torch.zeros(num_equal, dtype=torch.bool, device=device)
    with torch.inference_mode(), tqdm(total=len(paths), unit="photo", leave=False) as progress:
        for batch in read_photos(paths, model, workers=workers, left_out=left_out):
            indices, pixels, regions = zip(*batch)
            images, regions = model.preprocess.normalize(torch.stack(pixels).to(device)), torch.stack(regions)
            absent, regions, found = not regions[:, 1].any(), regions.to(device), {}  # (B, 2, 2, P); no head box at all
            here = slice(len(kept), len(kept) + len(batch))
            for which, each in models.items():
                logits, found[which] = model_maps(each, images, blocks, methods)
                pet = region_scores(found[which], *regions[:, 0].unbind(1))
                head = torch.full_like(pet, torch.nan) if absent else region_scores(found[which], *regions[:, 1].unbind(1))
                rows[which][here] = torch.stack([pet, head], 2)  # (B, M, 2, 4)
                maps[which][here] = found[which][:, last].unflatten(1, model.config.grid)
                if each is model:
                    answers.append(logits.float().softmax(1).max(1))
                else:
                    differ |= (found[which][:, :num_equal] != found["model"][:, :num_equal]).any(2).any(0)
            areas.append(regions[:, 0, 0].sum(1) / regions[:, 0].sum((1, 2)))
            kept += indices
            progress.update(indices[-1] + 1 - progress.n)
    if not kept:
        raise UserError(f"{paths[0].parents[1]}: none of {len(paths)} photos can be scored: {', '.join(sorted(left_out))}")
    if differ.any():
        block = blocks[int(differ.nonzero()[0]) // per_block]
        raise RuntimeError(f"block {block}: its maps differ, though it and all before it have equal weights")
    probability, predicted = (torch.cat(parts).cpu().numpy() for parts in zip(*answers))
    rows = {which: values[: len(kept)].cpu().numpy() for which, values in rows.items()}
    maps = {which: values[: len(kept)].cpu() for which, values in maps.items()}
    times = {which: values[:, last, 0, 1] for which, values in rows.items()}
    return Measured(kept, left_out, rows, maps, times, torch.cat(areas).cpu().numpy(), predicted, probability, equal)


def model_maps(model: ViT, images: Tensor, blocks: Sequence[int], methods: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the logits of images (B, 3, h, w) and how the class token looks: maps (B, M, P), in the order of map_keys."""
    c = model.config
    to_maps = partial(query_maps, grid=c.grid, num_registers=c.num_registers)
    logits, attn = model.forward_with_attention(images, blocks, queries=[CLASS_TOKEN])
    heads = torch.stack([to_maps(attn[b]).flatten(2) for b in blocks], 1)  # (B, L, H, P)
    maps, others = [torch.cat([heads, heads.mean(2, keepdim=True)], 2).flatten(1, 2)], {}
    if "rollout" in methods:
        _, others["rollout"] = method_rows(model, images, blocks, method="rollout")  # (B, 1, 1, N)
    if "relevance" in methods:
        others["relevance"] = class_relevance(model, images, logits.argmax(1), blocks)  # (B, 1, N)
    maps += [torch.stack([to_maps(rows[b]).flatten(1) for b in blocks], 1) for rows in others.values()]
    return logits, torch.cat(maps, 1)


def map_keys(blocks: Sequence[int], num_heads: int, methods: Sequence[str]) -> list[tuple[str, int, int | str]]:
    """Name the M maps that model_maps returns: method, block, and head or "mean"."""
    keys = [("attention", block, head) for block in blocks for head in (*range(num_heads), "mean")]
    return keys + [(method, block, "mean") for method in methods if method != "attention" for block in blocks]


def count_equal_blocks(model: ViT, other: ViT) -> int:
    """Return how many blocks, from the first on, have equal weights in two models, and equal embeddings before them."""
    theirs, unequal = other.state_dict(), set()
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks.") and not tensor.equal(theirs[name]):
            unequal.add(int(name.split(".")[1]))
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")) and not tensor.equal(theirs[name]):
            return 0
    return min(unequal, default=model.config.depth)


def read_photos(
    paths: Sequence[Path], model: ViT, *, workers: int, left_out: dict[str, list[Path]]
) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """Yield batches of photos' indices, pixels (3, h, w) and regions, a batch or two ahead of their use.

    What cannot be scored goes into `left_out`, by reason.
    """

    def read(i: int) -> tuple[int, Tensor | str, Tensor | None]:
        try:
            photo = open_photo(paths[i])
            regions = read_regions(paths[i], photo.size, model.preprocess, model.config.grid)
            return i, model.preprocess.pixels(photo), regions
        except PhotoError:
            return i, "photo cannot be read", None
        except UserError as error:
            return i, str(error), None

    def scorable() -> Iterator[tuple[int, Tensor, Tensor]]:
        for i, pixels, regions in read_ahead(read, range(len(paths)), workers):
            if regions is None:
                left_out.setdefault(pixels, []).append(paths[i])
            else:
                yield i, pixels, regions

    found = scorable()
    while batch := list(itertools.islice(found, BATCH)):
        yield batch


def annotation(path: Path, folder: str, suffix: str) -> Path:
    return path.parents[1] / "annotations" / folder / f"{path.stem}{suffix}"


def read_species(pets: Path) -> dict[str, str]:
    """Return which photos, by their stems, are a "cat" or a "dog", as the listings in Oxford-IIIT Pet's folder say."""
    found = {}
    for name in ("trainval.txt", "test.txt"):
        for line in (pets / "annotations" / name).read_text("utf-8", "backslashreplace").splitlines():
            if line.strip() and line[0] != "#":
                stem, _, species, _ = line.split()
                found[stem] = "cat" if species == "1" else "dog"
    return found


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


def read_regions(path: Path, size: tuple[int, int], preprocess: Preprocess, grid: tuple[int, int]) -> Tensor:
    """Return what share of each patch's area lies in and around the pet, and in and around its head: float32 (2, 2, P).

    `size` is the photo's (W, H). The mask's border counts as neither; without a head box its shares are 0. Raises
    UserError, saying why, where there is no pet to look at in what the model sees of the photo.
    """
    mask = read_mask(path, size)
    (gh, gw), (left, top, right, bottom) = grid, preprocess.box(size)
    ys, xs = np.linspace(top, bottom, gh + 1), np.linspace(left, right, gw + 1)
    pet, around = (mean_by_area(mask == value, ys, xs) for value in (1, 2))
    if not pet.any():
        raise UserError("no pet in the mask" if not (mask == 1).any() else "pet outside of what the model sees")
    head = np.zeros((2, gh, gw))
    xml = annotation(path, "xmls", ".xml")
    box = dict(re.findall(r"<([xy]m(?:in|ax))>\s*(\d+)", xml.read_text("utf-8", "replace"))[:4]) if xml.is_file() else {}
    if len(box) == 4:
        x0, y0, x1, y1 = (float(box[edge]) for edge in ("xmin", "ymin", "xmax", "ymax"))
        inside = np.outer(covered(ys, y0, y1), covered(xs, x0, x1))
        head = np.stack([inside, 1 - inside]) if inside.any() else head
    return torch.from_numpy(np.stack([[pet, around], head]).reshape(2, 2, -1).astype(np.float32))


def mean_by_area(mask: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Average a mask (H, W) over patches, whose edges ys (gh + 1,) and xs (gw + 1,) may cut through pixels: (gh, gw)."""
    for edges in (ys, xs):  # not by matrix products, whose threads would be in the way of those that decode
        whole = np.minimum(edges.astype(int), len(mask) - 1)
        up_to = np.pad(mask.cumsum(0, dtype=np.float64), ((1, 0), (0, 0)))[whole] + (edges - whole)[:, None] * mask[whole]
        mask = (np.diff(up_to, axis=0) / np.diff(edges)[:, None]).T
    return mask


def covered(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """Return the share (g,) of each stretch between edges (g + 1,) that an interval covers."""
    low, high = edges[:-1], edges[1:]
    return (np.minimum(high, end) - np.maximum(low, start)).clip(0) / (high - low)
