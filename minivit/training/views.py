"""The training photos of each epoch: augmented anew, or taken from the features of kept views.

Shapes: n photos, N tokens, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..settings import MIN_EPOCHS, TrainSettings
from .features import FeatureExtractor, Source
from .step import EpochPhotos, draw_epoch


def views_for(epochs: int, device: torch.device, cut: int) -> int:
    """Return how many views to keep of each photo unless the user says so; 0 keeps none.

    On a CPU the frozen blocks take most of the time, so that kept views make training faster. Few
    photos, which get more epochs, lose accuracy by them (benchmarks/recipe.py), and are done soon.
    """
    has_frozen_blocks = cut > 0
    has_few_photos = epochs > MIN_EPOCHS
    if device.type != "cpu" or not has_frozen_blocks or has_few_photos:
        return 0
    return 2


class TrainingPhotos:
    """All n training photos, and the features (n, N, D) of the views that are kept."""

    def __init__(
        self, extractor: FeatureExtractor, pixels: Source, labels: Tensor, settings: TrainSettings
    ) -> None:
        self.extractor = extractor
        self.pixels = pixels
        self.labels = labels
        self.seed = settings.seed
        self.num_views = settings.views_to_keep()
        self.views: dict[int, Tensor] = {}

    def of_epoch(self, epoch: int, stop_requested: Callable[[], bool]) -> EpochPhotos | None:
        """Return the photos of an epoch, with an order and an augmentation of its own.

        With kept views, epoch 1 has the augmentation of view 0, and so on; after the last view
        comes the first again. Returns None if a stop was requested while a view was computed.
        """
        n = len(self.labels)
        order, draws = draw_epoch(n, self.seed, epoch)
        if self.num_views == 0:
            return EpochPhotos(self.pixels, self.extractor, self.labels, order, draws)
        view = (epoch - 1) % self.num_views
        is_new = view not in self.views
        if is_new:
            # View 0 has the augmentation of epoch 1, and so on, also in a resumed run.
            _, view_draws = draw_epoch(n, self.seed, view + 1)
            features = self.extractor.compute(
                self.pixels, torch.arange(n), view_draws, stop_requested
            )
            if features is None:
                return None
            self.views[view] = features
        return EpochPhotos(
            self.views[view], given_features, self.labels, order, draws, runs_frozen_blocks=is_new
        )


def given_features(features: Tensor, _draws: Tensor) -> Tensor:
    """Return the features of a kept view, which are augmented already."""
    return features
