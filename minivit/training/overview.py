"""The table at the start of a run: what trains, on which photos and on which device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..data.datasets import Data
from ..model import ViT


def describe_training(model: ViT, data: Data, device: torch.device, amp: torch.dtype | None) -> str:
    """Describe in a table what trains, on which photos and on which device."""
    c = model.config
    precision = "float32"
    if amp is not None:
        precision = f"mixed precision with {str(amp).removeprefix('torch.')}"
    lines = [
        f"{model.origin.source}: {c.depth} blocks, {c.num_heads} heads, {c.embed_dim} wide, "
        f"{c.img_size[0]} x {c.img_size[1]} pixels in patches of {c.patch_size}",
        f"{len(data.classes)} classes; photos: {count_photos(data)}",
        f"on {device}, {precision}",
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


def _count_parameters(name: str, parameters: Sequence[torch.nn.Parameter]) -> str:
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{name:12} {total:12,} {trained:12,}"


def count_photos(data: Data) -> str:
    return f"{len(data.train):,} training, {len(data.val):,} validation, {len(data.test):,} test"
