"""The names of what is measured, which the benchmarks write into rows and report.py looks up."""

from __future__ import annotations

# What finetune.py calls a program and its settings, and what a reader needs to know of them.
VARIANTS = {
    "transformers": "transformers' Trainer as its users write it: float32, batch 16, 4 workers, "
    "tested after each epoch",
    "transformers-bf16": "Trainer with bf16 and batch 64",
    "transformers-fp16": "Trainer with fp16, batch 16, 4 workers",
    "transformers-tuned": "Trainer tuned: batch 64, a worker for each core that stays, photos "
    "made small first, bf16 where the device is good at it",
    "transformers-tuned-float32": "Trainer tuned, batch 64, float32",
    "transformers-tuned-256": "the same with batch 256",
    "transformers-even": "Trainer tuned, batch 64, tested once at the end, as `train.py` does",
    "minivit-cold": "`train.py`, photos still to be decoded",
    "minivit": "`train.py`, photos decoded by an earlier run",
    "minivit-fp16-cold": "`train.py --amp fp16`, photos still to be decoded",
    "minivit-fp16": "`train.py --amp fp16`, photos decoded by an earlier run",
    "minivit-float32-cold": "`train.py --amp off`, photos still to be decoded",
    "minivit-views1": "`train.py --cache-views 1`",
    "minivit-views2": "`train.py --cache-views 2`",
    "minivit-256": "`train.py --batch-size 256`",
    "minivit-compile": "`train.py --compile`",
    "minivit-compile-views1": "`train.py --compile --cache-views 1`",
}
DEMO = "make demo: six drawn breeds, blocks 10-11, cpu"
KEPT_NOTHING = "nothing kept"
KEPT_4_GIB = "up to 4 GiB kept"
# What accuracy.py calls the flags of a run of train.py.
ACCURACY_SETTINGS = {
    "float32": ("--amp", "off"),
    "float32-plain": ("--amp", "off", "--store-gib", "1e-5", "--cache-gib", "1e-5"),
    "bf16": ("--amp", "bf16"),
    "fp16": ("--amp", "fp16"),
    "bf16-views1": ("--amp", "bf16", "--cache-views", "1"),
    "bf16-views2": ("--amp", "bf16", "--cache-views", "2"),
    "bf16-views4": ("--amp", "bf16", "--cache-views", "4"),
}


def whole_job(model: str, epochs: int, train: int, test: int, photos: str, device: str) -> str:
    return (
        f"fine-tuning from start to end: {model}, blocks 10-11, {epochs} epochs, "
        f"{train} {photos} to train, {test} to test, {device}"
    )


def phases(device: str, *, cold: bool) -> str:
    run = "first" if cold else "second"
    return f"where the seconds of a {run} run of train.py go, {device}"


def steady_speed(model: str, photos: int, device: str) -> str:
    return f"images a second: {model}, blocks 10-11 train, epochs of {photos} photos, {device}"


def epoch_cost(model: str, precision: str, batch: int, device: str) -> str:
    return f"seconds an epoch: {model}, {precision}, batch {batch}, {device}"


def epoch_name(photos: int, blocks: int, kept: str) -> str:
    """Return what the figures of an epoch begin with."""
    return f"{photos} photos, {blocks} blocks, {kept}"


def one_photo(model: str, device: str) -> str:
    return f"a photo to a figure of blocks 8-11, whole process: {model}, {device}"


def many_photos(model: str, device: str) -> str:
    return f"a folder of photos to figures of blocks 8-11, whole process: {model}, {device}"


def attention_cost(batch: int, device: str) -> str:
    return f"attention of blocks 8-11 beside the logits: ViT-B/16, batch {batch}, {device}"


def accuracy(model: str, data: str, flags: str) -> str:
    return f"test accuracy: {model}, {data}, train.py {flags or 'by default'}"


def train_gpu(gpus: int) -> str:
    return f"train.py: memory, resume and speed of ViT-B/16, {gpus} GPUs"
