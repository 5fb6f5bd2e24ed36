"""The grid of a study: its cells, an estimate of their time, and the training run of one cell."""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...cli import parse_blocks
from ...data.datasets import Data, Split
from ...errors import UserError
from ...model import ViT, copy_trainable, freeze_except, working_copy
from ...settings import MIN_EPOCHS, TrainSettings, epochs_for
from ...system.device import pick_micro_batch
from ...system.signals import StopRequested, stop_requests
from ...training.features import TrainableLayers
from ...training.linear_head import fit_linear_head
from ...training.metrics import choose_kept
from ...training.state import RunState, new_state, set_trainable
from ...training.step import (
    EpochPhotos,
    draw_epoch,
    mean_loss,
    predict,
    score_predictions,
    train_epoch,
)
from ...training.views import given_features
from .features import StudyFeatures


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    shots: str  # training photos per class, or "all"
    cut: int
    train: Split
    settings: TrainSettings  # with the blocks, the seed and the epochs of this cell

    def key(self) -> tuple[str, str, str]:
        """Return what identifies the cell in study.csv: shots, blocks and seed."""
        return self.shots, self.settings.blocks, str(self.settings.seed)


def plan(
    splits: Sequence[Data],
    cuts: Mapping[str, int],
    shots: Sequence[str],
    epochs: int | None,
    settings: TrainSettings,
) -> list[Cell]:
    """List the cells of the grid.

    `splits` is the data as each seed splits it, `cuts` has the cut for each choice of blocks.
    Without `epochs`, there are as many as MIN_STEPS steps take, and at least MIN_EPOCHS. For one
    seed, the photos of a smaller number of shots are among those of a larger one. A number that
    is not below the size of the smallest class is left out, with a note on stderr. Raises UserError
    if no number is left.
    """
    smallest = min(min(Counter(data.train.labels).values()) for data in splits)
    counts = list(dict.fromkeys(shots))
    left_out = [count for count in counts if count != "all" and int(count) >= smallest]
    if left_out == counts:
        raise UserError(
            f"--shots {' '.join(counts)}: expected fewer than the photos that the smallest class "
            f"has to train on, {smallest}, or all"
        )
    if left_out:
        print(
            f"left out: {', '.join(left_out)} photos per class; "
            f"the smallest class has {smallest} to train on",
            file=sys.stderr,
        )
    cells = []
    for seed, data in enumerate(splits):
        for count in counts:
            if count in left_out:
                continue
            train = choose_photos(data.train, count, seed)
            num_epochs = epochs
            if num_epochs is None:
                steps_per_epoch = settings.steps_per_epoch(len(train))
                num_epochs = epochs_for(steps_per_epoch)
            for blocks, cut in cuts.items():
                cell_settings = replace(settings, blocks=blocks, seed=seed, epochs=num_epochs)
                cells.append(Cell(count, cut, train, cell_settings))
    return cells


def spell_blocks(blocks: Sequence[int], depth: int) -> str:
    """Spell sorted blocks of a model in one way, however a user names them: 11,10 is 10-11."""
    if not blocks:
        return "none"
    if len(blocks) == depth:
        return "all"
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and block == ranges[-1][-1] + 1:
            ranges[-1].append(block)
        else:
            ranges.append([block])
    parts = [f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges]
    return ",".join(parts)


def choose_photos(train: Split, shots: str, seed: int) -> Split:
    """Choose a number of photos of each class at random; the seed decides their order."""
    order = random.Random(seed).sample(range(len(train)), len(train))
    indices_of_class: dict[int, list[int]] = {}
    for i in order:
        indices_of_class.setdefault(train.labels[i], []).append(i)
    count = len(train) if shots == "all" else int(shots)
    chosen = []
    for indices in indices_of_class.values():
        chosen += indices[:count]
    return train.take(sorted(chosen))


def unseen_photos(data: Data, train: Split) -> Split:
    """Return the photos that a run on `train` may be judged by: neither trained on nor the test.

    These are the validation photos, and the training photos that fewer shots leave over.
    """
    trained = set(train.paths)
    left_over = data.train.take(
        [i for i, path in enumerate(data.train.paths) if path not in trained]
    )
    return Split(data.val.paths + left_over.paths, data.val.labels + left_over.labels)


def count_unseen(splits: Sequence[Data], shots: str) -> int:
    """Count the different photos by which the runs of all seeds are judged."""
    unseen: set[Path] = set()
    for seed, data in enumerate(splits):
        unseen.update(unseen_photos(data, choose_photos(data.train, shots, seed)).paths)
    return len(unseen)


def estimate_seconds(
    model: ViT, cells: Sequence[Cell], splits: Sequence[Data], num_views: int
) -> float:
    """Estimate how long the cells take, from the speed of a forward pass on this device."""
    images = torch.randn(32, 3, *model.config.img_size, device=model.cls_token.device)
    with torch.inference_mode():
        for _ in range(2):  # The first pass only warms up.
            started = time.perf_counter()
            model(images).float().sum().item()
            seconds = time.perf_counter() - started
    flops_per_second = len(images) * model.flops() / seconds
    num_images = len(splits[0].paths()) + num_views * len(splits[0].train)
    last_cut = max(cell.cut for cell in cells)
    flops = num_images * (model.flops() - model.flops(last_cut))
    for cell in cells:
        data = splits[cell.settings.seed]
        epochs = cell.settings.epochs
        evaluations = math.ceil(epochs / evaluation_interval(epochs))
        images_trained = 3 * epochs * len(cell.train)  # A backward pass takes as long as two.
        # The head alone is fitted to the training photos, and evaluated; so are the kept weights.
        images_evaluated = (evaluations + 1) * len(data.val) + 2 * len(cell.train) + len(data.test)
        images_evaluated += len(unseen_photos(data, cell.train))
        flops += model.flops(cell.cut) * (images_trained + images_evaluated)
    return flops / flops_per_second


