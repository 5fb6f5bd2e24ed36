"""The table at the start of a run: what will train, on which photos, on which device."""

from __future__ import annotations

import itertools

import torch

from ..data.datasets import Data
from ..model import ViT


def describe_training(model: ViT, data: Data, device: torch.device, amp: torch.dtype | None) -> str:
    """Say what trains, on which photos, and where, as a table."""
    c = model.config
    parts = {"embeddings": [model.cls_token, model.pos_embed, *model.patch_embed.parameters()]}
    for _, same in itertools.groupby(
        range(c.depth), lambda i: model.blocks[i].norm1.weight.requires_grad
    ):
        run = list(same)
        name = f"blocks {run[0]}-{run[-1]}" if len(run) > 1 else f"block {run[0]}"
        parts[name] = [parameter for i in run for parameter in model.blocks[i].parameters()]
    parts |= {
        "norm": list(model.norm.parameters()),
        "head": list(model.head.parameters()),
        "all": list(model.parameters()),
    }
    lines = [
        f"{model.origin.source}: {c.depth} blocks, {c.num_heads} heads, {c.embed_dim} wide, "
        f"{c.img_size[0]} x {c.img_size[1]} pixels in patches of {c.patch_size}",
        f"{len(data.classes)} classes; photos: {count_photos(data)}",
        f"on {device}, {'mixed precision with ' + str(amp).removeprefix('torch.') if amp else 'float32'}\n",
        f"{'':12} {'parameters':>12} {'trained':>12}",
    ]
    for name, parameters in parts.items():
        total, trained = (
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
        )
        lines.append(f"{name:12} {total:12,} {trained:12,}")
    return "\n".join(lines) + "\n"


def count_photos(data: Data) -> str:
    return f"{len(data.train):,} training, {len(data.val):,} validation, {len(data.test):,} test"
