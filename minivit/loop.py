"""The training loop: one optimiser step, the epochs, and predictions from the tokens at the cut.

The cut is the first block that trains. What lies before it is frozen: it runs without a graph, and for photos that
are not augmented it runs once (`cut_tokens`), whatever the number of epochs.

Under torchrun the photos of a batch are dealt out to the processes (parallel.py); what follows is the same.

Shapes: n photos, B of a batch, N tokens, D embed_dim, C classes.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import parallel
from .data import Data, augment, draw_augmentation
from .errors import UserError
from .metrics import best_row, confusion_matrix, summarize
from .model import ViT
from .optim import lr_at
from .state import State, begin

MAX_GRAD_NORM = 1.0
EVAL_BATCH = 64
TOKEN_CACHE_GIB = 4.0  # of memory for tokens at the cut; photos that need more are computed anew each epoch


def autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager:
    """Return the context in which a forward pass runs in the precision `amp`, None for float32."""
    return torch.autocast(device.type, dtype=amp, enabled=amp is not None)


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    labels: Tensor,
    *,
    micro_batch: int,
    amp: torch.dtype | None,
    batch: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, int]:
    """Take one optimiser step on images (B, 3, h, w) and labels (B,), in micro-batches whose gradients add up to B's.

    `net` is the model, or parallel.wrap of it: the images are then one process's share of a `batch` of so many (infinity:
    a stand-in that must not count). Returns the share's part of the batch's mean loss and the norm of the batch's
    gradients before clipping, both on the device, and the micro-batch, halved until the device's memory was enough for it.
    A norm that is not finite means that the step was skipped, which only a scaler (fp16) does.
    """
    shared, batch = isinstance(net, DistributedDataParallel), batch or len(labels)
    while True:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=images.device)
        try:
            for start in range(0, len(labels), micro_batch):
                x, y = images[start : start + micro_batch], labels[start : start + micro_batch]
                last = start + micro_batch >= len(labels)  # with whose gradients the processes exchange all
                with net.no_sync() if shared and not last else nullcontext():
                    with autocast(images.device, amp):
                        logits = net(x)  # (b, C); without a graph up to the cut, since nothing there needs one
                    # Summed, then divided by the whole batch, so that a short last micro-batch weighs what its photos do.
                    part = F.cross_entropy(logits.float(), y, reduction="sum", label_smoothing=label_smoothing) / batch
                    scaler.scale(part * (parallel.world() if shared else 1)).backward()  # DDP takes the processes' mean
                loss += part.detach()
            break
        except torch.OutOfMemoryError as error:
            if micro_batch == 1 or shared:  # the other processes would not redo the step
                raise UserError(f"{images.device}: out of memory; try a lower --batch-size or --micro-batch") from error
        micro_batch = max(1, min(micro_batch, len(labels)) // 2)  # out here, where no exception holds on to tensors
        torch.cuda.empty_cache()
        print(f"{images.device}: out of memory; the step is redone in micro-batches of {micro_batch}", file=sys.stderr)
    scaler.unscale_(optimizer)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
    scaler.step(optimizer)
    scaler.update()
    return loss, norm, micro_batch


def rehearse(model: ViT, data: Data, *, batch_size: int, micro_batch: int, amp: torch.dtype | None) -> tuple[int, float]:
    """Take two steps on grey photos at a learning rate of 0, which changes nothing.

    Returns the micro-batch, halved until it fits into the device's memory, and the most memory, in GiB, that training on
    the data will use: on CUDA of the device; else of this process, which also holds photos and tokens.
    """
    device, state = model.cls_token.device, begin(model, amp=amp, weight_decay=0.0)
    share = math.ceil(batch_size / parallel.world())
    pixels = torch.full((share, 3, *model.config.img_size), 128, dtype=torch.uint8)
    for _ in range(2):  # from the second on, AdamW's moments are there all along
        images = augment(model.preprocess.normalize(pixels.to(device)), torch.full((share, 5), 0.5))
        labels = torch.zeros(share, dtype=torch.long, device=device)
        micro_batch = train_step(model, state.optimizer, state.scaler, images, labels, micro_batch=micro_batch, amp=amp)[2]
    peak = peak_gib(device)
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        photos, scored = sum(map(len, (data.train, data.val, data.test))), len(data.train) + len(data.val)
        tokens = _token_bytes(model, scored)
        peak += (photos * pixels[0].numel() + (tokens if tokens <= TOKEN_CACHE_GIB * 2**30 else 0)) / 2**30
    return micro_batch, peak


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
    state: State,
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
    label_smoothing: float = 0.0,
    patience: int | None = None,
) -> Iterator[dict[str, float]]:
    """Go on with a run from where it stands, and yield a row of metrics.jsonl after each epoch, the model being that epoch's.

    `train` and `val` are pixels, uint8 (n, 3, h, w), and labels (n,). One seed gives one data order and augmentation,
    whatever the sizes of batches and the number of processes. Ends early after `patience` epochs without a better one, and,
    with state.stopped set, at the end of the step during which SIGINT or SIGTERM came. Raises UserError as soon as an
    epoch's loss is not finite.
    """
    model, device, n = state.model, state.model.cls_token.device, len(train[1])
    net, keep, batch = (
        parallel.wrap(model),
        _token_bytes(model, n + len(val[1])) <= TOKEN_CACHE_GIB * 2**30,
        min(EVAL_BATCH, micro_batch),
    )
    splits = [(name, parallel.shard(split[0]), split[1]) for name, split in (("train", train), ("val", val))]
    splits = [(name, _eval_tokens(model, own, cut=cut, amp=amp, keep=keep, batch=batch), y) for name, own, y in splits]
    step = partial(train_step, net, state.optimizer, state.scaler, amp=amp, label_smoothing=label_smoothing)
    schedule = partial(lr_at, peak=lr, total=epochs * math.ceil(n / batch_size))
    with parallel.stop_requests() as stop_requested:
        while state.epoch <= epochs and not (
            patience and state.rows and state.epoch > patience + best_row(state.rows)["epoch"]
        ):
            started = time.perf_counter() - state.seconds
            todo = tqdm(_batches(n, batch_size, seed, state.epoch), f"epoch {state.epoch}/{epochs}", unit="step", leave=False)
            micro_batch = _train_epoch(state, step, schedule, train, todo, micro_batch, stop_requested)
            row = {"epoch": state.epoch, "loss": _mean_loss(state, n, batch_size, lr), "lr": state.lr}
            state.seconds = time.perf_counter() - started
            if state.stopped:
                return
            row["images_per_s"] = n / state.seconds
            for name, tokens, labels in splits:
                scores = score(parallel.gather(predict(model, tokens(), cut=cut, amp=amp), len(labels)), labels)
                row |= {f"{name}_{key}": value for key, value in scores.items()}
            row |= {"seconds": time.perf_counter() - started, "peak_gib": peak_gib(device)}
            state.rows.append(row)
            state.epoch, state.losses, state.seconds = state.epoch + 1, [], 0.0
            yield row
            state.stopped = stop_requested()
            if state.stopped:
                return


def _train_epoch(
    state: State,
    step: Callable,  # train_step, all but the images
    schedule: Callable[[int], float],
    train: tuple[Tensor, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    micro_batch: int,
    stop_requested: Callable[[], bool],
) -> int:
    """Take the steps that are left of the epoch under way, until its end or a request to stop; return the micro-batch."""
    device, preprocess, losses = state.model.cls_token.device, state.model.preprocess, []
    for index, draws in itertools.islice(batches, len(state.losses), None):
        state.lr = schedule(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr * group["lr_scale"]
        mine = parallel.shard(torch.arange(len(index)))
        images = augment(preprocess.normalize(train[0][index[mine]].to(device)), draws[mine])
        labels = train[1][index[mine]].to(device)
        counted = len(index) if parallel.rank() < len(index) else math.inf
        loss, norm, micro_batch = step(images, labels, micro_batch=micro_batch, batch=counted)
        losses.append(loss)
        state.step += not state.scaler.is_enabled() or bool(norm.isfinite())  # asks the device, so only where it must
        state.stopped = stop_requested()
        if state.stopped:
            break
    if losses:
        state.losses += parallel.total(torch.stack(losses)).tolist()
    return micro_batch


def _batches(n: int, batch_size: int, seed: int, epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Return an epoch's batches: the indices of their photos (B,) and the draws of their augmentation (B, 5)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order, draws = torch.randperm(n, generator=generator), draw_augmentation(n, generator)
    return [(index, draws[index]) for index in order.split(batch_size)]


def _mean_loss(state: State, n: int, batch_size: int, lr: float) -> float:
    """Return the mean loss of the epoch so far, without steps of fp16 that were skipped; raises UserError if there is none."""
    sizes = [min(batch_size, n - i * batch_size) for i in range(len(state.losses))]
    taken = [(loss, size) for loss, size in zip(state.losses, sizes) if math.isfinite(loss)]
    if not taken or (len(taken) < len(sizes) and not state.scaler.is_enabled()):
        found = next(loss for loss in state.losses if not math.isfinite(loss))
        raise UserError(f"the loss of epoch {state.epoch} is {found}; try a lower --lr than {lr:g}")
    return sum(loss * size for loss, size in taken) / sum(size for _, size in taken)


def predict_photos(model: ViT, pixels: Tensor, *, amp: torch.dtype | None, batch: int = EVAL_BATCH) -> Tensor:
    """Return the logits, float32 (n, C) on the CPU, of photos as they are: pixels, uint8 (n, 3, h, w)."""
    images = tqdm(list(pixels.split(batch)), desc="predicting", unit="batch", leave=False)
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
    model: ViT, pixels: Tensor, *, cut: int, amp: torch.dtype | None, keep: bool, batch: int
) -> Callable[[], Iterable[Tensor]]:
    """Return a function that gives the tokens at the cut of photos as they are: computed once if they may be kept."""

    def compute() -> Iterator[Tensor]:
        return cut_tokens(model, _inputs(model, pixels.split(batch)), cut=cut, amp=amp)

    if not keep:
        return compute
    batches = math.ceil(len(pixels) / batch)
    kept = [tokens.cpu() for tokens in tqdm(compute(), desc="frozen blocks", total=batches, unit="batch", leave=False)]
    return lambda: kept


def _token_bytes(model: ViT, n: int) -> int:
    return n * 4 * model.pos_embed.shape[2] * (1 + model.config.grid[0] * model.config.grid[1])
