"""Measure where the maps of each photo fall: read masks, compute each model's maps, score them.

Shapes: n photos, B of a batch, P = gh x gw patches, L blocks, H heads, M maps of a photo: each
block's heads and their mean, L (H + 1), then L of rollout and L of relevance where asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...attention import CLASS_TOKEN, class_relevance, forward_with_rollout, query_maps
from ...errors import UserError
from ...model import ViT
from ...system.progress import progress_bar
from ...system.workers import map_ahead, processes_worth_starting, worker_pool
from .masks import PetPhoto, read_pets
from .region_scores import region_scores

BATCH = 64  # photos that go through a model at once
CHUNK = 8  # photos that a worker reads in one job
AFTER_BLOCKS = ("norm.", "head.")  # the weights that no map depends on

T = TypeVar("T")
MapKey = tuple[str, int, int | str]  # method, block, and head or "mean"


class PhotoBatch(NamedTuple):
    """Decoded photos and their regions, as masks.PetPhoto has them of one photo."""

    indices: list[int]
    pixels: Tensor  # uint8 (B, 3, h, w)
    regions: Tensor  # (B, 2, 2, P)


@dataclass
class Measured:
    """The results of all photos that can be scored.

    Of a model of ViT-B/16's size, a photo takes 5 kB of scores and 0.8 kB of its map. Dictionaries
    are keyed like the models: "model" and, if there is one, "base".
    """

    photos: list[int]  # the indices of these photos
    left_out: dict[str, list[str]]  # the file names of the other photos, by reason
    without_head: dict[str, list[str]]  # those of photos whose head box cannot be used, by reason
    map_keys: list[MapKey]
    equal_blocks: int  # how many blocks, from block 0 on, have the same weights in all models
    scores: dict[str, np.ndarray]  # (n, M, 2 regions, 4 metrics), NaN where there is no head box
    maps: dict[str, np.ndarray]  # (n, gh, gw), the mean over the last block's heads
    times_chance: dict[str, np.ndarray]  # (n,), the score of these maps on the pet
    pet_area: np.ndarray  # (n,), the pet's share of what the model sees, without the mask's border
    predicted: np.ndarray  # (n,), the class that "model" predicts
    probability: np.ndarray  # (n,), the probability of that class


def measure(
    models: Mapping[str, ViT],
    paths: Sequence[Path],
    *,
    blocks: Sequence[int],
    methods: Sequence[str],
    workers: int,
    equal_blocks: int = 0,
) -> Measured:
    """Score the maps that a "model", and a "base" of the same architecture, make of photos.

    Workers decode photos in the meantime. `blocks` are sorted. Of the first `equal_blocks` blocks
    (see count_equal_blocks), the maps must be the same in both models. Raises UserError if no photo
    can be scored, and RuntimeError if the maps of such a block differ.
    """
    model = models["model"]
    keys = map_keys(blocks, model.config.num_heads, methods)
    results: dict[str, Tensor] = {}
    photos: list[int] = []
    left_out: dict[str, list[str]] = {}
    without_head: dict[str, list[str]] = {}
    reading = read_photos(
        paths, model, workers=workers, left_out=left_out, without_head=without_head
    )
    bar = progress_bar(total=len(paths), unit="photo")
    with torch.inference_mode(), bar as progress:
        for batch in reading:
            rows = slice(len(photos), len(photos) + len(batch.indices))
            for name, values in measure_batch(models, batch, blocks, methods).items():
                # The memory for all photos is allocated at once. Small tensors that are kept after
                # each batch would fragment the device's memory, which would then grow.
                if name not in results:
                    results[name] = values.new_empty(len(paths), *values.shape[1:])
                results[name][rows] = values
            photos += batch.indices
            progress.update(batch.indices[-1] + 1 - progress.n)
    if not photos:
        reasons = ", ".join(sorted(left_out))
        raise UserError(
            f"{paths[0].parents[1]}: none of {len(paths)} photos can be scored: {reasons}"
        )
    results = {name: values[: len(photos)].cpu() for name, values in results.items()}
    for (method, block, _), differ in zip(keys, results["differ"].any(0)):
        if method == "attention" and block < equal_blocks and differ:
            raise RuntimeError(
                f"block {block}: its maps differ, though it and all before it have equal weights"
            )

    def by_model(name: str) -> dict[str, np.ndarray]:
        return dict(zip(models, results[name].transpose(0, 1).numpy()))

    return Measured(
        photos=photos,
        left_out=dict(sorted(left_out.items())),
        without_head=dict(sorted(without_head.items())),
        map_keys=keys,
        equal_blocks=equal_blocks,
        scores=by_model("scores"),
        maps=by_model("maps"),
        times_chance=by_model("times_chance"),
        pet_area=results["pet_area"].numpy(),
        predicted=results["predicted"].numpy(),
        probability=results["probability"].numpy(),
    )


def measure_batch(
    models: Mapping[str, ViT], batch: PhotoBatch, blocks: Sequence[int], methods: Sequence[str]
) -> dict[str, Tensor]:
    """Return the results of B photos by name, as in Measured, with the K models in dimension 1.

    There is one more, "differ" (B, M): whether the models' maps differ.
    """
    model = models["model"]
    config = model.config
    device = model.cls_token.device
    images = model.preprocess.normalize(batch.pixels.to(device))
    outputs = [model_maps(each, images, blocks, methods) for each in models.values()]
    logits, _ = outputs[0]  # "model" comes first.
    probability, predicted = logits.float().softmax(1).max(1)
    maps = torch.stack([each for _, each in outputs], 1)  # (B, K, M, P)
    last = len(blocks) * (config.num_heads + 1) - 1  # the mean over the last block's heads

    regions = batch.regions.to(device)
    inside, outside = regions.unbind(2)  # (B, 2, P)
    flat = maps.flatten(1, 2)
    pet = region_scores(flat, inside[:, 0], outside[:, 0])
    head = torch.full_like(pet, torch.nan)
    if batch.regions[:, 1].any():
        head = region_scores(flat, inside[:, 1], outside[:, 1])
    scores = torch.stack([pet, head], 2).unflatten(1, maps.shape[1:3])  # (B, K, M, 2, 4)
    return {
        "scores": scores,
        "maps": maps[:, :, last].unflatten(2, config.grid),
        "times_chance": scores[:, :, last, 0, 1],
        "pet_area": inside[:, 0].sum(1) / regions[:, 0].sum((1, 2)),
        "predicted": predicted,
        "probability": probability,
        "differ": (maps != maps[:, :1]).any(3).any(1),
    }


def model_maps(
    model: ViT, images: Tensor, blocks: Sequence[int], methods: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the logits of images (B, 3, h, w) and the class token's maps (B, M, P) of them.

    The maps are in the order of map_keys.
    """
    logits, attn = model.forward_with_attention(images, blocks, queries=[CLASS_TOKEN])
    heads = patch_maps(model, attn, blocks)
    maps = [torch.cat([heads, heads.mean(2, keepdim=True)], 2)]
    if "rollout" in methods:
        _, rows = forward_with_rollout(model, images, blocks, queries=[CLASS_TOKEN])
        maps.append(patch_maps(model, rows, blocks))
    if "relevance" in methods:
        # method_rows would compute the logits again.
        relevance = class_relevance(model, images, logits.argmax(1), blocks)
        rows = {block: of_block[:, None] for block, of_block in relevance.items()}
        maps.append(patch_maps(model, rows, blocks))
    return logits, torch.cat([each.flatten(1, 2) for each in maps], 1)


