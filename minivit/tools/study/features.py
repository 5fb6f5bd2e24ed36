"""The features of all photos, computed once for the whole study and moved from cut to cut.

Shapes: A photos of a table, B photos of a batch, N tokens, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...data.augment import draw_augmentation
from ...data.store import Pixels
from ...model import ViT
from ...training.features import FeatureExtractor, features_shape


class StudyFeatures:
    """The features that enter block `cut`, in host memory: one table (A, N, D) for each view.

    The first table holds all images without augmentation, and each of the others one augmented
    view of the training photos. Photos are looked up by their paths.
    """

    def __init__(
        self,
        model: ViT,
        pixels: Pixels,
        train_paths: Sequence[Path],
        num_views: int,
        *,
        batch: int,
    ) -> None:
        self.model = model
        self.batch = batch
        self.cut = 0
        self.row_of = {path: row for row, path in enumerate(pixels.paths)}
        self.view_row_of = {path: row for row, path in enumerate(train_paths)}
        self.tables: list[Tensor] = []
        extractor = FeatureExtractor(model, 0, batch=batch)
        self._add_table(extractor.compute(pixels, torch.arange(len(pixels))))
        train_indices = torch.tensor([self.row_of[path] for path in train_paths])
        generator = torch.Generator().manual_seed(0)
        for _ in range(num_views):
            draws = draw_augmentation(len(train_indices), generator)
            self._add_table(extractor.compute(pixels, train_indices, draws))

    def _add_table(self, table: Tensor | None) -> None:
        assert table is not None  # It is None only if a stop was requested, which nobody can here.
        self.tables.append(table)

    @torch.no_grad()
    def advance(self, cut: int) -> None:
        """Run the blocks up to a later cut on all tables."""
        device = self.model.cls_token.device
        shape = features_shape(self.model, cut)
        for i, table in enumerate(self.tables):
            result = table
            if table.shape[1:] != shape:
                result = table.new_empty(len(table), *shape)
            for start in range(0, len(table), self.batch):
                rows = slice(start, start + self.batch)
                features = table[rows].to(device)
                result[rows].copy_(self.model.run_blocks(features, self.cut, cut, only_read=True))
            self.tables[i] = result
        self.cut = cut

    def view(self, index: int, paths: Sequence[Path]) -> Tensor:
        """Return the features (n, N, D) of one augmented view of training photos."""
        return self.tables[1 + index][[self.view_row_of[path] for path in paths]]

    def batches(self, paths: Sequence[Path]) -> Iterator[Tensor]:
        """Yield the features (B, N, D) of images without augmentation, on the model's device."""
        rows = torch.tensor([self.row_of[path] for path in paths])
        for rows_of_batch in rows.split(self.batch):
            yield self.tables[0][rows_of_batch].to(self.model.cls_token.device)
