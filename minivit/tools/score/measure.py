"""Measuring where photos' maps fall: the masks on the patch grid, the maps of each model, their scores, photo by photo.

Shapes: n photos, B of a batch, P = gh x gw patches, L blocks, H heads, M maps of a photo: each block's heads and their
mean, L (H + 1), then L of rollout and L of relevance where asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...attention import CLASS_TOKEN, class_relevance, method_rows, query_maps
from ...errors import UserError
from ...model import ViT
from ...system import workers as processes
from .masks import read_pets
from .region_scores import region_scores

BATCH, CHUNK = 64, 8  # photos that the model takes at once; that a process reads in one go


@dataclass
class Measured:
    """What measure finds. A photo takes 5 kB of rows and 0.8 kB of its map for each model of ViT-B/16's size."""

    photos: list[int]  # which of those given have a mask, in order
    left_out: dict[str, list[Path]]  # the others, by reason
    rows: dict[
        str, np.ndarray
    ]  # by model: (n, M, 2 regions, 4 metrics), NaN where there is no head box
    maps: dict[str, Tensor]  # by model: (n, gh, gw), mean of the last block's heads
    times: dict[str, np.ndarray]  # by model: (n,), times chance of these maps on the pet
    area: np.ndarray  # (n,), the pet's share of what the model sees, the mask's border aside
    predicted: np.ndarray  # (n,) classes of the first model, and their probabilities
    probability: np.ndarray
    equal_blocks: (
        int  # from block 0, those of the same weights in all models; their maps are the same too
    )


def measure(
    models: Mapping[str, ViT],
    paths: Sequence[Path],
    *,
    blocks: Sequence[int],
    methods: Sequence[str],
    workers: int,
) -> Measured:
    """Score models of one shape on photos, which are decoded meanwhile; blocks are sorted.

    Raises UserError if no photo has a mask, and RuntimeError if blocks whose weights, and those before, are equal do not
    give equal maps.
    """
    model, *others = models.values()
    equal = min((count_equal_blocks(model, other) for other in others), default=0)
    per_block = 1 + model.config.num_heads
    num_equal, last = (
        per_block * sum(b < equal for b in blocks),
        per_block * len(blocks) - 1,
    )  # of the maps
    device, areas, answers = model.cls_token.device, [], []
    kept: list[int] = []
    left_out: dict[str, list[Path]] = {}
    num_maps = len(map_keys(blocks, model.config.num_heads, methods))
    # At once, since kept tensors in between those of batches would keep the memory in pieces, and growing.
    rows = {which: torch.empty(len(paths), num_maps, 2, 4, device=device) for which in models}
    maps = {which: torch.empty(len(paths), *model.config.grid, device=device) for which in models}
    differ = torch.zeros(num_equal, dtype=torch.bool, device=device)
    with torch.inference_mode(), tqdm(total=len(paths), unit="photo", leave=False) as progress:
        for batch in read_photos(paths, model, workers=workers, left_out=left_out):
            indices, pixels, shares = zip(*batch)
            images, regions = (
                model.preprocess.normalize(torch.stack(pixels).to(device)),
                torch.stack(shares),
            )
            absent, regions, found = (
                not regions[:, 1].any(),
                regions.to(device),
                {},
            )  # (B, 2, 2, P); no head box at all
            here = slice(len(kept), len(kept) + len(batch))
            for which, each in models.items():
                logits, found[which] = model_maps(each, images, blocks, methods)
                pet = region_scores(found[which], *regions[:, 0].unbind(1))
                head = (
                    torch.full_like(pet, torch.nan)
                    if absent
                    else region_scores(found[which], *regions[:, 1].unbind(1))
                )
                rows[which][here] = torch.stack([pet, head], 2)  # (B, M, 2, 4)
                maps[which][here] = found[which][:, last].unflatten(1, model.config.grid)
                if each is model:
                    answers.append(logits.float().softmax(1).max(1))
                else:
                    differ |= (
                        (found[which][:, :num_equal] != found["model"][:, :num_equal]).any(2).any(0)
                    )
            areas.append(regions[:, 0, 0].sum(1) / regions[:, 0].sum((1, 2)))
            kept += indices
            progress.update(indices[-1] + 1 - progress.n)
    if not kept:
        raise UserError(
            f"{paths[0].parents[1]}: none of {len(paths)} photos can be scored: {', '.join(sorted(left_out))}"
        )
    if differ.any():
        block = blocks[int(differ.nonzero()[0]) // per_block]
        raise RuntimeError(
            f"block {block}: its maps differ, though it and all before it have equal weights"
        )
    probability, predicted = (torch.cat(parts).cpu().numpy() for parts in zip(*answers))
    scores = {which: values[: len(kept)].cpu().numpy() for which, values in rows.items()}
    maps = {which: values[: len(kept)].cpu() for which, values in maps.items()}
    times = {which: values[:, last, 0, 1] for which, values in scores.items()}
    return Measured(
        kept,
        left_out,
        scores,
        maps,
        times,
        torch.cat(areas).cpu().numpy(),
        predicted,
        probability,
        equal,
    )


def model_maps(
    model: ViT, images: Tensor, blocks: Sequence[int], methods: Sequence[str]
) -> tuple[Tensor, Tensor]:
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
    maps += [
        torch.stack([to_maps(rows[b]).flatten(1) for b in blocks], 1) for rows in others.values()
    ]
    return logits, torch.cat(maps, 1)


def map_keys(
    blocks: Sequence[int], num_heads: int, methods: Sequence[str]
) -> list[tuple[str, int, int | str]]:
    """Name the M maps that model_maps returns: method, block, and head or "mean"."""
    keys = [("attention", block, head) for block in blocks for head in (*range(num_heads), "mean")]
    return keys + [
        (method, block, "mean") for method in methods if method != "attention" for block in blocks
    ]


def count_equal_blocks(model: ViT, other: ViT) -> int:
    """Return how many blocks, from the first on, have equal weights in two models, and equal embeddings before them."""
    theirs, unequal = other.state_dict(), set()
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks.") and not tensor.equal(theirs[name]):
            unequal.add(int(name.split(".")[1]))
        elif name.startswith(("cls_token", "pos_embed", "patch_embed")) and not tensor.equal(
            theirs[name]
        ):
            return 0
    return min(unequal, default=model.config.depth)


def read_photos(
    paths: Sequence[Path], model: ViT, *, workers: int, left_out: dict[str, list[Path]]
) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """Yield batches of photos' indices, pixels (3, h, w) and regions (2, 2, P), read a little ahead of their use.

    What cannot be scored goes into `left_out`, by reason.
    """
    n, grid = len(paths), model.config.grid
    jobs = ((read_pets, paths[i : i + CHUNK], model.preprocess, grid) for i in range(0, n, CHUNK))

    def scorable(begin: Callable) -> Iterator[tuple[int, Tensor, Tensor]]:
        read = processes.in_turn(begin, jobs, ahead=2 * workers)
        for i, found in enumerate(itertools.chain.from_iterable(read)):
            if isinstance(found, str):
                left_out.setdefault(found, []).append(paths[i])
            else:
                yield i, torch.from_numpy(found[0]), torch.from_numpy(found[1])

    with processes.working(
        processes.worth_starting(paths, workers), "minivit.tools.score.masks"
    ) as begin:
        found = scorable(begin)
        while batch := list(itertools.islice(found, BATCH)):
            yield batch
