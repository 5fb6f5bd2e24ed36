"""Images a second of ViT-B/16 in steady state: ours, transformers' model and timm's.

    python benchmarks/throughput.py [--only train,kept,eval,transformers,timm] [--batch 64,256]
                                    [--amp bf16,fp16,off]

Blocks 10-11, the final norm and the head train. `train` is train.py's own loop, run_epochs, on
random photos in host memory, augmented on the device, from its second epoch on. `kept` is the same
with the kept features of one view, and `eval` is predict_photos. The other libraries' models take
the same batch over and over; it lies on the device and is not augmented. Everything is measured
with and without torch.compile. Figures are medians.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from finetune_transformers import freeze
from results import Figure, dtype_name, figure_of, model_name, parse_with_model, record
from torch import Tensor, nn
from transformers import ViTForImageClassification
from workloads import steady_speed

from minivit import load_pretrained
from minivit.cli import parse_blocks
from minivit.model import ViTConfig, freeze_except, working_copy
from minivit.settings import TrainSettings
from minivit.system import device as devices
from minivit.train import run_epochs
from minivit.training.state import new_state
from minivit.training.step import predict_photos

CLASSES = 37
LOW = "forward, weights in low precision"
OTHERS = ("step", "forward", LOW)  # what is measured of another library's model
PARTS = {
    "train": ("train",),
    "kept": ("kept",),
    "eval": ("eval",),
    "transformers": OTHERS,
    "timm": OTHERS,
}


@dataclass(frozen=True)
class Case:
    """How a figure is measured: the checkpoint, where, in which precision, and how often."""

    model: Path
    device: torch.device
    amp: torch.dtype | None  # autocast's dtype; None: float32
    batch: int
    runs: int  # The figure is the median of these.
    compiled: bool = False


def never_stop() -> bool:
    return False


def train_epochs(
    case: Case, pixels: Tensor, *, blocks: str, cache_gib: float, cache_views: int = 0
) -> list[dict[str, float]]:
    """Train a fresh model with run_epochs, for an epoch more than `runs`, and return its rows.

    The validation photos are the first 64.
    """
    settings = TrainSettings(
        blocks=blocks,
        epochs=case.runs + 1,
        batch_size=case.batch,
        micro_batch=case.batch,
        cache_views=cache_views,
        cache_gib=cache_gib,
        compile=case.compiled,
    )
    model = load_pretrained(case.model, num_classes=CLASSES)
    cut = freeze_except(model, parse_blocks(blocks, model.config.depth))
    state = new_state(
        working_copy(model, case.device, case.amp, train=True),
        cut=cut,
        amp=case.amp,
        micro_batch=case.batch,
        weight_decay=settings.weight_decay,
    )
    labels = torch.arange(len(pixels)) % CLASSES
    val_split = (pixels[:64], labels[:64])
    run_epochs(state, (pixels, labels), val_split, settings, never_stop)
    return [row for row in state.rows if row["epoch"] > 0]  # without the head alone


def images_per_second(work: Callable[[], object], images: int, case: Case) -> list[float]:
    """Return the images a second of each run of `work`, which takes so many, after a warm-up."""
    speeds = []
    for _ in range(case.runs + 1):
        wait_for(case.device)
        started = time.perf_counter()
        work()
        wait_for(case.device)
        speeds.append(images / (time.perf_counter() - started))
    return speeds[1:]


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_training(case: Case, pixels: Tensor, *, cache_views: int) -> list[float]:
    """Measure train.py's own loop, from its second epoch on."""
    rows = train_epochs(case, pixels, blocks="10-11", cache_gib=1e3, cache_views=cache_views)
    return [row["images_per_s"] for row in rows[1:]]


def measure_predictions(case: Case, pixels: Tensor) -> list[float]:
    """Measure how train.py predicts the classes of photos."""
    model = load_pretrained(case.model, num_classes=CLASSES)
    model = working_copy(model, case.device, case.amp, train=False)
    if case.compiled:
        model.compile()

    def predict_all() -> Tensor:
        return predict_photos(model, pixels, batch=case.batch)

    return images_per_second(predict_all, len(pixels), case)


