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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from results import figure_of, parse, record
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
PREPROCESS = Preprocess()
THINGS = list(scenes.OBJECTS)
CUT = 10  # The tokens that enter this block should hold more than the labels need.
ANIMAL_SHARE = 0.7  # of the rooms
NUM_VAL = 1000
BATCH = 128
PEAK_LR = 1e-3
WEIGHT_DECAY = 0.05
PATTERNS = ("plain", "stripes", "spots", "patches", "saddle")  # of coats
PATCH_PIXELS = 432  # what surroundings() returns of each patch


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
    has_animal = rng.random() < ANIMAL_SHARE
    breed = random_breed(rng) if has_animal else None
    photo, mask, head = scenes.draw_scene(rng, THINGS[index % len(THINGS)], breed)
    head_mask = Image.new("L", mask.size)
    if head:
        head_mask.paste(255, head)
    animal_mask = mask.point([255 * (value == scenes.PET) for value in range(256)])
    masks = []
    for image in (animal_mask, head_mask):
        masks.append(np.asarray(image.resize(CONFIG.img_size, Image.Resampling.BOX)))
    # The head's mask is a box: only the animal within it counts.
    channels = np.minimum(masks, masks[0])
    return np.concatenate([PREPROCESS.pixels(photo).numpy(), channels])


def surroundings(images: Tensor) -> Tensor:
    """Return the 3 x 3 patches around each patch of images (B, 3, h, w): (B, patches, 432).

    Each of these patches is reduced to 4 x 4 pixels.
    """
    small = F.avg_pool2d(images, 4)
    return F.unfold(F.pad(small, [4] * 4, mode="reflect"), 12, stride=4).mT


def draw_all(n: int) -> Tensor:
    """Draw n rooms in worker processes: uint8 (n, 5, 224, 224)."""
    rooms = torch.empty(n, 5, *CONFIG.img_size, dtype=torch.uint8)
    with ProcessPoolExecutor(
        os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for i, room in enumerate(pool.map(draw, range(n), chunksize=64)):
            rooms[i] = torch.from_numpy(room)
    return rooms


class Losses(NamedTuple):
    """The parts of the loss, which are added up."""

    names: Tensor
    animal: Tensor
    surroundings: Tensor


class Pretraining:
    """A model, the linear reader of its tokens, and what trains both."""

    def __init__(self, device: torch.device, total_steps: int) -> None:
        self.device = device
        self.amp = pick_amp("auto", device)
        self.model = ViT(CONFIG).to(device)
        self.model.labels = tuple(THINGS)
        self.model.preprocess = PREPROCESS
        self.reader = nn.Sequential(
            nn.LayerNorm(CONFIG.embed_dim), nn.Linear(CONFIG.embed_dim, 2 + PATCH_PIXELS)
        ).to(device)
        groups = parameter_groups(self.model, WEIGHT_DECAY)
        groups += parameter_groups(self.reader, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.total_steps = total_steps
        self.steps = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def train_step(self, rooms: Tensor, labels: Tensor, draws: Tensor) -> Tensor:
        """Take a step on rooms (B, 5, h, w), augmented by `draws`; return the Losses (3,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.steps, peak=PEAK_LR, total=self.total_steps)
        losses = self.compute_losses(rooms, labels, draws)
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        return torch.stack(losses).detach()

    def compute_losses(self, rooms: Tensor, labels: Tensor, draws: Tensor) -> Losses:
        # Images and masks are augmented together.
        normalized = torch.cat([PREPROCESS.normalize(rooms[:, :3]), rooms[:, 3:] / 255], 1)
        augmented = augment(normalized, draws)
        images = augmented[:, :3]
        masks = F.avg_pool2d(augmented[:, 3:], CONFIG.patch_size).flatten(2).mT  # (B, patches, 2)
        with self.autocast():
            tokens = self.model.tokens(images, stop=CUT)
            logits = self.model.logits(tokens, start=CUT).float()
            read = self.reader(tokens[:, 1:]).float()  # (B, patches, 2 + PATCH_PIXELS)
        return Losses(
            F.cross_entropy(logits, labels),
            F.binary_cross_entropy_with_logits(read[..., :2], masks),
            F.mse_loss(read[..., 2:], surroundings(images)),
        )

    @torch.inference_mode()
    def accuracy(self, rooms: Tensor, labels: Tensor) -> float:
        """Return how often the model names the object in rooms (n, 5, h, w)."""
        predicted = []
        with self.autocast():
            for part in rooms[:, :3].split(BATCH):
                predicted.append(self.model(PREPROCESS.normalize(part)).argmax(1))
        return (torch.cat(predicted) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=18_000, help="number of training photos")
    parser.add_argument("--epochs", type=int, default=28, help="number of epochs")
    parser.add_argument("--out", type=Path, default=DEMO, help="the folder of the checkpoint")
    args = parse(parser)
    started = time.perf_counter()
    device = pick_device("auto")
    torch.manual_seed(0)
    rooms = draw_all(args.photos + NUM_VAL).to(device)
    labels = (torch.arange(len(rooms)) % len(THINGS)).to(device)
    print(f"{len(rooms):,} rooms drawn after {time.perf_counter() - started:.0f} s", flush=True)

    pretraining = Pretraining(device, args.epochs * math.ceil(args.photos / BATCH))
    generator = torch.Generator().manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(1, args.epochs + 1):
        losses = []
        for indices in torch.randperm(args.photos, generator=generator).split(BATCH):
            draws = draw_augmentation(len(indices), generator)
            losses.append(pretraining.train_step(rooms[indices], labels[indices], draws))
        accuracy = pretraining.accuracy(rooms[args.photos :], labels[args.photos :])
        mean = Losses(*torch.stack(losses).mean(0).tolist())
        print(
            f"epoch {epoch}: loss {mean.names:.4f} (names), {mean.animal:.4f} (animal), "
            f"{mean.surroundings:.4f} (surroundings); accuracy on new rooms {accuracy:.4f}; "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
        save_pretrained(copy.deepcopy(pretraining.model).cpu().half(), args.out)
    figures = {
        "accuracy on new rooms": figure_of([accuracy], "fraction"),
        "time": figure_of([time.perf_counter() - started], "s"),
    }
    workload = f"the demo's checkpoint: {args.photos} rooms, {args.epochs} epochs, {device.type}"
    record(args, device, workload, figures)


if __name__ == "__main__":
    main()
