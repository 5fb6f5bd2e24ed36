"""The training loop: one optimiser step, the epochs, and predictions from the tokens at the cut.

The cut is the first block that trains. What lies before it is frozen: it runs without a graph, and for photos that
are not augmented it runs once (`cut_tokens`), whatever the number of epochs.

Shapes: n photos, B of a batch, N tokens, D embed_dim, C classes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .data import augment, draw_augmentation
from .errors import UserError
from .metrics import confusion_matrix, summarize
from .model import ViT
from .optim import lr_at, parameter_groups

WEIGHT_DECAY = 0.05
WARMUP = 0.1  # of all steps
MAX_GRAD_NORM = 1.0
EVAL_BATCH = 64
TOKEN_CACHE_GIB = 4.0  # of memory for tokens at the cut; photos that need more are computed anew each epoch


def autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager:
    """Return the context in which a forward pass runs in the precision `amp`, None for float32."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


def train_step(
    model: ViT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    labels: Tensor,
    *,
    cut: int,
    micro_batch: int,
    amp: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step on images (B, 3, h, w) and labels (B,), in micro-batches whose gradients add up to B's.

    Returns the mean loss and the gradients' norm before clipping, both on the device. A norm that is not finite
    means that the step was skipped, which only a scaler (fp16) does.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=images.device)
    for x, y in zip(images.split(micro_batch), labels.split(micro_batch)):
        with autocast(images.device, amp):
            with torch.no_grad():
                tokens = model.tokens(x, stop=cut)  # (b, N, D)
            logits = model.logits(tokens, start=cut)  # (b, C)
        # Summed, then divided by the whole batch, so that a short last micro-batch weighs what its photos do.
        part = F.cross_entropy(logits.float(), y, reduction="sum") / len(labels)
        scaler.scale(part).backward()
        loss += part.detach()
    scaler.unscale_(optimizer)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
    scaler.step(optimizer)
    scaler.update()
    return loss, norm


@torch.no_grad()
def cut_tokens(model: ViT, batches: Iterable[Tensor], *, cut: int, amp: torch.dtype | None) -> Iterator[Tensor]:
    """Yield for each batch of images (B, 3, h, w) the tokens (B, N, D) that enter block `cut`."""
    for images in batches:
        with autocast(images.device, amp):
            yield model.tokens(images, stop=cut)


@torch.no_grad()
def predict(model: ViT, tokens: Iterable[Tensor], *, cut: int, amp: torch.dtype | None) -> Tensor:
    """Return the logits, float32 (n, C) on the CPU, of batches of tokens (B, N, D) that enter block `cut`."""
    device, logits = model.cls_token.device, []
    for batch in tokens:
        with autocast(device, amp):
            logits.append(model.logits(batch.to(device), start=cut).float())
    return torch.cat(logits).cpu()


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean loss of logits (n, C) against labels (n,), and what metrics.summarize says of the predictions."""
    confusion = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    return {"loss": F.cross_entropy(logits, labels).item(), **summarize(confusion)}


def fit(
    model: ViT,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    *,
    cut: int,
    amp: torch.dtype | None,
    epochs: int,
    batch_size: int,
    micro_batch: int,
    lr: float,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Train what is not frozen, and yield a row of metrics.jsonl after each epoch, the model being that epoch's.

    `train` and `val` are pixels, uint8 (n, 3, h, w), and labels (n,). One seed gives one data order and augmentation,
    whatever the sizes of batches. Raises UserError as soon as an epoch's loss is not finite.
    """
    device, (pixels, labels) = model.cls_token.device, train
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    total = epochs * math.ceil(len(labels) / batch_size)
    tokens = [_eval_tokens(model, split[0], cut=cut, amp=amp, keep=_fits(model, train, val)) for split in (train, val)]
    step = 0  # optimiser steps taken; one that the scaler skips moves neither this nor the learning rate
    for epoch in range(1, epochs + 1):
        started, loss_sum = time.perf_counter(), torch.zeros((), device=device)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order, draws = torch.randperm(len(labels), generator=generator), draw_augmentation(len(labels), generator)
        for index in tqdm(order.split(batch_size), desc=f"epoch {epoch}/{epochs}", unit="step", leave=False):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, peak=lr, warmup=math.ceil(WARMUP * total), total=total)
            images = augment(model.preprocess.normalize(pixels[index].to(device)), draws[index])
            loss, norm = train_step(
                model, optimizer, scaler, images, labels[index].to(device), cut=cut, micro_batch=micro_batch, amp=amp
            )
            loss_sum += loss * len(index)
            step += not scaler.is_enabled() or bool(norm.isfinite())  # asks the device, so only where it can be False
        row = {"epoch": epoch, "loss": loss_sum.item() / len(labels), "lr": optimizer.param_groups[0]["lr"]}
        if not math.isfinite(row["loss"]) and not scaler.is_enabled():
            raise UserError(f"the loss of epoch {epoch} is {row['loss']}; try a lower --lr than {lr:g}")
        row["images_per_s"] = len(labels) / (time.perf_counter() - started)
        for name, (_, split_labels), source in zip(("train", "val"), (train, val), tokens):
            scores = score(predict(model, source(), cut=cut, amp=amp), split_labels)
            row |= {f"{name}_{key}": value for key, value in scores.items()}
        yield row | {"seconds": time.perf_counter() - started, "peak_gib": peak_gib(device)}


def predict_photos(model: ViT, pixels: Tensor, *, amp: torch.dtype | None) -> Tensor:
    """Return the logits, float32 (n, C) on the CPU, of photos as they are: pixels, uint8 (n, 3, h, w)."""
    images = tqdm(list(pixels.split(EVAL_BATCH)), desc="predicting", unit="batch", leave=False)
    return predict(model, cut_tokens(model, _inputs(model, images), cut=0, amp=amp), cut=0, amp=amp)


def peak_gib(device: torch.device) -> float:
    """Return the most memory used so far, in GiB: of a CUDA device by torch, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def _inputs(model: ViT, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for pixels in batches:
        yield model.preprocess.normalize(pixels.to(model.cls_token.device))


def _eval_tokens(
    model: ViT, pixels: Tensor, *, cut: int, amp: torch.dtype | None, keep: bool
) -> Callable[[], Iterable[Tensor]]:
    """Return a function that gives the tokens at the cut of photos as they are: computed once if they may be kept."""

    def compute() -> Iterator[Tensor]:
        return cut_tokens(model, _inputs(model, pixels.split(EVAL_BATCH)), cut=cut, amp=amp)

    if not keep:
        return compute
    batches = math.ceil(len(pixels) / EVAL_BATCH)
    kept = [tokens.cpu() for tokens in tqdm(compute(), desc="frozen blocks", total=batches, unit="batch", leave=False)]
    return lambda: kept


def _fits(model: ViT, *splits: tuple[Tensor, Tensor]) -> bool:
    per_photo = 4 * model.pos_embed.shape[2] * (1 + model.config.grid[0] * model.config.grid[1])
    return per_photo * sum(len(labels) for _, labels in splits) <= TOKEN_CACHE_GIB * 2**30
