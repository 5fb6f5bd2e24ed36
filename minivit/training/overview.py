"""The table at the start of a run: what trains, on which photos and on which device."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import torch

from ..data.datasets import Data
from ..errors import printable
from ..model import ViT
from ..settings import MAX_BATCH, MIN_EPOCHS, MIN_STEPS, TrainSettings


def describe_training(
    model: ViT,
    data: Data,
    settings: TrainSettings,
    device: torch.device,
    amp: torch.dtype | None,
) -> str:
    """Describe in a table what trains, on which photos and on which device, and for how long."""
    c = model.config
    precision = "float32"
    if amp is not None:
        precision = f"mixed precision with {str(amp).removeprefix('torch.')}"
    lines = [
        f"{model.origin.source}: {c.depth} blocks, {c.num_heads} heads, {c.embed_dim} wide, "
        f"{c.img_size[0]} x {c.img_size[1]} pixels in patches of {c.patch_size}",
        f"{len(data.classes)} classes; photos: {count_photos(data)}",
        f"on {device}, {precision}",
        *describe_class_weights(data, settings),
        *describe_epochs(model, data, settings),
        "",
        f"{'':12} {'parameters':>12} {'trained':>12}",
        _count_parameters(
            "embeddings", [model.cls_token, model.pos_embed, *model.patch_embed.parameters()]
        ),
    ]
    # Neighbouring blocks share a line if they are all trainable or all frozen.
    groups = itertools.groupby(
        range(c.depth), key=lambda i: model.blocks[i].norm1.weight.requires_grad
    )
    for _, group in groups:
        indices = list(group)
        name = f"blocks {indices[0]}-{indices[-1]}" if len(indices) > 1 else f"block {indices[0]}"
        parameters = [p for i in indices for p in model.blocks[i].parameters()]
        lines.append(_count_parameters(name, parameters))
    lines.append(_count_parameters("norm", list(model.norm.parameters())))
    lines.append(_count_parameters("head", list(model.head.parameters())))
    lines.append(_count_parameters("all", list(model.parameters())))
    return "\n".join(lines) + "\n"


def describe_class_weights(data: Data, settings: TrainSettings) -> list[str]:
    """Say how much a photo of the largest and of the smallest class counts, if not the same."""
    if settings.class_weights != "balanced":
        return []
    sizes = Counter(data.train.labels)
    by_size = sorted(sizes, key=sizes.__getitem__)
    described = []
    for label in (by_size[0], by_size[-1]):
        weight = len(data.train) / (len(sizes) * sizes[label])
        described.append(f"{weight:.2f} times ({printable(data.classes[label])})")
    return [f"classes count the same: each photo counts {' to '.join(reversed(described))}"]


def describe_epochs(model: ViT, data: Data, settings: TrainSettings) -> list[str]:
    """Say how many epochs there are and how photos are augmented, and why if it was chosen."""
    trains_blocks = any(
        parameter.requires_grad for block in model.blocks for parameter in block.parameters()
    )
    if not trains_blocks:
        return ["the head alone is fitted once to the frozen model, so there are no epochs"]
    num_train = len(data.train)
    steps = settings.steps_per_epoch(num_train)
    epochs = (
        f"{count(settings.epochs, 'epoch')} of {count(steps, 'step')} "
        f"of {count(settings.batch_size, 'photo')}"
    )
    photos_are_few = MIN_EPOCHS * math.ceil(num_train / MAX_BATCH) < MIN_STEPS
    if "epochs" in settings.chosen and photos_are_few:
        epochs += f", to take at least {MIN_STEPS} steps with few photos"
    views = "photos are augmented anew in each epoch"
    if settings.views_to_keep():
        views = f"{settings.cache_views} augmented views of each photo are kept for all epochs"
        if "cache_views" in settings.chosen:
            views += ", because frozen blocks are slow on a CPU (--cache-views 0 keeps none)"
    return [epochs, views]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _count_parameters(name: str, parameters: Sequence[torch.nn.Parameter]) -> str:
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{name:12} {total:12,} {trained:12,}"


def count_photos(data: Data) -> str:
    return f"{len(data.train):,} training, {len(data.val):,} validation, {len(data.test):,} test"
