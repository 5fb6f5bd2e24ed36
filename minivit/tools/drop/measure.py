"""What models answer when they are shown only some patches of a photo.

Patches are left out after positions were added and before block 0. The class token and registers
always stay. Shapes: n photos, B of a batch, P patches, N tokens, D embed_dim, K conditions.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...attention import CLASS_TOKEN, METHODS, method_rows, query_maps
from ...errors import UserError
from ...model import ViT
from ...system.device import cpu_batch
from ...system.progress import progress_bar
from ..score.measure import CHUNK, read_in_workers
from .conditions import (
    CONDITIONS,
    OTHER_CLASS,
    SAME_CLASS,
    PatchSets,
    Shown,
    order_by_importance,
    show_joined,
    spread_classes,
)
from .photos import DropPhoto, read_photos

# Photos whose pixels are in memory together. Their conditions are sorted by the number of patches
# that are shown, so that a batch needs no padding; many photos fill the batches.
WINDOW = 1024
GPU_BATCH = 128
NO_ANSWER = -1  # where a condition cannot be shown of a photo
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the patches, left out in the order of a map

MASK = "mask"  # the share of each patch that is pet, taken as a map
RANDOM = "random"


class MapKey(NamedTuple):
    """Patches left out in the order of a map."""

    method: str  # one of attention.METHODS, MASK or RANDOM
    block: int | None  # None for MASK and RANDOM
    most_important_first: bool
    fraction: float  # that is left out


Key = str | MapKey  # of a condition


class Question(NamedTuple):
    """A photo of the window, what is shown of it, and the condition."""

    photo: int
    key: Key
    shown: Shown


@dataclass
class Window:
    """Photos that are in memory together."""

    photos: list[int]  # their indices among all photos
    pixels: Tensor  # uint8 (W, 3, h, w)
    sets: list[PatchSets]
    shown: list[dict[str, Shown]]  # of each photo, by condition


@dataclass
class Answers:
    """The classes (n,) that each model answered under each condition."""

    photos: list[int]  # the indices of the photos that were taken
    left_out: dict[str, list[str]]  # the names of the others, by reason
    predicted: dict[str, dict[Key, np.ndarray]]  # NO_ANSWER where a condition cannot be shown
    # What the main thread spent: waiting for photos, which workers read meanwhile, and on the
    # conditions and the maps of all models.
    seconds: dict[str, float]


def ask(
    models: Mapping[str, ViT],
    paths: Sequence[Path],
    labels: Sequence[int],
    *,
    map_blocks: Sequence[int],
    workers: int,
    seed: int,
) -> Answers:
    """Ask each model about each photo under all conditions; `labels` has each photo's class.

    For `map_blocks` the patches are left out in the order of these blocks' maps, too. The models
    have the same preprocessing and patches. Raises UserError if no photo can be taken.
    """
    seconds = dict.fromkeys(("reading", "conditions", "maps"), 0.0)
    answers = Answers([], {}, {}, seconds)
    parts: dict[str, list[dict[Key, np.ndarray]]] = {name: [] for name in models}
    label_of = np.asarray(labels)
    first = next(iter(models.values()))
    preprocess, grid = first.preprocess, first.config.grid
    jobs = (
        (paths[start : start + CHUNK], start, preprocess, grid, seed)
        for start in range(0, len(paths), CHUNK)
    )
    reading = read_in_workers(read_photos, jobs, paths, workers=workers, left_out=answers.left_out)
    bar = progress_bar(total=len(paths), unit="photo")
    with torch.inference_mode(), bar as progress:
        while True:
            with timed(seconds, "reading"):
                window = next_window(reading, first)
            if window is None:
                break
            for name, model in models.items():
                with timed(seconds, "conditions"):
                    questions = ask_about_conditions(window, label_of[window.photos])
                    no_answer = np.full(len(window.photos), NO_ANSWER)
                    predicted: dict[Key, np.ndarray] = {}
                    predicted.update((key, no_answer) for key in CONDITIONS)
                    predicted |= answer(model, window, questions)
                if map_blocks:
                    with timed(seconds, "maps"):
                        # All models' maps have the same random order beside them.
                        rng = np.random.default_rng([seed, window.photos[0]])
                        questions = ask_in_order_of_maps(model, window, map_blocks, rng)
                        predicted |= answer(model, window, questions)
                parts[name].append(predicted)
            answers.photos += window.photos
            progress.update(window.photos[-1] + 1 - progress.n)
            del window  # Only one is in memory at a time.
    if not answers.photos:
        reasons = ", ".join(sorted(answers.left_out))
        raise UserError(f"none of {len(paths)} photos can be taken: {reasons}")
    for name, windows_of_model in parts.items():
        # Every window has all conditions and the same maps, and thus the same keys.
        answers.predicted[name] = {
            key: np.concatenate([part[key] for part in windows_of_model])
            for key in windows_of_model[0]
        }
    return answers


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds that the block takes. Answers come to the CPU, so a GPU is waited for."""
    started = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - started


def next_window(reading: Iterator[tuple[int, DropPhoto]], model: ViT) -> Window | None:
    """Return the next photos that are read, with their indices; None if there are no more."""
    # Allocated at once, so that no photo is in memory twice.
    pixels = torch.empty((WINDOW, 3, *model.config.img_size), dtype=torch.uint8)
    window = Window([], pixels, [], [])
    for row, (index, photo) in enumerate(itertools.islice(reading, WINDOW)):
        pixels[row] = torch.from_numpy(photo.pixels)
        window.photos.append(index)
        window.sets.append(photo.sets)
        window.shown.append(photo.shown)
    window.pixels = pixels[: len(window.photos)].to(model.cls_token.device)
    return window if window.photos else None


