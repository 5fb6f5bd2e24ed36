"""Which settings to train with, by cross-validation inside the training photos. No test is read.

    python benchmarks/recipe.py --data NAME=DIR[,MODEL] ... [--stage NAME] [--out recipe.jsonl]

Each data set's training photos are dealt into five folds, `--repeats` times. A run trains on four
of the folds, of which it holds back a tenth for validation as train.py does, and is scored on the
fifth. One run gives the score of every rule for the weights that are kept, because the model is
evaluated after each epoch. The result is a line of JSON for each run, and a table.

Photos are augmented in advance: each epoch takes one of `VIEWS` augmented views of each photo.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from results import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT))

from minivit.checkpoints.weights import load_pretrained
from minivit.cli import parse_blocks
from minivit.data import store
from minivit.data.augment import augment, draw_augmentation
from minivit.data.datasets import load_data
from minivit.model import ViT, freeze_except, working_copy
from minivit.training.linear_head import fit_linear_head
from minivit.training.optimizer import AdamW, lr_at, parameter_groups

FOLDS = 5
VIEWS = 32
EVAL_BATCH = 128
MOVING = 0.2  # the exponential average's horizon, as a fraction of all steps


@dataclass(frozen=True)
class Recipe:
    """The settings of a run that are compared."""

    blocks: str = "10-11"
    start: str = "zero"  # the head that training starts from: "zero" or "fitted"
    lr: float = 1e-4
    head_lr: float = 1e-4
    epochs: int = 5
    batch: int = 64
    min_steps: int = 0  # more epochs, if these are fewer steps
    augmentation: str = "usual"  # "none", "usual" or "strong"
    mixup: float = 0.0
    smoothing: float = 0.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    views: int = VIEWS  # augmented views of each photo, of which an epoch takes one


NOW = Recipe()  # what train.py did before this comparison
BASE = replace(NOW, min_steps=120, batch=16, head_lr=1e-3)
STAGES: dict[str, dict[str, Recipe]] = {
    "now": {"before": NOW},
    "rates": {
        f"{start} head, lr {lr:g}, head {head_lr:g}": replace(
            BASE, batch=32, start=start, lr=lr, head_lr=head_lr
        )
        for start, lr, head_lr in itertools.product(
            ("zero", "fitted"), (3e-5, 1e-4, 3e-4), (1e-4, 1e-3)
        )
    },
    "steps": {
        f"at least {steps} steps of {batch}": replace(BASE, min_steps=steps, batch=batch)
        for steps, batch in ((60, 64), (60, 16), (120, 64), (120, 16), (240, 32), (480, 32))
    },
    "regularisation": {
        "as it is": BASE,
        "no augmentation": replace(BASE, augmentation="none"),
        "strong augmentation": replace(BASE, augmentation="strong"),
        "mixup 0.2": replace(BASE, mixup=0.2),
        "label smoothing 0.1": replace(BASE, smoothing=0.1),
        "weight decay 0.3": replace(BASE, weight_decay=0.3),
        "layer decay 0.7": replace(BASE, layer_decay=0.7),
    },
    "views": {f"{views} kept views": replace(BASE, views=views) for views in (1, 2, 4)},
    "blocks": {
        f"blocks {blocks}": replace(BASE, blocks=blocks) for blocks in ("none", "11", "8-11")
    },
}


@dataclass
class DataSet:
    """The training photos of a data set, on the device, and the model to fine-tune."""

    name: str
    model: ViT  # float32, on the CPU
    pixels: Tensor  # uint8 (n, 3, h, w)
    labels: Tensor  # (n,), on the CPU
    lr_factor: float  # on all learning rates: a small model wants higher ones
    # Features by augmentation and cut: (views, n, N, D), and of plain images under "plain".
    features: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.model.labels)

    @torch.no_grad()
    def features_at(self, augmentation: str, cut: int) -> Tensor:
        """Return the features of the views of all photos at a cut, computed once."""
        key = (augmentation, cut)
        if key not in self.features:
            frozen = working_copy(self.model, self.pixels.device, torch.bfloat16, train=False)
            generator = torch.Generator().manual_seed(0)
            num_views = 1 if augmentation in ("plain", "none") else VIEWS
            views = []
            for _ in range(num_views):
                draws = draw_augmentation(len(self.pixels), generator)
                batches = []
                for rows in torch.arange(len(self.pixels)).split(EVAL_BATCH):
                    images = frozen.preprocess.normalize(self.pixels[rows])
                    if augmentation == "usual":
                        images = augment(images, draws[rows])
                    if augmentation == "strong":
                        images = augment_strongly(augment(images, draws[rows]), generator)
                    batches.append(frozen.tokens(images, stop=cut, only_read=True))
                views.append(torch.cat(batches))
            self.features[key] = torch.stack(views)
        return self.features[key]


def augment_strongly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change brightness and contrast by up to 40%, and erase a square of a third of the side."""
    draws = torch.rand(len(images), 4, generator=generator).to(images.device)
    contrast = 0.6 + 0.8 * draws[:, 0].view(-1, 1, 1, 1)
    shift = 0.8 * (draws[:, 1].view(-1, 1, 1, 1) - 0.5)
    images = images * contrast + shift
    side = images.shape[-1] // 3
    for i, (y, x) in enumerate((draws[:, 2:] * (images.shape[-1] - side)).long().tolist()):
        images[i, :, y : y + side, x : x + side] = 0.0
    return images


