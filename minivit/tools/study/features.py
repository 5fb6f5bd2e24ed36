"""The tokens of all photos, computed once for the whole study and moved from cut to cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...data.augment import draw_augmentation
from ...data.store import Pixels
from ...model import ViT
from ...training.features import Frozen, tokens_shape


class KnownTokens:
    """All photos' tokens (A, N, D) at the cut that stands, and K views' of those to learn from: a Frozen that computes nothing.

    Photos are given by their paths in place of pixels.
    """

    def __init__(
        self, model: ViT, pixels: Pixels, learn: Sequence[Path], num_views: int, *, batch: int
    ) -> None:
        self.model, self.cut, self.batch = model, 0, batch
        compute, generator = Frozen(model, 0, batch=batch), torch.Generator().manual_seed(0)
        self.row_of, self.learn_row_of = (
            {path: i for i, path in enumerate(paths)} for paths in (pixels.paths, learn)
        )
        own = torch.tensor([self.row_of[path] for path in learn])
        self.tables = [
            compute.keep(pixels, torch.arange(len(pixels)))
        ]  # of photos as they are, then of each view
        self.tables += [
            compute.keep(pixels, own, draw_augmentation(len(own), generator))
            for _ in range(num_views)
        ]

    @torch.no_grad()
    def advance(self, cut: int) -> None:
        """Run the blocks up to another cut."""
        shape, device = tokens_shape(self.model, cut), self.model.cls_token.device
        for i, table in enumerate(self.tables):
            there = table if table.shape[1:] == shape else table.new_empty(len(table), *shape)
            for start in range(0, len(table), self.batch):
                x = self.model.run_blocks(
                    table[start : start + self.batch].to(device), self.cut, cut, only_read=True
                )
                there[start : start + self.batch].copy_(x)
            self.tables[i] = there
        self.cut = cut

    def view(self, k: int, photos: Sequence[Path], *_: object) -> Tensor:
        return self.tables[1 + k][[self.learn_row_of[path] for path in photos]]

    def evaluation(
        self, photos: Sequence[Path], own: Tensor, **_: object
    ) -> Callable[[], Iterator[Tensor]]:
        rows = torch.tensor([self.row_of[photos[i]] for i in own.tolist()]).split(self.batch)
        return lambda: (self.tables[0][part].to(self.model.cls_token.device) for part in rows)