def patch_maps(model: ViT, rows: Mapping[int, Tensor], blocks: Sequence[int]) -> Tensor:
    """Turn each block's rows (B, H, 1, N) of the class token into maps (B, L, H, P)."""
    config = model.config
    maps = [
        query_maps(rows[block], config.grid, num_registers=config.num_registers) for block in blocks
    ]
    return torch.stack(maps, 1).flatten(3)


def map_keys(blocks: Sequence[int], num_heads: int, methods: Sequence[str]) -> list[MapKey]:
    """Return the keys of the M maps that model_maps returns, in their order."""
    keys: list[MapKey] = []
    for block in blocks:
        for head in range(num_heads):
            keys.append(("attention", block, head))
        keys.append(("attention", block, "mean"))
    for method in methods:
        if method != "attention":
            keys += [(method, block, "mean") for block in blocks]
    return keys


def count_equal_blocks(model: ViT, other: ViT) -> int:
    """Return how many blocks, from block 0 on, have equal weights and equal inputs in both models.

    All weights outside of the blocks, the final norm and the head make block 0's input, so the
    answer is 0 if one of these differs. The models have the same sizes and preprocessing.
    """
    # Positions count as they enter block 0, resampled to the models' input size.
    weights = dict(model.named_parameters()) | {"pos_embed": model.positions()}
    other_weights = dict(other.named_parameters()) | {"pos_embed": other.positions()}
    first_unequal = model.config.depth
    for name, tensor in weights.items():
        if name.startswith(AFTER_BLOCKS) or tensor.equal(other_weights[name]):
            continue
        if not name.startswith("blocks."):
            return 0
        block = int(name.split(".")[1])
        first_unequal = min(first_unequal, block)
    return first_unequal


def read_photos(
    paths: Sequence[Path],
    model: ViT,
    *,
    workers: int,
    left_out: dict[str, list[str]],
    without_head: dict[str, list[str]],
) -> Iterator[PhotoBatch]:
    """Yield photos in batches, which are read a little ahead of their use.

    The names of photos that cannot be scored are added to `left_out`, by reason, and those of
    photos whose head box cannot be used to `without_head`.
    """
    jobs = (
        (paths[start : start + CHUNK], model.preprocess, model.config.grid)
        for start in range(0, len(paths), CHUNK)
    )
    indices: list[int] = []
    photos: list[PetPhoto] = []
    for index, photo in read_in_workers(read_pets, jobs, paths, workers=workers, left_out=left_out):
        if photo.head_problem:
            without_head.setdefault(photo.head_problem, []).append(paths[index].name)
        indices.append(index)
        photos.append(photo)
        if len(photos) == BATCH:
            yield stack_photos(indices, photos)
            indices = []
            photos = []
    if photos:
        yield stack_photos(indices, photos)


def read_in_workers(
    read: Callable[..., list[T | str]],
    jobs: Iterable[tuple],
    paths: Sequence[Path],
    *,
    workers: int,
    left_out: dict[str, list[str]],
) -> Iterator[tuple[int, T]]:
    """Yield the index of each photo and what `read` returns of it, a little ahead of its use.

    Each job has the arguments that read the next photos of `paths`. Where `read` returns a string,
    the photo cannot be used: its name is added to `left_out` under this reason.
    """
    num_processes = processes_worth_starting(paths, workers)
    with worker_pool(num_processes, read.__module__) as pool:
        chunks = map_ahead(pool, read, jobs, ahead=2 * workers)
        for index, photo in enumerate(itertools.chain.from_iterable(chunks)):
            if isinstance(photo, str):
                left_out.setdefault(photo, []).append(paths[index].name)
            else:
                yield index, photo


def stack_photos(indices: list[int], photos: Sequence[PetPhoto]) -> PhotoBatch:
    pixels = np.stack([photo.pixels for photo in photos])
    regions = np.stack([photo.regions for photo in photos])
    return PhotoBatch(indices, torch.from_numpy(pixels), torch.from_numpy(regions))
