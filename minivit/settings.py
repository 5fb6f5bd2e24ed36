"""What a training run and an inference are asked to do: every flag of train.py and infer.py.

The defaults here are the defaults of the flags. Nothing slow is imported, so that `--help` and a
mistyped flag are answered at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

BASE_MODEL = "google/vit-base-patch16-224"
RUN_DIR = "runs/pets"
DATA_DIR = "data"
AUTO = -1  # the value of a setting that is chosen once the photos and the device are known
# By default there are MIN_EPOCHS epochs in batches of MAX_BATCH photos. Few photos get smaller
# batches and then more epochs, because fewer optimizer steps than MIN_STEPS teach less.
MIN_EPOCHS = 5
MIN_STEPS = 120
MIN_BATCH, MAX_BATCH = 16, 64


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training run."""

    # What is trained, and on what.
    model: str = BASE_MODEL  # a Hub id, a folder, a file, or "demo"
    revision: str | None = None  # of the Hub repository
    img_size: tuple[int, int] | None = None  # height, width in pixels; None: the checkpoint's
    data: str = DATA_DIR
    download: bool = False  # of Oxford-IIIT Pet, also into another folder than DATA_DIR
    blocks: str = "10-11"  # the blocks to train, as cli.parse_blocks reads them
    # How it is trained.
    epochs: int = AUTO
    batch_size: int = AUTO  # photos per optimizer step
    micro_batch: int | None = None  # photos per forward pass; None: chosen for the device
    lr: float = 1e-4  # the peak learning rate of the blocks and the final norm
    head_lr: float = 1e-3  # the peak learning rate of the head
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    class_weights: str = "none"  # in the loss, one of class_weights.CLASS_WEIGHTS
    cache_views: int = AUTO
    patience: int | None = None  # epochs without a better one; None: never stop early
    keep: str = "auto"  # which weights are tested and written, one of metrics.KEEP
    calibrate: str = "auto"  # one of calibration.CALIBRATE
    seed: int = 0
    # On which machine.
    device: str = "auto"
    amp: str = "auto"
    memory_gib: float | None = None  # of a CUDA device; None: all that is free
    cache_gib: float = 4.0  # of a GPU's or the host's memory, for features of the frozen blocks
    store_gib: float = 32.0  # of disk, for decoded photos
    compile: bool = False
    deterministic: bool = False
    workers: int = 1
    # What becomes of it.
    skip_bad: bool = False
    out: str = RUN_DIR
    resume: bool = False
    dry_run: bool = False
    push_to_hub: str | None = None
    public: bool = False  # whether a new repository on the Hub is public
    # The settings that were AUTO, and have been chosen since.
    chosen: tuple[str, ...] = ()

    def mathematics(self) -> dict[str, object]:
        """Return the settings that change the result, by flag; `--resume` keeps to them."""
        names = ["epochs", "batch_size", "lr", "head_lr", "weight_decay", "layer_decay"]
        names += ["label_smoothing", "class_weights", "cache_views", "patience", "keep"]
        names += ["calibrate", "seed"]
        values = asdict(self)
        return {flag(name): values[name] for name in names}

    def choose(self, **values: int) -> TrainSettings:
        """Return the settings with these values for those that are AUTO."""
        chosen = {name: value for name, value in values.items() if getattr(self, name) == AUTO}
        return replace(self, **chosen, chosen=(*self.chosen, *chosen))  # type: ignore[arg-type]

    def steps_per_epoch(self, num_train: int) -> int:
        return math.ceil(num_train / self.batch_size)

    def views_to_keep(self) -> int:
        """Return how many views to keep features of: none if no view would come again."""
        return self.cache_views if self.cache_views < self.epochs else 0


@dataclass(frozen=True)
class InferSettings:
    """The settings of an inference."""

    photos: tuple[str, ...]  # photos, or folders of photos
    model: str | None = None  # None: the last run if there is one, else BASE_MODEL
    revision: str | None = None
    compare: str | None = None  # another model
    img_size: tuple[int, int] | None = None
    layers: str = "8-11"  # the blocks to draw, as cli.parse_blocks reads them
    method: str = "attention"  # one of attention.METHODS
    target: str | None = None  # the class for relevance; None: the first prediction
    against: str | None = None  # with a target: the class that relevance contrasts it with
    heads: bool = False
    query: tuple[float, float] | None = None  # x, y of a pixel; None: the class token
    scale: str = "own"
    top_k: int = 5
    out: str = "attention"
    html: bool = False
    npz: bool = False
    no_figures: bool = False
    json: bool = False
    workers: int = 1
    device: str = "auto"
    amp: str = "auto"


def batch_size_for(num_train: int) -> int:
    """Return the largest batch with which MIN_EPOCHS epochs take MIN_STEPS steps, or MIN_BATCH."""
    batch = MAX_BATCH
    while batch > MIN_BATCH and MIN_EPOCHS * math.ceil(num_train / batch) < MIN_STEPS:
        batch //= 2
    return batch


def epochs_for(steps_per_epoch: int) -> int:
    """Return how many epochs to train: MIN_EPOCHS, and more if these are fewer than MIN_STEPS."""
    return max(MIN_EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch))


def flag(name: str) -> str:
    """Return the flag of a setting: --batch-size for batch_size."""
    return f"--{name.replace('_', '-')}"


def list_changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Say for each setting that has another value now what it was and what it is."""
    return [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in now.items()
        if before.get(name) != value
    ]
