"""One optimizer step, one epoch of steps, and predictions.

The cut is the first block that trains. The layers before it are frozen: features.py runs them
without autograd. Under torchrun the photos of a batch are dealt out to the ranks (see
system/distributed.py), and everything else is the same.

Shapes: n photos, B photos of a batch, N tokens, D embed_dim, C classes.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.augment import draw_augmentation
from ..errors import UserError
from ..model import ViT
from ..settings import TrainSettings
from ..system import distributed
from ..system.progress import progress_bar
from ..system.signals import StopRequested, stop_here
from .class_weights import balanced_weights
from .features import Source, gather_rows, to_device_ahead
from .metrics import confusion_matrix, summarize
from .optimizer import AdamW, lr_at
from .state import RunState

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Batch:
    """The photos of one optimizer step, or this rank's share of them.

    `inputs(part)` returns what the network takes of a slice of them: images for a whole model,
    features for its TrainableLayers. `labels` are (B,). `size` counts the photos of all ranks;
    infinity marks a stand-in, which must not count.
    """

    inputs: Callable[[slice], Tensor]
    labels: Tensor
    size: float


def train_step(
    network: nn.Module,
    optimizer: AdamW,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    *,
    micro_batch: int,
    amp: torch.dtype | None,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one optimizer step, in micro-batches whose gradients add up to those of the batch.

    `class_weights` (C,) multiply the losses of the photos of each class. Returns this rank's part
    of the batch's mean loss, and the norm of the gradients before clipping; both stay on the
    device. A norm that is not finite means that the scaler skipped the step, which happens in fp16
    only.
    """
    device = batch.labels.device
    loss = torch.zeros((), device=device)
    optimizer.zero_grad()
    for start in range(0, len(batch.labels), micro_batch):
        part = slice(start, start + micro_batch)
        images_or_features = batch.inputs(part)
        labels = batch.labels[part]
        is_last = part.stop >= len(batch.labels)
        with _gradient_exchange(network, is_last):
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = network(images_or_features)  # (b, C)
            # The losses are summed and divided by the size of the whole batch, so that each photo
            # of a short last micro-batch weighs as much as any other. That holds for class weights
            # too, whose mean over the training photos is 1.
            part_loss = F.cross_entropy(
                logits.float(),
                labels,
                weight=class_weights,
                reduction="sum",
                label_smoothing=label_smoothing,
            )
            part_loss = part_loss / batch.size
            # DistributedDataParallel takes the mean over ranks where the sum is wanted.
            ranks = distributed.world_size() if _is_distributed(network) else 1
            scaler.scale(part_loss * ranks).backward()
        loss += part_loss.detach()
    # A scaler is typed for torch's optimizers, but needs only what AdamW has: groups and a step.
    torch_optimizer = cast(torch.optim.Optimizer, optimizer)
    scaler.unscale_(torch_optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    scaler.step(torch_optimizer)
    scaler.update()
    return loss, norm


def train_step_that_fits(
    network: nn.Module,
    state: RunState,
    batch: Batch,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take a step as train_step does, in micro-batches that fit into memory.

    Each time memory runs out, the micro-batch is halved and the step is redone from its start.
    That is safe because the forward and backward passes, in which memory runs out, change no
    weights, and train_step clears the gradients first. Raises UserError if not one photo fits.
    """
    while True:
        try:
            return train_step(
                network,
                state.optimizer,
                state.scaler,
                batch,
                micro_batch=state.micro_batch,
                amp=state.amp,
                label_smoothing=label_smoothing,
                class_weights=class_weights,
            )
        except torch.OutOfMemoryError as error:
            # With several ranks, the others would not redo the step.
            if state.micro_batch == 1 or _is_distributed(network):
                raise UserError(
                    f"{state.device}: out of memory; try a lower --batch-size or --micro-batch"
                ) from error
        # Memory is freed out here, because the exception above holds on to tensors.
        state.micro_batch = max(1, min(state.micro_batch, len(batch.labels)) // 2)
        torch.cuda.empty_cache()
        print(
            f"{state.device}: out of memory; the step is redone in micro-batches of "
            f"{state.micro_batch}",
            file=sys.stderr,
        )


def _is_distributed(network: nn.Module) -> bool:
    return isinstance(network, DistributedDataParallel)


def _gradient_exchange(
    network: nn.Module, is_last: bool
) -> contextlib.AbstractContextManager[None]:
    """Let ranks exchange their gradients in the backward pass of the last micro-batch only."""
    if isinstance(network, DistributedDataParallel) and not is_last:
        return network.no_sync()
    return contextlib.nullcontext()


@dataclass(frozen=True)
class EpochPhotos:
    """The training photos of one epoch.

    `source` holds the pixels or the features of all n photos. `to_features` turns a batch of them
    and its draws into features. `labels` (n,) belong to the photos, `order` (n,) is the order in
    which they are taken, and `draws` (n, 5) is the augmentation of each. `runs_frozen_blocks` says
    whether the frozen blocks run for this epoch, which its speed is measured by.
    """

    source: Source
    to_features: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    order: Tensor
    draws: Tensor
    runs_frozen_blocks: bool = True


def draw_epoch(n: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw the order of n photos in an epoch (n,), and the augmentation of each (n, 5).

    They follow from the seed and the epoch alone, whatever the sizes of batches and the number of
    ranks.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator)
    return order, draw_augmentation(n, generator)


def train_epoch(
    state: RunState,
    network: nn.Module,
    photos: EpochPhotos,
    settings: TrainSettings,
    stop_requested: Callable[[], bool],
) -> None:
    """Take the steps that are left of the epoch under way.

    Ends early, with state.stopped set, after the step during which a stop was requested. Raises
    StopRequested in the middle of a step, which is then left out.
    """
    steps_per_epoch = settings.steps_per_epoch(len(photos.labels))
    total_steps = settings.epochs * steps_per_epoch
    first_step = len(state.losses)
    class_weights = None
    if settings.class_weights == "balanced":
        num_classes = state.model.config.num_classes
        class_weights = balanced_weights(photos.labels, num_classes).to(state.device)
    losses: list[Tensor] = []
    progress = progress_bar(
        _batches(state, photos, settings.batch_size),
        f"epoch {state.epoch}",
        steps_per_epoch,
        initial=first_step,
        unit="step",
    )
    try:
        for batch in progress:
            state.lr = lr_at(state.step, peak=settings.lr, total=total_steps)
            for group in state.optimizer.param_groups:
                group["lr"] = state.lr * group["lr_scale"]
            loss, norm = train_step_that_fits(
                network, state, batch, settings.label_smoothing, class_weights
            )
            # Looking at the norm makes the host wait for the device, so only fp16 does it.
            was_skipped = state.scaler.is_enabled() and not bool(norm.isfinite())
            if was_skipped:
                state.skipped.append(first_step + len(losses))
            else:
                state.step += 1
            losses.append(loss)
            state.stopped = stop_requested()
            if state.stopped:
                break
    except StopRequested:
        # The step under way is left out. This process is alone, so no other one waits for it.
        state.losses += [loss.item() for loss in losses]
        raise
    if losses:
        state.losses += distributed.all_reduce_sum(torch.stack(losses)).tolist()


def _batches(state: RunState, photos: EpochPhotos, batch_size: int) -> Iterator[Batch]:
    """Yield the batches that are left of the epoch, or this rank's share of each."""
    batches_of_epoch = photos.order.split(batch_size)
    remaining = batches_of_epoch[len(state.losses) :]

    def read(indices: Tensor) -> list[Tensor]:
        share = indices[distributed.shard(torch.arange(len(indices)))]
        rows = gather_rows(photos.source, share, state.device)
        return [rows, photos.draws[share], photos.labels[share]]

    on_device = to_device_ahead(read, remaining, state.device)
    for (rows, draws, labels), indices in zip(on_device, remaining):
        is_stand_in = distributed.rank() >= len(indices)
        size = math.inf if is_stand_in else len(indices)
        yield Batch(_Inputs(photos.to_features, rows, draws), labels, size)


@dataclass(frozen=True)
class _Inputs:
    """The features of a batch, computed for one micro-batch at a time."""

    to_features: Callable[[Tensor, Tensor], Tensor]
    rows: Tensor
    draws: Tensor

    def __call__(self, part: slice) -> Tensor:
        stop_here()
        return self.to_features(self.rows[part], self.draws[part])


def mean_loss(state: RunState, n: int, settings: TrainSettings) -> float:
    """Return the mean loss over the n photos of the epoch, without steps that fp16 skipped.

    If it skipped all of them, as it may while it looks for its scale, it is the mean over all.
    Raises UserError if the loss is not finite.
    """
    batch_size = settings.batch_size
    steps = range(len(state.losses))
    counted: Sequence[int] = [step for step in steps if step not in state.skipped]
    if not counted:
        counted = steps
    total = 0.0
    num_photos = 0
    for step in counted:
        loss = state.losses[step]
        if not math.isfinite(loss):
            raise UserError(
                f"the loss of epoch {state.epoch} is {loss}; try a lower --lr than {settings.lr:g}"
            )
        size = min(batch_size, n - step * batch_size)
        total += loss * size
        num_photos += size
    return total / num_photos


@torch.no_grad()
def predict(model: ViT, batches: Iterable[Tensor], *, cut: int) -> tuple[Tensor, Tensor]:
    """Return the logits (n, C) of batches of features (B, N, D), and what the head reads (n, D).

    Both are float32 on the CPU. Raises StopRequested if a stop was requested.
    """
    logits = []
    inputs = []
    for batch in batches:
        stop_here()
        inputs.append(model.head_inputs(batch, start=cut))
        logits.append(model.head(inputs[-1]).float())
    return torch.cat(logits).cpu(), torch.cat(inputs).cpu().float()


@torch.no_grad()
def predict_photos(model: ViT, pixels: Source, *, batch: int) -> tuple[Tensor, Tensor]:
    """Run predict() on pixels, uint8 (n, 3, h, w), without augmentation."""
    device = model.cls_token.device
    indices = torch.arange(len(pixels)).split(batch)

    def read(indices: Tensor) -> list[Tensor]:
        return [gather_rows(pixels, indices, device)]

    def tokens() -> Iterator[Tensor]:
        on_device = to_device_ahead(read, indices, device)
        for (pixels_of_batch,) in progress_bar(on_device, "predicting", len(indices), unit="batch"):
            yield model.tokens(model.preprocess.normalize(pixels_of_batch))  # before all blocks

    return predict(model, tokens(), cut=0)


def score_predictions(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean loss of logits (n, C) for labels (n,), and the metrics of summarize()."""
    confusion = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    return {"loss": F.cross_entropy(logits, labels).item(), **summarize(confusion)}
