"""A rehearsal before training: which micro-batch fits, and how much memory the steps take."""

from __future__ import annotations

import math

import torch

from ..model import ViT
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
