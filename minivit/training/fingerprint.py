"""What the result of a run depends on: a run is resumed only if all of it is the same.

What changes only speed or memory is not part of it: the device, the number of ranks, the
micro-batch and the workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from ..checkpoints.tensors import content_hash
from ..cli import parse_blocks
from ..data import store
from ..data.datasets import Data
from ..model import ViT
from ..settings import TrainSettings

# The version of what training computes. Raise it with every change after which the same settings,
# weights and photos give another result.
MATHEMATICS = 3


def describe_run(
    settings: TrainSettings,
    model: ViT,
    base_hash: str,
    initial: Mapping[str, Tensor],
    data: Data,
    amp: torch.dtype | None,
) -> dict[str, object]:
    """Return all that the result of a run depends on, under the names that users know.

    `initial` holds the weights that training starts from, and `base_hash` is of all others.
    """
    described = settings.mathematics()
    described["--blocks"] = parse_blocks(settings.blocks, model.config.depth)
    described["precision"] = str(amp)
    described["the version of training"] = MATHEMATICS
    return described | _describe_model(model, base_hash, initial) | _describe_photos(data)


def _describe_model(model: ViT, base_hash: str, initial: Mapping[str, Tensor]) -> dict[str, object]:
    sizes = asdict(model.config)
    described = {"--img-size": sizes.pop("img_size")}
    for name, value in sizes.items():
        described[f"the model's {name}"] = value
    for name, value in asdict(model.preprocess).items():
        described[f"the preprocessing's {name}"] = value
    labels = json.dumps(model.labels).encode()
    described["the checksum of the class names"] = hashlib.sha256(labels).hexdigest()[:8]
    described["the checksum of the base model"] = base_hash[:16]
    described["the checksum of the weights before training"] = content_hash(initial)[:16]
    return described


def _describe_photos(data: Data) -> dict[str, object]:
    fitted = [(split.paths, split.labels) for split in (data.train, data.val)]
    tested = (data.test.paths, data.test.labels)
    return {
        "the checksum of the photos": store.checksum(*fitted),
        "the checksum of the test photos": store.checksum(tested),
    }
