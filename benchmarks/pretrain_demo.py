#!/usr/bin/env python3
"""Make minivit/demo_model, the embedded checkpoint: a small ViT that names the household objects of drawn rooms.

Most rooms have an animal, of no breed in particular, that is never named: the classifier learns to overlook it. As a
large model's would, the tokens before the last two blocks hold more than those names need: a linear layer, thrown away
at the end, reads from each token what its patch's surroundings look like and whether an animal is there.
Takes four minutes on an H100 with 16 cores to draw; on two cores, a night. The weights in the repository are such a run's
(98.6% of new rooms named right), from drawings of an earlier day: 400 x 300 pixels, some dimmer, colours of four breeds paler.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minivit import Preprocess, ViT, ViTConfig, save_pretrained
from minivit.data.datasets import augment, draw_augmentation
from minivit.system.device import pick_amp, pick_device
from minivit.tools.demo import scenes
from minivit.training.optimizer import lr_at, parameter_groups

CONFIG = ViTConfig(
    embed_dim=96, depth=12, num_heads=3, mlp_dim=384, num_classes=len(scenes.OBJECTS), eps=1e-6
)
PREPROCESS, THINGS, CUT = Preprocess(), list(scenes.OBJECTS), 10
WITH_ANIMAL, NUM_VAL, BATCH, PEAK_LR, WEIGHT_DECAY = 0.7, 1000, 128, 1e-3, 0.05


def draw(index: int) -> np.ndarray:
    """Draw a room with the object of this index modulo their number: uint8 (5, 224, 224), colours, animal, its head."""
    rng = np.random.default_rng([1, index])
    breed = scenes.random_breed(rng) if rng.random() < WITH_ANIMAL else None
    photo, mask, head = scenes.draw_scene(rng, THINGS[index % len(THINGS)], breed)
    where = Image.new("L", mask.size)
    if head:
        where.paste(255, head)
    animal = mask.point(lambda v: 255 * (v == scenes.PET))
    maps = [np.asarray(m.resize(CONFIG.img_size, Image.Resampling.BOX)) for m in (animal, where)]
    return np.concatenate([PREPROCESS.pixels(photo).numpy(), np.minimum(maps, maps[0])])


def surroundings(images: Tensor) -> Tensor:
    """Return for each patch of images (B, 3, h, w) the 3 x 3 patches around it, 4 x 4 pixels each: (B, patches, 432)."""
    small = F.avg_pool2d(images, 4)
    return F.unfold(F.pad(small, [4] * 4, mode="reflect"), 12, stride=4).mT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=18_000)
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--out", type=Path, default=Path(scenes.__file__).with_name("demo_model"))
    args = parser.parse_args()
    started, device = time.perf_counter(), pick_device("auto")
    amp = pick_amp("auto", device)
    torch.manual_seed(0)
    pixels = torch.empty(args.photos + NUM_VAL, 5, *CONFIG.img_size, dtype=torch.uint8)
    with ProcessPoolExecutor(
        os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for i, drawn in enumerate(pool.map(draw, range(len(pixels)), chunksize=64)):
            pixels[i] = torch.from_numpy(drawn)
    pixels, labels = pixels.to(device), (torch.arange(len(pixels)) % len(THINGS)).to(device)
    print(f"{len(pixels):,} rooms drawn after {time.perf_counter() - started:.0f} s", flush=True)

    model = ViT(CONFIG).to(device)
    model.labels, model.preprocess = tuple(THINGS), PREPROCESS
    reader = nn.Sequential(nn.LayerNorm(CONFIG.embed_dim), nn.Linear(CONFIG.embed_dim, 2 + 432)).to(
        device
    )
    groups = [*parameter_groups(model, WEIGHT_DECAY), *parameter_groups(reader, WEIGHT_DECAY)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    generator, step = torch.Generator().manual_seed(0), 0
    total = args.epochs * math.ceil(args.photos / BATCH)
    args.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(1, args.epochs + 1):
        losses = []
        for index in torch.randperm(args.photos, generator=generator).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, peak=PEAK_LR, warmup=total // 20, total=total)
            drawn, draws = pixels[index], draw_augmentation(len(index), generator)
            drawn = augment(
                torch.cat([PREPROCESS.normalize(drawn[:, :3]), drawn[:, 3:] / 255], 1), draws
            )
            images, animal = (
                drawn[:, :3],
                F.avg_pool2d(drawn[:, 3:], CONFIG.patch_size).flatten(2).mT,
            )  # (B, patches, 2)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                tokens = model.tokens(images, stop=CUT)
                logits, read = (
                    model.logits(tokens, start=CUT).float(),
                    reader(tokens[:, 1:]).float(),
                )
            parts = (
                F.cross_entropy(logits, labels[index]),
                F.binary_cross_entropy_with_logits(read[..., :2], animal),
                F.mse_loss(read[..., 2:], surroundings(images)),
            )
            optimizer.zero_grad(set_to_none=True)
            sum(parts).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(torch.stack(parts).detach())
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype=amp, enabled=amp is not None),
        ):
            val = pixels[args.photos :, :3].split(BATCH)
            predicted = torch.cat([model(PREPROCESS.normalize(part)).argmax(1) for part in val])
        accuracy = (predicted == labels[args.photos :]).float().mean().item()
        names, where, around = torch.stack(losses).mean(0).tolist()
        print(
            f"epoch {epoch}: loss {names:.4f} names, {where:.4f} animal, {around:.4f} surroundings; "
            f"new rooms named {accuracy:.4f}; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        save_pretrained(copy.deepcopy(model).cpu().half(), args.out)


if __name__ == "__main__":
    main()