def ask_about_conditions(window: Window, labels: np.ndarray) -> list[Question]:
    """Return a question for each photo and condition that can be shown."""
    questions = []
    for photo, sets in enumerate(window.sets):
        for key, shown in window.shown[photo].items():
            questions.append(Question(photo, key, shown))
        for key, same_class in ((SAME_CLASS, True), (OTHER_CLASS, False)):
            partner = next_photo(photo, labels, same_class)
            if partner is not None:
                joined = show_joined(sets, partner, window.sets[partner])
                questions.append(Question(photo, key, joined))
    return questions


def next_photo(photo: int, labels: np.ndarray, same_class: bool) -> int | None:
    """Return the next photo of the same or of another class, from the start again at the end."""
    others = np.roll(np.arange(len(labels)), -photo - 1)[:-1]
    suitable = others[(labels[others] == labels[photo]) == same_class]
    return int(suitable[0]) if len(suitable) else None


def ask_in_order_of_maps(
    model: ViT, window: Window, blocks: Sequence[int], rng: np.random.Generator
) -> list[Question]:
    """Return a question for each photo, map, order and fraction that is left out."""
    num_patches = len(window.sets[0].pet_area)
    maps: dict[tuple[str, int | None], np.ndarray] = {
        (MASK, None): np.stack([sets.pet_area for sets in window.sets]),
        (RANDOM, None): rng.random((len(window.sets), num_patches)),
    }
    maps |= class_token_maps(model, window.pixels, blocks)
    questions = []
    for (method, block), values in maps.items():
        for photo, importance in enumerate(values):
            # There are many of these, so they are stored in fewer bytes.
            order = order_by_importance(importance, rng).astype(np.int32)
            for fraction in FRACTIONS:
                num_out = round(fraction * num_patches)
                for most_first in (True, False):
                    shown = order[num_out:] if most_first else order[: num_patches - num_out]
                    key = MapKey(method, block, most_first, fraction)
                    questions.append(Question(photo, key, Shown(np.sort(shown))))
    return questions


def class_token_maps(
    model: ViT, pixels: Tensor, blocks: Sequence[int]
) -> dict[tuple[str, int | None], np.ndarray]:
    """Return the class token's maps (W, P) of pixels (W, 3, h, w), by method and block.

    Attention is the mean of the heads. Relevance explains the first prediction.
    """
    maps: dict[tuple[str, int | None], list[np.ndarray]] = {}
    for batch in pixels.split(batch_size(model)):
        images = model.preprocess.normalize(batch)
        for method in METHODS:
            _, rows = method_rows(model, images, blocks, method=method, queries=[CLASS_TOKEN])
            for block, attn in rows.items():
                by_head = query_maps(
                    attn, model.config.grid, num_registers=model.config.num_registers
                )
                values = by_head.float().mean(1).flatten(1).cpu().numpy()
                maps.setdefault((method, block), []).append(values)
    return {key: np.concatenate(values) for key, values in maps.items()}


def answer(model: ViT, window: Window, questions: Sequence[Question]) -> dict[Key, np.ndarray]:
    """Return the classes (W,) that are predicted, by condition.

    Questions that show equally many patches are answered together.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, question in enumerate(questions):
        own, partner, of_partner = question.shown
        group = len(own) + len(of_partner), partner is not None
        groups.setdefault(group, []).append(i)
    predicted: dict[Key, np.ndarray] = {}
    for question in questions:
        predicted.setdefault(question.key, np.full(len(window.photos), NO_ANSWER))
    batch = batch_size(model)
    waiting: list[tuple[list[int], Tensor]] = []  # results that are still on the device
    for indices in groups.values():
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            tokens = shown_tokens(model, window.pixels, [questions[i] for i in chosen])
            waiting.append((chosen, model.logits(tokens).argmax(1)))
    for chosen, result in waiting:
        for i, predicted_class in zip(chosen, result.tolist()):
            question = questions[i]
            predicted[question.key][question.photo] = predicted_class
    return predicted


def shown_tokens(model: ViT, pixels: Tensor, questions: Sequence[Question]) -> Tensor:
    """Return the tokens (B, N, D) that enter block 0: only those of the patches that are shown.

    All questions show equally many patches, and all or none of them have a partner.
    """
    num_patches = model.config.num_tokens - 1 - model.config.num_registers
    first_patch = 1 + model.config.num_registers
    photos = torch.tensor([question.photo for question in questions], device=pixels.device)
    tokens = model.embed(model.preprocess.normalize(pixels[photos]))
    indices = [question.shown.own for question in questions]
    if questions[0].shown.partner is not None:
        partners = [question.shown.partner for question in questions]
        others = pixels[torch.tensor(partners, device=pixels.device)]
        of_partners = model.embed(model.preprocess.normalize(others))[:, first_patch:]
        tokens = torch.cat([tokens, of_partners], 1)
        indices = [
            np.concatenate([question.shown.own, num_patches + question.shown.of_partner])
            for question in questions
        ]
    patches = torch.from_numpy(np.stack(indices)).long().to(tokens.device) + first_patch
    always = torch.arange(first_patch, device=tokens.device).expand(len(questions), -1)
    kept = torch.cat([always, patches], 1)
    return tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))


def batch_size(model: ViT) -> int:
    dtype = model.cls_token.dtype
    if model.cls_token.device.type == "cpu":
        return cpu_batch(None if dtype is torch.float32 else dtype)
    return GPU_BATCH


def order_of_photos(labels: Sequence[int], count: int | None, seed: int) -> list[int]:
    """Return which photos to take and in which order: `count` of them, or all."""
    order = spread_classes(np.asarray(labels), np.random.default_rng(seed))
    return order[:count].tolist()
