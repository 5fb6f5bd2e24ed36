"""The training loop: one optimiser step, the epochs, and predictions from the tokens at the cut.

The cut is the first block that trains. What lies before it is frozen (frozen.py): it runs without a graph, and for photos
that are not augmented it runs once, whatever the number of epochs.

Under torchrun the photos of a batch are dealt out to the processes (parallel.py); what follows is the same.

Shapes: n photos, B of a batch, N tokens, D embed_dim, C classes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..data.augment import draw_augmentation
from ..errors import UserError
from ..model import ViT, copy_trainable, working_copy
from ..system import distributed as parallel
from ..system.device import eval_batch, peak_gib, product_flops
from ..system.signals import stop_requests
from .features import Frozen, Source, Tail, on_device, take, token_gib
from .metrics import best_row, confusion_matrix, summarize
from .optimizer import AdamW, lr_at
from .state import State, begin

MAX_GRAD_NORM = 1.0


def train_step(
    net: nn.Module,
    optimizer: AdamW,  # or one of torch's
    scaler: torch.amp.GradScaler,
    inputs: Callable[[slice], Tensor],
    labels: Tensor,
    *,
    micro_batch: int,
    amp: torch.dtype | None,
    batch: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, int]:
    """Take one optimiser step on B photos, in micro-batches whose gradients add up to B's; labels are (B,).

    `inputs` gives what `net` takes of a part of them: images for a model, tokens for its Tail. Under parallel.wrap they are
    one process's share of a `batch` of so many (infinity: a stand-in that must not count). Returns the share's part of the
    batch's mean loss and the norm of the batch's gradients before clipping, both on the device, and the micro-batch, halved
    until the device's memory was enough for it. A norm that is not finite means that the step was skipped, which only a
    scaler (fp16) does.
    """
    shared, device = isinstance(net, DistributedDataParallel), labels.device
    accumulate = partial(
        _accumulate,
        net,
        scaler,
        inputs,
        labels,
        amp=amp,
        batch=batch or len(labels),
        smoothing=label_smoothing,
    )
    while True:
        optimizer.zero_grad()
        try:
            loss = accumulate(micro_batch)
            break
        except torch.OutOfMemoryError as error:
            if micro_batch == 1 or shared:  # the other processes would not redo the step
                raise UserError(
                    f"{device}: out of memory; try a lower --batch-size or --micro-batch"
                ) from error
        micro_batch = max(
            1, min(micro_batch, len(labels)) // 2
        )  # out here, where no exception holds on to tensors
        torch.cuda.empty_cache()
        print(
            f"{device}: out of memory; the step is redone in micro-batches of {micro_batch}",
            file=sys.stderr,
        )
    torchs = cast(
        torch.optim.Optimizer, optimizer
    )  # ours has what a scaler asks for: groups, and a step
    scaler.unscale_(torchs)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
    scaler.step(torchs)
    scaler.update()
    return loss, norm, micro_batch


def _accumulate(
    net: nn.Module,
    scaler: torch.amp.GradScaler,
    inputs: Callable[[slice], Tensor],
    labels: Tensor,
    micro_batch: int,
    *,
    amp: torch.dtype | None,
    batch: float,
    smoothing: float,
) -> Tensor:
    """Add up the gradients of all micro-batches, and return the mean loss; see train_step."""
    shared, device, loss = (
        isinstance(net, DistributedDataParallel),
        labels.device,
        torch.zeros((), device=labels.device),
    )
    for start in range(0, len(labels), micro_batch):
        part = slice(start, start + micro_batch)
        x, y = inputs(part), labels[part]
        last = part.stop >= len(labels)  # with whose gradients the processes exchange all
        with (
            net.no_sync()
            if isinstance(net, DistributedDataParallel) and not last
            else nullcontext()
        ):
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = net(x)  # (b, C)
            # Summed, then divided by the whole batch, so that a short last micro-batch weighs what its photos do.
            mean = (
                F.cross_entropy(logits.float(), y, reduction="sum", label_smoothing=smoothing)
                / batch
            )
            scaler.scale(
                mean * (parallel.world() if shared else 1)
            ).backward()  # DDP takes the processes' mean
        loss += mean.detach()
    return loss


def rehearse(
    model: ViT, *, cut: int, batch_size: int, micro_batch: int, amp: torch.dtype | None
) -> tuple[int, float]:
    """Take two steps on grey photos at a learning rate of 0, which changes nothing.

    Returns the micro-batch, halved until it fits into the device's memory, and the most memory, in GiB, that steps take: on
    CUDA of the device, else of this process.
    """
    device, state = model.cls_token.device, begin(model, amp=amp, weight_decay=0.0)
    share = math.ceil(batch_size / parallel.world())
    pixels = torch.full((share, 3, *model.config.img_size), 128, dtype=torch.uint8, device=device)
    draws, labels = (
        torch.full((share, 5), 0.5, device=device),
        torch.zeros(share, dtype=torch.long, device=device),
    )
    frozen = Frozen(model, cut, batch=share)
    for _ in range(2):  # in the second, what is frozen may be replayed
        inputs = lambda part: frozen(pixels[part], draws[part])  # noqa: E731
        *_, micro_batch = train_step(
            Tail(model, cut),
            state.optimizer,
            state.scaler,
            inputs,
            labels,
            micro_batch=micro_batch,
            amp=amp,
        )
    peak = peak_gib(device)
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return micro_batch, peak


@torch.no_grad()
def predict(model: ViT, tokens: Iterable[Tensor], *, cut: int) -> Tensor:
    """Return the logits, float32 (n, C) on the CPU, of batches of tokens (B, N, D) that enter block `cut`."""
    return torch.cat([model.logits(batch, start=cut).float() for batch in tokens]).cpu()


def score(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the mean loss of logits (n, C) against labels (n,), and what metrics.summarize says of the predictions."""
    confusion = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    return {"loss": F.cross_entropy(logits, labels).item(), **summarize(confusion)}


