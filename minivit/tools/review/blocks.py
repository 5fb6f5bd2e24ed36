"""Retrain the run's blocks without each fold, and ask them about the photos of that fold.

Shapes: n photos, C classes, N tokens, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...data.store import Pixels
from ...errors import UserError
from ...model import ViT, freeze_except, working_copy
from ...settings import TrainSettings
from ...system.device import eval_batch, pick_micro_batch
from ...system.progress import progress_bar
from ...training.features import TrainableLayers, features_gib
from ...training.rehearsal import seconds_per_image
from ...training.state import new_state, set_trainable
from ...training.step import EpochPhotos, draw_epoch, mean_loss, predict, train_epoch
from ...training.views import given_features
from ..study.features import StudyFeatures

VIEWS = 2  # augmented views of each photo, which the epochs take in turn


def estimate_seconds(
    base: ViT, cut: int, num_photos: int, folds: int, epochs: int, amp: torch.dtype | None
) -> float:
    """Estimate how long all of this takes, by the time of one batch. Decoding is not counted."""
    frozen_seconds, others_seconds = seconds_per_image(base, cut, amp)
    # A training step takes as long as three forward passes. Each photo is left out once.
    passes_of_others = 3 * epochs * (folds - 1) * num_photos + num_photos
    return (1 + VIEWS) * num_photos * frozen_seconds + passes_of_others * others_seconds


def keep_features(
    base: ViT,
    cut: int,
    paths: Sequence[Path],
    *,
    device: torch.device,
    amp: torch.dtype | None,
    workers: int,
    cache_gib: float,
) -> StudyFeatures:
    """Compute the features of all photos, without augmentation and in VIEWS augmented views.

    Raises UserError if they take more than `cache_gib` of host memory.
    """
    low = working_copy(base, device, amp, train=False)
    # The tables start as tokens that enter block 0, which are as large as those at any cut.
    gib = features_gib(low, (1 + VIEWS) * len(paths), 0)
    if gib > cache_gib:
        raise UserError(
            f"--blocks: the features of {len(paths)} photos take {gib:.1f} GiB, more than "
            f"--cache-gib {cache_gib:g}; allow more, or leave --blocks away for a linear head"
        )
    pixels = Pixels(paths, base.preprocess, workers)
    batch = eval_batch(device, 1, 1, amp)
    features = StudyFeatures(low, pixels, paths, VIEWS, batch=batch)
    features.advance(cut)
    return features


def held_out_logits(
    base: ViT,
    blocks: Sequence[int],
    features: StudyFeatures,
    labels: Tensor,
    fold_of: Tensor,
    settings: TrainSettings,
    amp: torch.dtype | None,
) -> Tensor:
    """Return what the blocks say of each photo, trained on all other folds: (n, C) on the CPU.

    The photos are in the order in which `features` knows them. The base is left as it was.
    """
    paths = list(features.row_of)
    logits = torch.empty(len(paths), base.config.num_classes)
    for fold in progress_bar(fold_of.unique(), "folds", unit="fold"):
        held_out = (fold_of == fold).nonzero()[:, 0].tolist()
        others = (fold_of != fold).nonzero()[:, 0].tolist()
        other_paths = [paths[i] for i in others]
        held_out_paths = [paths[i] for i in held_out]
        logits[held_out] = train_and_predict(
            base, blocks, features, other_paths, labels[others], held_out_paths, settings, amp
        )
    return logits


def train_and_predict(
    base: ViT,
    blocks: Sequence[int],
    features: StudyFeatures,
    paths: Sequence[Path],
    labels: Tensor,
    asked: Sequence[Path],
    settings: TrainSettings,
    amp: torch.dtype | None,
) -> Tensor:
    """Train the blocks as train.py does, to the last epoch; return the logits of photos `asked`."""
    device = features.model.cls_token.device
    cut = freeze_except(base, blocks)
    state = new_state(
        working_copy(base, device, amp, train=True),
        cut=cut,
        amp=amp,
        micro_batch=pick_micro_batch(None, settings.batch_size, device, amp),
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        head_scale=settings.head_lr / settings.lr,
    )
    weights_before = state.trainable_weights()
    layers = TrainableLayers(state.model, cut)
    views = [features.view(i, paths) for i in range(VIEWS)]
    for epoch in range(1, settings.epochs + 1):
        state.epoch = epoch
        order, draws = draw_epoch(len(labels), settings.seed, epoch)
        photos = EpochPhotos(views[epoch % VIEWS], given_features, labels, order, draws)
        train_epoch(state, layers, photos, settings, never_stop)
        mean_loss(state, len(labels), settings)  # This raises if the loss is not finite.
        state.losses = []
    trained = working_copy(state.model, device, amp, train=False)
    logits, _ = predict(trained, features.batches(asked), cut=cut)
    # Weights in float32 on the CPU are shared with the base.
    set_trainable(state.model, weights_before)
    return logits


def never_stop() -> bool:
    return False
