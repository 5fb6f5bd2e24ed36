#!/usr/bin/env python3
"""Make minivit/checkpoints/demo_model, the embedded checkpoint of the demo.

It is a small ViT that names the household object in a drawn room. Most rooms have an animal too, of
no breed in particular, which is never a label, so the classifier learns to ignore it. As in a large
model, the tokens that enter the last two blocks should hold more than these labels need: a linear
layer, discarded at the end, predicts from each token whether its patch shows an animal and what the
surroundings of the patch look like.

It takes four minutes on an H100 with 16 cores that draw, and a night on two cores. The weights in
the repository come from such a run (98.6% accuracy on new rooms), with an earlier version of the
drawings: 400 x 300 pixels, some of them dimmer, the colours of four breeds paler.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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
from minivit.checkpoints.hub import DEMO
from minivit.data.augment import augment, draw_augmentation
from minivit.system.device import pick_amp, pick_device
from minivit.tools.demo import scenes
from minivit.tools.demo.animals import BREEDS, PARTS, Breed
from minivit.tools.demo.painting import pick
from minivit.training.optimizer import lr_at, parameter_groups

CONFIG = ViTConfig(
    embed_dim=96, depth=12, num_heads=3, mlp_dim=384, num_classes=len(scenes.OBJECTS), eps=1e-6
)
PREPROCESS, THINGS, CUT = Preprocess(), list(scenes.OBJECTS), 10
WITH_ANIMAL, NUM_VAL, BATCH, PEAK_LR, WEIGHT_DECAY = 0.7, 1000, 128, 1e-3, 0.05
PATTERNS = ("plain", "stripes", "spots", "patches", "saddle")  # of coats


def random_breed(rng: np.random.Generator) -> Breed:
    """Return an animal of no breed: each part is that of a random breed, some in random colours."""
    looks = {}
    for field in dataclasses.fields(Breed):
        looks[field.name] = getattr(pick(rng, list(BREEDS.values())), field.name)
    colours = ["#" + bytes(rng.integers(20, 250, 3).tolist()).hex() for _ in PARTS]
    looks["pattern"] = pick(rng, PATTERNS)
    for part, colour in zip(PARTS, colours):
        if rng.random() < 0.3:
            looks[part] = colour
    return Breed(**looks)


def draw(index: int) -> np.ndarray:
    """Draw a room with one of the objects in turn: uint8 (5, 224, 224).

    The channels are the photo's three colours, the animal's mask and its head's mask.
    """
    rng = np.random.default_rng([1, index])
    breed = random_breed(rng) if rng.random() < WITH_ANIMAL else None
    photo, mask, head = scenes.draw_scene(rng, THINGS[index % len(THINGS)], breed)
    where = Image.new("L", mask.size)
    if head:
        where.paste(255, head)
    animal = mask.point(lambda v: 255 * (v == scenes.PET))
    maps = [np.asarray(m.resize(CONFIG.img_size, Image.Resampling.BOX)) for m in (animal, where)]
    return np.concatenate([PREPROCESS.pixels(photo).numpy(), np.minimum(maps, maps[0])])


def surroundings(images: Tensor) -> Tensor:
    """Return the 3 x 3 patches around each patch of images (B, 3, h, w): (B, patches, 432).

    Each of these patches is reduced to 4 x 4 pixels.
    """
    small = F.avg_pool2d(images, 4)
    return F.unfold(F.pad(small, [4] * 4, mode="reflect"), 12, stride=4).mT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=18_000)
    parser.add_argument("--epochs", type=int, default=28)
    parser.add_argument("--out", type=Path, default=DEMO)
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
                group["lr"] = lr_at(step, peak=PEAK_LR, total=total)
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
            f"epoch {epoch}: loss {names:.4f} (names), {where:.4f} (animal), "
            f"{around:.4f} (surroundings); "
            f"accuracy on new rooms {accuracy:.4f}; {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        save_pretrained(copy.deepcopy(model).cpu().half(), args.out)


if __name__ == "__main__":
    main()