def fit(
    state: State,
    train: tuple[Source, Tensor],
    val: tuple[Source, Tensor],
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
    cache_views: int = 0,
    cache_gib: float = math.inf,
    compile: bool = False,
    evaluate_every: int = 1,
    scored: Sequence[str] = ("train", "val"),
    frozen: Frozen | None = None,
) -> Iterator[dict[str, float]]:
    """Go on with a run from where it stands, and yield a row of metrics.jsonl after each epoch, the model being that epoch's.

    `train` and `val` are pixels, uint8 (n, 3, h, w), and labels (n,). One seed gives one data order and augmentation,
    whatever the sizes of batches and the number of processes; of `cache_views` epochs the tokens at the cut are kept, and
    the epochs after them have their augmentation again. Rows are of each `evaluate_every`th epoch and the last, and of the
    splits in `scored`. Ends early after `patience` epochs without a better one, and, with state.stopped set, at the end of the
    step during which SIGINT or SIGTERM came. Raises UserError as soon as an epoch's loss is not finite, and if the views'
    tokens take more than `cache_gib` of memory. `frozen` may know the tokens already.
    """
    model, device, n = state.model, state.model.cls_token.device, len(train[1])
    need = token_gib(model, n * cache_views, cut)
    if need > cache_gib:
        raise UserError(
            f"the tokens of {cache_views} views take {need:.1f} GiB; raise --cache-gib {cache_gib:g}, or keep fewer"
        )
    keep = need + token_gib(model, n + len(val[1]), cut) <= cache_gib
    frozen = frozen or Frozen(
        model, cut, batch=eval_batch(device, batch_size, micro_batch, amp), compile=compile
    )
    tail, evaluated = (
        Tail(model, cut),
        working_copy(model, device, model.cls_token.dtype, train=False),
    )
    if compile:
        torch.backends.cuda.enable_cudnn_sdp(True)  # which pays in as long a run
        tail.compile()
    own = [
        (name, split, parallel.shard(torch.arange(len(split[1]))))
        for name, split in (("train", train), ("val", val))
    ]
    splits = [
        (name, frozen.evaluation(split[0], mine, keep=keep), split[1])
        for name, split, mine in own
        if name in scored
    ]
    step = partial(
        train_step,
        parallel.wrap(tail),
        state.optimizer,
        state.scaler,
        amp=amp,
        label_smoothing=label_smoothing,
    )
    schedule, views = partial(lr_at, peak=lr, total=epochs * math.ceil(n / batch_size)), {}
    with stop_requests() as stop_requested:
        while state.epoch <= epochs and not _patience_ends(state, patience):
            started = time.perf_counter() - state.seconds
            (order, draws), view = (
                _draw(n, seed, state.epoch),
                (state.epoch - 1) % cache_views if cache_views else None,
            )
            new = view not in views
            if new and view is not None:
                views[view] = frozen.view(
                    view, train[0], _draw(n, seed, view + 1)[1], stop_requested
                )
            source = train[0] if view is None else views[view]
            state.stopped = source is None
            if source is None:
                return
            inputs = frozen if view is None else (lambda there, _: there)
            batches = [(index, draws[index]) for index in order.split(batch_size)]
            micro_batch = _train_epoch(
                state,
                step,
                schedule,
                source,
                inputs,
                train[1],
                batches,
                micro_batch,
                stop_requested,
            )
            row = {
                "epoch": state.epoch,
                "loss": _mean_loss(state, n, batch_size, lr),
                "lr": state.lr,
            }
            state.seconds = time.perf_counter() - started
            if state.stopped:
                return
            if state.epoch % evaluate_every and state.epoch < epochs:
                state.epoch, state.losses, state.seconds = state.epoch + 1, [], 0.0
                continue
            flops = n * (model.flops(0 if new else cut) + 2 * model.flops(cut)) / state.seconds
            row |= {
                "images_per_s": n / state.seconds,
                "mfu": flops / parallel.world() / product_flops(device, amp),
            }
            copy_trainable(evaluated, model)
            for name, tokens, labels in splits:
                scores = score(
                    parallel.gather(predict(evaluated, tokens(), cut=cut), len(labels)), labels
                )
                row |= {f"{name}_{key}": value for key, value in scores.items()}
            row |= {"seconds": time.perf_counter() - started, "peak_gib": peak_gib(device)}
            state.rows.append(row)
            state.epoch, state.losses, state.seconds = state.epoch + 1, [], 0.0
            yield row
            state.stopped = stop_requested()
            if state.stopped:
                return