def evaluation_interval(epochs: int) -> int:
    """Return after how many epochs to evaluate: few photos have many epochs.

    A run of at least MIN_EPOCHS epochs is evaluated five to nine times.
    """
    return max(1, epochs // MIN_EPOCHS)


def run_cell(
    cell: Cell, model: ViT, data: Data, features: StudyFeatures, amp: torch.dtype | None
) -> dict[str, object] | None:
    """Fine-tune as train.py does, but from the kept features, and test the weights that it keeps.

    As in train.py, the validation photos choose which weights are kept. These are then judged by
    all photos that are new to the run, besides the test: the few validation photos of a small data
    set cannot tell one choice of blocks from another.

    Returns a row of study.csv, or None if a stop was requested. The model is left as it was.
    """
    started = time.perf_counter()
    settings = cell.settings
    device = features.model.cls_token.device
    freeze_except(model, parse_blocks(settings.blocks, model.config.depth))
    state = new_state(
        working_copy(model, device, amp, train=True),
        cut=cell.cut,
        amp=amp,
        micro_batch=pick_micro_batch(None, settings.batch_size, device, amp),
        weight_decay=settings.weight_decay,
        head_scale=settings.head_lr / settings.lr,
    )
    weights_before = state.trainable_weights()
    eval_model = working_copy(state.model, device, amp, train=False)
    try:
        with stop_requests() as stop_requested:
            evaluate_head_alone(cell, state, eval_model, data.val, features)
            if cell.cut < model.config.depth:
                train_cell(cell, state, eval_model, data.val, features, stop_requested)
    except StopRequested:
        state.stopped = True
    if state.stopped:
        set_trainable(state.model, weights_before)
        return None
    if choose_kept(state.rows, settings.keep, len(data.val)).weights == "earlier":
        set_trainable(state.model, state.kept)
    copy_trainable(eval_model, state.model)
    unseen = unseen_photos(data, cell.train)
    val_accuracy = accuracy(eval_model, unseen, features)
    train_accuracy = accuracy(eval_model, cell.train, features)
    test_accuracy = accuracy(eval_model, data.test, features)
    # Weights in float32 on the CPU are shared with `model`.
    set_trainable(state.model, weights_before)
    return {
        "shots": cell.shots,
        "blocks": settings.blocks,
        "seed": settings.seed,
        "photos": len(cell.train),
        "val_photos": len(unseen),
        "test_photos": len(data.test),
        "epochs": settings.epochs,
        "train_accuracy": train_accuracy,
        "val_accuracy": val_accuracy,
        "test_accuracy": test_accuracy,
        "seconds": time.perf_counter() - started,
    }


def evaluate_head_alone(
    cell: Cell, state: RunState, eval_model: ViT, val: Split, features: StudyFeatures
) -> None:
    """Fit the head alone to the frozen model as train.py does, and add its row, as epoch 0.

    The weights with the fitted head become state.kept, and those of the model if no block is to
    train.
    """
    labels = torch.tensor(cell.train.labels)
    _, inputs = predict(eval_model, features.batches(cell.train.paths), cut=cell.cut)
    head = fit_linear_head(inputs, labels, eval_model.config.num_classes)
    untrained = state.trainable_weights()
    state.kept = untrained | {"head.weight": head.weight, "head.bias": head.bias}
    set_trainable(state.model, state.kept)
    add_row(state, 0, eval_model, val, features)
    if cell.cut < eval_model.config.depth:
        set_trainable(state.model, untrained)


def train_cell(
    cell: Cell,
    state: RunState,
    eval_model: ViT,
    val: Split,
    features: StudyFeatures,
    stop_requested: Callable[[], bool],
) -> None:
    """Train all epochs, with a row for each that is evaluated.

    Stops early, with state.stopped set, if a stop was requested.
    """
    settings = cell.settings
    labels = torch.tensor(cell.train.labels)
    layers = TrainableLayers(state.model, cell.cut)
    num_views = min(settings.cache_views, settings.epochs)
    views = [features.view(i, cell.train.paths) for i in range(num_views)]
    interval = evaluation_interval(settings.epochs)
    while state.epoch <= settings.epochs and not state.stopped:
        order, draws = draw_epoch(len(labels), settings.seed, state.epoch)
        view = views[(state.epoch - 1) % num_views]
        photos = EpochPhotos(view, given_features, labels, order, draws)
        train_epoch(state, layers, photos, settings, stop_requested)
        mean_loss(state, len(labels), settings)  # This raises if the loss is not finite.
        if state.stopped:
            return
        if state.epoch % interval == 0 or state.epoch == settings.epochs:
            add_row(state, state.epoch, eval_model, val, features)
            state.update_kept(state.trainable_weights(), settings)
            state.stopped = stop_requested()
        state.epoch += 1
        state.losses = []


def add_row(
    state: RunState, epoch: int, eval_model: ViT, val: Split, features: StudyFeatures
) -> None:
    """Evaluate the present weights on the validation photos, and add a row for the epoch."""
    copy_trainable(eval_model, state.model)
    state.rows.append({"epoch": epoch, "val_accuracy": accuracy(eval_model, val, features)})


def accuracy(model: ViT, split: Split, features: StudyFeatures) -> float:
    """Return the accuracy on a split, from the features of its images without augmentation."""
    logits, _ = predict(model, features.batches(split.paths), cut=features.cut)
    return score_predictions(logits, torch.tensor(split.labels))["accuracy"]
