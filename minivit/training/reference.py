"""Photos of none of the classes: how far a photo is from the training photos of a run.

A finished run writes what the head reads of its training photos, and a threshold that few new
photos of its classes exceed. The distance of a photo is the mean Euclidean distance to its nearest
training photos. benchmarks/own_photos.py compares distances and numbers of neighbours.

Shapes: n training photos, B photos, D numbers that the head reads of each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.tensors import content_hash, read_tensors, save_tensors
from ..data.datasets import Data
from ..errors import UserError
from ..model import ViT
from .run_folder import REFERENCE

KEY = "minivit reference"
MAX_PHOTOS = 20_000  # in the file; of more, it holds a sample
NUM_NEIGHBOURS = 2  # whose mean distance is the distance of a photo
NUM_SHOWN = 5  # nearest photos on the explorer's page
UNLIKE_RATE = 0.05  # how probable it is at most that a new photo of the classes is unlike them


@dataclass(frozen=True)
class Neighbour:
    """A training photo near another photo."""

    path: Path
    label: str
    distance: float


@dataclass(frozen=True)
class Comparison:
    """How far a photo is from the training photos, and which are the nearest, nearest first."""

    distance: float
    threshold: float
    nearest: Sequence[Neighbour]

    @property
    def is_unlike(self) -> bool:
        return self.distance > self.threshold


@dataclass(frozen=True)
class Reference:
    """The training photos of a run, as the head of its model reads them."""

    features: Tensor  # (n, D)
    labels: Sequence[str]
    paths: Sequence[Path]
    threshold: float

    def to(self, device: torch.device) -> Reference:
        return replace(self, features=self.features.to(device))

    def compare(self, inputs: Tensor) -> list[Comparison]:
        """Compare photos, of which the head reads `inputs` (B, D), with the training photos."""
        found = torch.cdist(inputs.float(), self.features)
        nearest = found.topk(min(NUM_SHOWN, len(self.paths)), largest=False)
        comparisons = []
        for distances, indices in zip(nearest.values.tolist(), nearest.indices.tolist()):
            neighbours = [
                Neighbour(self.paths[i], self.labels[i], distance)
                for distance, i in zip(distances, indices)
            ]
            counted = distances[:NUM_NEIGHBOURS]
            mean = sum(counted) / len(counted)
            comparisons.append(Comparison(mean, self.threshold, neighbours))
        return comparisons


def distances_to(features: Tensor, inputs: Tensor) -> Tensor:
    """Return the distance (B,) of each photo from the training photos' features (n, D)."""
    k = min(NUM_NEIGHBOURS, len(features))
    nearest = [
        torch.cdist(part, features).topk(k, largest=False).values for part in inputs.split(1024)
    ]
    return torch.cat(nearest).mean(1)


def choose_threshold(distances: Tensor) -> float:
    """Return the distance that a new photo exceeds with a probability of at most UNLIKE_RATE.

    `distances` (B,) are those of validation photos, and the threshold is one of them. A new photo
    of the classes is as likely to have each of the B + 1 places in their order, so one validation
    photo less than UNLIKE_RATE may lie above the threshold. Below 19 photos, the threshold is the
    largest distance, and the probability 1 / (B + 1). Source: split conformal prediction, Vovk et
    al. 2005, Algorithmic Learning in a Random World.
    """
    in_order = distances.sort().values
    num_unlike = max(0, int(UNLIKE_RATE * (len(distances) + 1)) - 1)
    return in_order[len(distances) - 1 - num_unlike].item()


def save_reference(
    path: Path, model: ViT, data: Data, inputs: Tensor, val_inputs: Tensor, seed: int
) -> tuple[Tensor, float]:
    """Write the file, and return the features (n, D) in it and the threshold.

    `inputs` are what the head reads of the training photos, `val_inputs` of the validation photos.
    """
    indices = torch.arange(len(inputs))
    if len(indices) > MAX_PHOTOS:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(len(inputs), generator=generator)[:MAX_PHOTOS].sort().values
    features = inputs[indices].half()
    threshold = choose_threshold(distances_to(features.float(), val_inputs))
    photos = data.train.take(indices.tolist())
    about = {
        "data": os.path.realpath(data.root),
        "photos": [os.path.relpath(photo, data.root) for photo in photos.paths],
        "threshold": threshold,
        "head": _hash_head(model),
        "img_size": model.config.img_size,
    }
    labels = torch.tensor(photos.labels, dtype=torch.int32)
    save_tensors(
        path, {"features": features, "labels": labels}, {KEY: json.dumps(about, sort_keys=True)}
    )
    return features.float(), threshold


def _hash_head(model: ViT) -> str:
    """Return a hash that tells one run's model from another's."""
    return content_hash(dict(model.head.named_parameters()))


def summarize(
    features: Tensor, threshold: float, val_inputs: Tensor, test_inputs: Tensor
) -> dict[str, object]:
    """Return what summary.json says: which shares of the photos are further than the threshold."""
    described: dict[str, object] = {"threshold": threshold, "neighbours": NUM_NEIGHBOURS}
    for name, inputs in (("val", val_inputs), ("test", test_inputs)):
        is_unlike = distances_to(features, inputs) > threshold
        described[f"{name}_rate"] = is_unlike.double().mean().item()
    return {"unlike_training": described}


def find_reference(model: ViT) -> Reference | None:
    """Return the training photos of the run that a model comes from, or None if it has no file.

    The model must be as load_pretrained returns it. Raises UserError if the file is damaged.
    """
    source = Path(os.path.expanduser(model.origin.source))
    folder = source.parent if source.is_file() else source
    path = folder / REFERENCE
    if model.origin.source == "demo" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
        tensors = read_tensors(path)
        if about["head"] != _hash_head(model):
            return None  # The file belongs to another model that was here.
        if tuple(about["img_size"]) != model.config.img_size:
            print(
                f"{path}: photos were compared at {about['img_size']} pixels, so at another "
                "--img-size nothing says which are unlike the training photos",
                file=sys.stderr,
            )
            return None
        return Reference(
            tensors["features"].float(),
            [model.labels[label] for label in tensors["labels"].tolist()],
            [Path(about["data"], photo) for photo in about["photos"]],
            about["threshold"],
        )
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it, and no photo is compared with the "
            "training photos, or train again"
        ) from error
