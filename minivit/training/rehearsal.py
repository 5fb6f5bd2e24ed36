"""A rehearsal before training: which micro-batch fits, how much memory and time training takes."""

from __future__ import annotations

import math
import time

import torch

from ..data.datasets import Data
from ..model import ViT
from ..settings import TrainSettings
from ..system import distributed
from ..system.device import peak_gib
from .features import FeatureExtractor, TrainableLayers
from .state import new_state
from .step import Batch, train_step_that_fits


def rehearse(
    model: ViT, *, cut: int, batch_size: int, micro_batch: int, amp: torch.dtype | None
) -> tuple[int, float]:
    """Take two steps on grey photos at a learning rate of 0, which changes nothing.

    Returns the micro-batch, halved until it fits into the device's memory, and the most memory
    that the steps take, in GiB: the CUDA device's, else this process's.
    """
    device = model.cls_token.device
    state = new_state(model, cut=cut, amp=amp, micro_batch=micro_batch, weight_decay=0.0)
    share = math.ceil(batch_size / distributed.world_size())
    size = (share, 3, *model.config.img_size)
    pixels = torch.full(size, 128, dtype=torch.uint8, device=device)
    draws = torch.full((share, 5), 0.5, device=device)
    extractor = FeatureExtractor(model, cut, batch=share)

    def features(part: slice) -> torch.Tensor:
        return extractor(pixels[part], draws[part])

    labels = torch.zeros(share, dtype=torch.long, device=device)
    batch = Batch(features, labels, share)
    for _ in range(2):  # In the second step, the frozen blocks may be replayed from a recording.
        train_step_that_fits(TrainableLayers(model, cut), state, batch)
    peak = peak_gib(device)
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return state.micro_batch, peak


# A run of fewer operations takes a minute or two on a laptop, which needs no estimate.
LONG_RUN_FLOPS = 3e13


def count_images(data: Data, settings: TrainSettings) -> tuple[int, int]:
    """Return how many images pass through the frozen blocks and the others in a run.

    A training step counts as three passes through the others. The head alone is evaluated like
    another epoch, and the validation photos are predicted once more by the weights that are kept.
    """
    n = len(data.train)
    evaluated = n + len(data.val)
    predicted_at_the_end = len(data.val) + len(data.test)
    views_computed = settings.views_to_keep() or settings.epochs
    frozen = n * views_computed + evaluated + predicted_at_the_end
    trained = settings.epochs * 3 * n
    others = trained + (settings.epochs + 1) * evaluated + predicted_at_the_end
    return frozen, others


def describe_time(
    model: ViT, data: Data, settings: TrainSettings, cut: int, amp: torch.dtype | None
) -> str | None:
    """Say how long a run takes on this device, by the time of one batch, and what is shorter.

    Returns None for a run that is short by the number of its operations. Decoding is not counted.
    """
    num_frozen, num_others = count_images(data, settings)
    flops_of_others = model.flops(cut)
    flops = num_frozen * (model.flops() - flops_of_others) + num_others * flops_of_others
    if flops < LONG_RUN_FLOPS:
        return None
    frozen_seconds, others_seconds = seconds_per_image(model, cut, amp)
    seconds = num_frozen * frozen_seconds + num_others * others_seconds
    photos = len(data.train) + len(data.val) + len(data.test)
    head_seconds = photos * (frozen_seconds + others_seconds)
    text = f"about {minutes(seconds)} on {model.cls_token.device}"
    if cut == model.config.depth:
        return text
    return f"{text}; --blocks none, the head alone, takes about {minutes(head_seconds)}"


def seconds_per_image(model: ViT, cut: int, amp: torch.dtype | None) -> tuple[float, float]:
    """Time a forward pass of a batch: the blocks before the cut, and what follows, for an image."""
    device = model.cls_token.device
    images = torch.zeros(8, 3, *model.config.img_size, device=device)
    with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
        for _ in range(2):  # The first pass only warms up.
            started = time.perf_counter()
            features = model.tokens(images, stop=cut, only_read=True)
            frozen_seconds = time.perf_counter() - started
            model.logits(features, start=cut).sum().item()
            others_seconds = time.perf_counter() - started - frozen_seconds
    return frozen_seconds / len(images), others_seconds / len(images)


def minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