def timm_model(config: ViTConfig) -> nn.Module:
    """Return timm's model of these sizes, with random weights."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        config.img_size,
        config.patch_size,
        num_classes=CLASSES,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.embed_dim,
    )


def transformers_model(folder: Path) -> nn.Module:
    """Return transformers' model with the weights in a folder and a new head."""
    return ViTForImageClassification.from_pretrained(
        folder, num_labels=CLASSES, ignore_mismatched_sizes=True, attn_implementation="sdpa"
    )


def measure_other(case: Case, library: str, part: str, pixels: Tensor) -> list[float]:
    """Measure another library's model, in a training step or in the forward pass alone.

    It runs under autocast if its weights are in float32 and `amp` is not.
    """
    if library == "timm":
        model = timm_model(load_pretrained(case.model).config)
    else:
        model = transformers_model(case.model)
    device = case.device
    dtype = torch.float32
    if part == LOW and case.amp is not None:
        dtype = case.amp
    uses_autocast = case.amp is not None and case.amp != dtype
    model.train(part == "step").to(device, dtype)
    freeze(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=case.amp is torch.float16)
    images = pixels[: case.batch].to(device, dtype) / 127.5 - 1
    labels = torch.arange(case.batch, device=device) % CLASSES
    if case.compiled:
        model.compile()

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=case.amp, enabled=uses_autocast):
            output = model(images)
        return output if library == "timm" else output.logits

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(forward().float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trainable, 1.0)
        scaler.step(optimizer)
        scaler.update()

    work = step if part == "step" else torch.no_grad()(forward)
    num_batches = max(1, len(pixels) // case.batch)

    def work_through_batches() -> None:
        for _ in range(num_batches):
            work()

    return images_per_second(work_through_batches, num_batches * case.batch, case)


def measure(case: Case, name: str, part: str, pixels: Tensor) -> list[float]:
    """Return the images a second of one of PARTS, in each run."""
    if name == "train":
        return measure_training(case, pixels, cache_views=0)
    if name == "kept":
        return measure_training(case, pixels, cache_views=1)
    if name == "eval":
        return measure_predictions(case, pixels)
    return measure_other(case, name, part, pixels)


def list_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the combinations of batch, precision and compilation that the flags ask for."""
    for batch in args.batch.split(","):
        for precision in args.amp.split(","):
            for compiled in (False,) if args.no_compile else (False, True):
                amp = devices.pick_amp(precision, args.device)
                yield Case(args.model, args.device, amp, int(batch), args.runs, compiled)


def measure_case(case: Case, name: str, part: str, pixels: Tensor) -> dict[str, Figure]:
    """Measure in a fresh state; print and return the speed and, on a GPU, the peak of memory."""
    torch.compiler.reset()
    gc.collect()
    on_gpu = case.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(case.device)
    speed = figure_of(measure(case, name, part, pixels), "images/s")
    who = f"minivit {part}" if name == part else f"{name} {part}"
    compiled = ", compiled" if case.compiled else ""
    what = f"{who}, batch {case.batch}, {dtype_name(case.amp)}{compiled}"
    figures = {f"{what}, speed": speed}
    memory = ""
    if on_gpu:
        peak = figure_of([devices.peak_gib(case.device)], "GiB")
        figures[f"{what}, device memory"] = peak
        memory = f", {peak.median:.2f} GiB"
    print(f"{what:70} {speed.median:,.1f} images/s{memory}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), metavar="NAME,...")
    parser.add_argument("--batch", default="64,256", metavar="N,...")
    parser.add_argument("--amp", default="auto", metavar="NAME,...", help="auto, bf16, fp16, off")
    parser.add_argument(
        "--photos",
        type=int,
        default=5120,
        help="photos in an epoch; at least a batch, and whole batches",
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--runs", type=int, default=3, help="each figure is the median of these")
    args = parse_with_model(parser)
    auto = devices.pick_amp("auto", args.device) or torch.float32
    print(f"--amp auto is {auto} on {args.device}")
    size = load_pretrained(args.model).config.img_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (args.photos, 3, *size), dtype=torch.uint8, generator=generator)
    figures: dict[str, Figure] = {}
    for name in args.only.split(","):
        if name == "timm" and not importlib.util.find_spec("timm"):
            print("timm is not installed")
            continue
        for part in PARTS[name]:
            for case in list_cases(args):
                if part == LOW and case.amp is None:
                    continue
                figures |= measure_case(case, name, part, pixels)
    workload = steady_speed(model_name(args.model), args.photos, args.device.type)
    record(args, args.device, workload, figures)


if __name__ == "__main__":
    main()