def load(name: str, folder: Path, checkpoint: str, device: torch.device) -> DataSet:
    """Load the photos that a run of seed 0 would train and validate on."""
    data = load_data(folder, seed=0)
    model = load_pretrained(checkpoint, labels=data.classes)
    readable, file = store.prepare(data, model.preprocess, workers=4, cap_gib=4)
    pixels = store.open_pixels(readable, file, model.preprocess, 4)
    row_of = {path: row for row, path in enumerate(pixels.paths)}
    paths = data.train.paths + data.val.paths
    rows = torch.tensor([row_of[path] for path in paths])
    labels = torch.tensor(data.train.labels + data.val.labels)
    # make demo trains its tiny model at twenty times the rate.
    lr_factor = 20.0 if checkpoint == "demo" else 1.0
    return DataSet(name, model, pixels[rows].to(device), labels, lr_factor)


def split(labels: Tensor, repeat: int, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the photos to train on, to validate on, and of the fold left out."""
    rng = random.Random(repeat)
    train, val, held = [], [], []
    for c in range(int(labels.max()) + 1):
        indices = (labels == c).nonzero()[:, 0].tolist()
        rng.shuffle(indices)
        held_of_class = indices[(fold + c) % FOLDS :: FOLDS]
        rest = [i for i in indices if i not in held_of_class]
        num_val = max(1, round(0.1 * len(rest)))
        held += held_of_class
        val += rest[:num_val]
        train += rest[num_val:]
    return torch.tensor(train), torch.tensor(val), torch.tensor(held)


class Snapshots:
    """The weights after each epoch, their scores, and the averages that rules may keep."""

    def __init__(self, model: ViT, score: object) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.score = score
        self.weights: list[list[Tensor]] = []
        self.rows: list[dict[str, float]] = []  # val_accuracy, val_loss and held, by epoch
        self.moving: Tensor | None = None  # the exponential average, as one vector

    def copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def end_epoch(self) -> None:
        self.weights.append(self.copy())
        self.rows.append(self.score())

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Move the exponential average towards the present weights."""
        vector = torch.nn.utils.parameters_to_vector(self.parameters)
        if self.moving is None:
            self.moving = vector
        else:
            self.moving.lerp_(vector, 1 - decay)

    @torch.no_grad()
    def score_moving(self) -> dict[str, float]:
        torch.nn.utils.vector_to_parameters(self.moving, self.parameters)
        return self.score()

    @torch.no_grad()
    def score_weights(self, weights: Sequence[Tensor]) -> dict[str, float]:
        for parameter, weight in zip(self.parameters, weights):
            parameter.copy_(weight)
        return self.score()

    def score_average(self, num_epochs: int) -> dict[str, float]:
        chosen = self.weights[-num_epochs:]
        return self.score_weights([torch.stack(same).mean(0) for same in zip(*chosen)])


def apply_rules(snapshots: Snapshots, fitted: dict[str, float], num_val: int) -> dict[str, float]:
    """Return the accuracy on the fold left out of the weights that each rule keeps."""
    rows = snapshots.rows
    last = rows[-1]
    best = max(range(len(rows)), key=lambda i: (rows[i]["val_accuracy"], i))
    lowest = min(range(len(rows)), key=lambda i: rows[i]["val_loss"])
    right = last["val_accuracy"] * num_val
    rate = (right + 1) / (num_val + 2)
    error = math.sqrt(rate * (1 - rate) / num_val)
    kept = {
        "highest accuracy": rows[best]["held"],
        "lowest loss": rows[lowest]["held"],
        "last epoch": last["held"],
        "average of the last half": snapshots.score_average(math.ceil(len(rows) / 2))["held"],
        "average of the last fifth": snapshots.score_average(math.ceil(len(rows) / 5))["held"],
    }
    kept["exponential average"] = snapshots.score_moving()["held"]
    for errors in (1, 2):
        gain = rows[best]["val_accuracy"] - last["val_accuracy"]
        chosen = rows[best] if gain > errors * error else last
        kept[f"last, unless {errors} errors worse"] = chosen["held"]
        if fitted["val_accuracy"] - chosen["val_accuracy"] > errors * error:
            chosen = fitted
        kept[f"the same, or the head alone, {errors} errors"] = chosen["held"]
    kept["the head alone"] = fitted["held"]
    return kept


def run(dataset: DataSet, recipe: Recipe, repeat: int, fold: int) -> dict[str, float]:
    """Train once, and return the accuracy on the fold left out for each rule."""
    device = dataset.pixels.device
    train, val, held = split(dataset.labels, repeat, fold)
    labels = dataset.labels.to(device)
    depth = dataset.model.config.depth
    cut = freeze_except(dataset.model, parse_blocks(recipe.blocks, depth))
    # A working copy in float32 on the CPU shares its weights, and the next run needs them again.
    model = working_copy(copy.deepcopy(dataset.model), device, None, train=True)

    def score() -> dict[str, float]:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            plain = dataset.features_at("plain", cut)[0]
            logits = [model.logits(plain[rows], start=cut).float() for rows in (val, held)]
        right = [x.argmax(1) == labels[rows] for x, rows in zip(logits, (val, held))]
        return {
            "val_accuracy": right[0].float().mean().item(),
            "val_loss": F.cross_entropy(logits[0], labels[val]).item(),
            "held": right[1].float().mean().item(),
        }

    # The fitted head comes first: it is a rule of its own, and training may start from it.
    with torch.no_grad():
        final = model.head_inputs(dataset.features_at("plain", depth)[0].float(), start=depth)
    head = fit_linear_head(final[train], labels[train], dataset.num_classes)
    zero = [p.detach().clone() for p in model.head.parameters()]
    with torch.no_grad():
        model.head.weight.copy_(head.weight)
        model.head.bias.copy_(head.bias)
    fitted = score()
    if recipe.blocks == "none":
        return {"the head alone": fitted["held"]}
    if recipe.start == "zero":
        with torch.no_grad():
            for parameter, start in zip(model.head.parameters(), zero):
                parameter.copy_(start)

    steps_per_epoch = math.ceil(len(train) / recipe.batch)
    epochs = max(recipe.epochs, math.ceil(recipe.min_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    groups = parameter_groups(
        model, recipe.weight_decay, recipe.layer_decay, recipe.head_lr / recipe.lr
    )
    optimizer = AdamW(groups)
    parameters = optimizer.parameters()
    snapshots = Snapshots(model, score)
    views = dataset.features_at(recipe.augmentation, cut)
    generator = torch.Generator().manual_seed(1000 * repeat + fold)
    beta = random.Random(1000 * repeat + fold)
    step = 0
    for _ in range(epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        num_views = min(recipe.views, len(views))
        view_of = torch.randint(num_views, (len(order),), generator=generator)
        for rows, view_rows in zip(order.split(recipe.batch), view_of.split(recipe.batch)):
            lr = lr_at(step, peak=recipe.lr * dataset.lr_factor, total=total)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            inputs = views[view_rows, rows]
            targets = F.one_hot(labels[rows], dataset.num_classes).float()
            if recipe.mixup:
                share = beta.betavariate(recipe.mixup, recipe.mixup)
                inputs = share * inputs + (1 - share) * inputs.flip(0)
                targets = share * targets + (1 - share) * targets.flip(0)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                logits = model.logits(inputs, start=cut)
            F.cross_entropy(logits.float(), targets, label_smoothing=recipe.smoothing).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            snapshots.move(1 - 1 / max(1.0, MOVING * total))
        snapshots.end_epoch()
    return apply_rules(snapshots, fitted, len(val))


def work(job: tuple[argparse.Namespace, int]) -> list[dict[str, object]]:
    """Do one worker's share of the runs."""
    args, worker = job
    torch.set_num_threads(max(1, args.threads // args.workers))
    device = torch.device(args.device)
    datasets = []
    for text in args.data:
        name, _, rest = text.partition("=")
        folder, _, checkpoint = rest.partition(",")
        datasets.append(load(name, Path(folder), checkpoint or args.model, device))
    tasks = []
    for stage in args.stages:
        for name, recipe in STAGES[stage].items():
            for dataset in datasets:
                for repeat, fold in itertools.product(range(args.repeats), range(FOLDS)):
                    tasks.append((stage, name, recipe, dataset, repeat, fold))
    rows: list[dict[str, object]] = []
    with args.out.open("a") as file:
        for stage, name, recipe, dataset, repeat, fold in tasks[worker :: args.workers]:
            started = time.perf_counter()
            kept = run(dataset, recipe, repeat, fold)
            row = {"stage": stage, "recipe": name, "data": dataset.name, "repeat": repeat}
            row |= {"fold": fold, "kept": kept, "seconds": time.perf_counter() - started}
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    return rows


def print_table(rows: Sequence[dict]) -> None:
    """Print for each recipe and rule the mean accuracy and its standard error, by data set."""
    values: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        for rule, accuracy in row["kept"].items():
            values[row["stage"], row["recipe"], rule, row["data"]].append(accuracy)
    names = sorted({row["data"] for row in rows})
    print(f"{'stage':15} {'recipe':36} {'kept weights':40}" + "".join(f"{n:>18}" for n in names))
    for stage, recipe, rule in dict.fromkeys(key[:3] for key in values):
        cells = ""
        for name in names:
            of_cell = values[stage, recipe, rule, name]
            error = statistics.stdev(of_cell) / math.sqrt(len(of_cell))
            cells += f"{statistics.mean(of_cell):>10.4f} ±{error:.4f}"
        print(f"{stage:15} {recipe:36} {rule:40}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR[,MODEL]")
    parser.add_argument("--model", default=str(ROOT / ".cache" / "dinov2-small"))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("recipe.jsonl"))
    args = parser.parse_args()
    jobs = [(args, worker) for worker in range(args.workers)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        rows = [row for share in pool.map(work, jobs) for row in share]
    print_table(rows)


if __name__ == "__main__":
    main()