def _patience_ends(state: State, patience: int | None) -> bool:
    return bool(patience and state.rows and state.epoch > patience + best_row(state.rows)["epoch"])


def _train_epoch(
    state: State,
    step: Callable,  # train_step, all but the photos
    schedule: Callable[[int], float],
    source: Source,  # pixels, or tokens at the cut (n, N, D)
    inputs: Callable[
        [Tensor, Tensor], Tensor
    ],  # tokens at the cut from what is read of photos and their draws
    labels: Tensor,
    batches: Sequence[tuple[Tensor, Tensor]],
    micro_batch: int,
    stop_requested: Callable[[], bool],
) -> int:
    """Take the steps that are left of the epoch under way, until its end or a request to stop; return the micro-batch."""
    device, losses = state.model.cls_token.device, []
    left = batches[len(state.losses) :]
    own = [
        [part[parallel.shard(torch.arange(len(index)))] for part in (index, draws)]
        for index, draws in left
    ]
    moved = on_device(
        lambda mine: (take(source, mine[0], device), mine[1], labels[mine[0]]), own, device
    )
    bar = tqdm(
        left,
        f"epoch {state.epoch}",
        len(batches),
        initial=len(state.losses),
        unit="step",
        leave=False,
    )
    for (index, _), (there, draws, y) in zip(bar, moved):
        state.lr = schedule(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = state.lr * group["lr_scale"]
        counted = len(index) if parallel.rank() < len(index) else math.inf
        part = lambda part: inputs(there[part], draws[part])  # noqa: B023, E731
        loss, norm, micro_batch = step(part, y, micro_batch=micro_batch, batch=counted)
        losses.append(loss)
        state.step += not state.scaler.is_enabled() or bool(
            norm.isfinite()
        )  # asks the device, so only where it must
        state.stopped = stop_requested()
        if state.stopped:
            break
    if losses:
        state.losses += parallel.total(torch.stack(losses)).tolist()
    return micro_batch


def _draw(n: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw an epoch's order of photos (n,) and, for each photo, its augmentation (n, 5)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator), draw_augmentation(n, generator)


def _mean_loss(state: State, n: int, batch_size: int, lr: float) -> float:
    """Return the mean loss of the epoch so far, without steps of fp16 that were skipped; raises UserError if there is none."""
    sizes = [min(batch_size, n - i * batch_size) for i in range(len(state.losses))]
    taken = [(loss, size) for loss, size in zip(state.losses, sizes) if math.isfinite(loss)]
    if not taken or (len(taken) < len(sizes) and not state.scaler.is_enabled()):
        found = next(loss for loss in state.losses if not math.isfinite(loss))
        raise UserError(f"the loss of epoch {state.epoch} is {found}; try a lower --lr than {lr:g}")
    return sum(loss * size for loss, size in taken) / sum(size for _, size in taken)


@torch.no_grad()
def predict_photos(model: ViT, pixels: Source, *, batch: int) -> Tensor:
    """Return the logits, float32 (n, C) on the CPU, of photos as they are: pixels, uint8 (n, 3, h, w)."""
    device, jobs = model.cls_token.device, torch.arange(len(pixels)).split(batch)
    images = on_device(lambda index: [take(pixels, index, device)], jobs, device)
    bar = tqdm(images, "predicting", len(jobs), unit="batch", leave=False)
    return torch.cat([model(model.preprocess.normalize(found)).float() for (found,) in bar]).cpu()
