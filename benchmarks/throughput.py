"""Images a second of ViT-B/16, blocks 10-11, norm and head training, in steady state: ours, transformers' model and timm's.

    python benchmarks/throughput.py [--only train,kept,eval,transformers,timm] [--batch 64,256] [--amp bf16,fp16,off]

`train` is loop.fit itself on random photos in host memory, augmented on the device, from its second epoch on; `kept` the same
from the kept tokens of one view; `eval` loop.predict_photos. The other models take steps on one batch over and over, which
lies on the device and is not augmented. All with and without torch.compile. Figures are medians.
"""

import argparse
import gc
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from finetune_transformers import freeze
from results import parse, record
from torch import Tensor, nn
from transformers import ViTForImageClassification

from minivit import load_pretrained
from minivit import model as model_module
from minivit.cli import parse_blocks
from minivit.system import device
from minivit.training import state
from minivit.training import step as loop
from minivit.training.features import working_copy

CLASSES, WARM_UP = 37, 3
LOW = "forward, weights in low precision"
KINDS = {"train": ["train"], "kept": ["kept"], "eval": ["eval"]}
KINDS |= {"transformers": ["step", "forward", LOW], "timm": ["step", "forward", LOW]}


def fit(
    folder: Path,
    pixels: Tensor,
    on: torch.device,
    amp: torch.dtype | None,
    blocks: str,
    batch: int,
    **how,
) -> list[dict]:
    """Train a fresh model by loop.fit and return its rows; the validation photos are the first 64."""
    model = load_pretrained(folder, num_classes=CLASSES)
    cut = model_module.freeze_except(model, parse_blocks(blocks, model.config.depth))
    run = state.begin(working_copy(model, on, amp, train=True), amp=amp, weight_decay=0.05)
    labels = torch.arange(len(pixels)) % CLASSES
    how |= {
        "cut": cut,
        "amp": amp,
        "batch_size": batch,
        "micro_batch": batch,
        "lr": 1e-4,
        "seed": 0,
    }
    return list(loop.fit(run, (pixels, labels), (pixels[:64], labels[:64]), **how))


def speed(work: Callable[[], object], images: int, runs: int, on: torch.device) -> float:
    """Return images a second: the median of runs of `work`, which takes so many, after one that does not count."""
    wait, seconds = torch.cuda.synchronize if on.type == "cuda" else (lambda: None), []
    for _ in range(runs + 1):
        wait()
        started = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started)
    return images / statistics.median(seconds[1:])


def ours(
    args: argparse.Namespace,
    kind: str,
    pixels: Tensor,
    batch: int,
    amp: torch.dtype | None,
    compiled: bool,
) -> float:
    """Measure train.py's own loop in training, or its predictions."""
    if kind == "eval":
        model = working_copy(
            load_pretrained(args.model, num_classes=CLASSES), args.device, amp, train=False
        )
        if compiled:
            model.compile()
        return speed(
            lambda: loop.predict_photos(model, pixels, batch=batch),
            len(pixels),
            args.runs,
            args.device,
        )
    how = {
        "epochs": args.runs + 1,
        "compile": compiled,
        "cache_views": int(kind == "kept"),
        "cache_gib": 1e3,
    }
    rows = fit(args.model, pixels, args.device, amp, "10-11", batch, **how)
    return statistics.median(row["images_per_s"] for row in rows[1:])


def theirs(
    args: argparse.Namespace,
    library: str,
    kind: str,
    pixels: Tensor,
    batch: int,
    amp: torch.dtype | None,
    compiled: bool,
) -> float:
    """Measure another library's model, in a training step or a forward, under autocast if its weights are in float32."""
    on, c, dtype = (
        args.device,
        load_pretrained(args.model).config,
        amp if kind == LOW and amp else torch.float32,
    )
    if library == "timm":
        from timm.models.vision_transformer import VisionTransformer

        sizes = {
            "embed_dim": c.embed_dim,
            "depth": c.depth,
            "num_heads": c.num_heads,
            "mlp_ratio": c.mlp_dim / c.embed_dim,
        }
        model = VisionTransformer(c.img_size, c.patch_size, num_classes=CLASSES, **sizes)
    else:
        how = {
            "num_labels": CLASSES,
            "ignore_mismatched_sizes": True,
            "attn_implementation": "sdpa",
        }
        model = ViTForImageClassification.from_pretrained(args.model, **how)
    model.train(kind == "step").to(on, dtype)
    freeze(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on.type == "cuda")
    scaler = torch.amp.GradScaler(on.type, enabled=amp is torch.float16)
    images, labels = (
        pixels[:batch].to(on, dtype) / 127.5 - 1,
        torch.arange(batch, device=on) % CLASSES,
    )
    if compiled:
        model.compile()

    def forward() -> Tensor:
        with torch.autocast(on.type, dtype=amp, enabled=amp not in (None, dtype)):
            out = model(images)
        return getattr(out, "logits", out)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(nn.functional.cross_entropy(forward().float(), labels)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()

    work, times = step if kind == "step" else torch.no_grad()(forward), max(1, len(pixels) // batch)
    return speed(lambda: [work() for _ in range(times)], times * batch, args.runs, on)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(KINDS), metavar="NAME,...")
    parser.add_argument("--batch", default="64,256", metavar="N,...")
    parser.add_argument("--amp", default="auto", metavar="NAME,...", help="auto, bf16, fp16, off")
    parser.add_argument(
        "--photos", type=int, default=5120, help="of an epoch, at least a batch; whole batches"
    )
    parser.add_argument("--no-compile", action="store_true")
    args = parse(parser)
    print(f"--amp auto is {device.pick_amp('auto', args.device) or torch.float32} on {args.device}")
    size, figures = load_pretrained(args.model).config.img_size, {}
    pixels = torch.randint(
        256, (args.photos, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    settings = list(
        itertools.product(
            map(int, args.batch.split(",")),
            args.amp.split(","),
            (False, True)[: 2 - args.no_compile],
        )
    )
    for name in args.only.split(","):
        if name == "timm" and not importlib.util.find_spec("timm"):
            print("timm is not installed")
            continue
        for kind, (batch, precision, compiled) in itertools.product(KINDS[name], settings):
            amp = device.pick_amp(precision, args.device)
            if kind == LOW and amp is None:
                continue
            torch.compiler.reset()
            gc.collect()
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(args.device)
            how = (pixels, batch, amp, compiled)
            found = (
                ours(args, kind, *how) if len(KINDS[name]) == 1 else theirs(args, name, kind, *how)
            )
            gib = f", {device.peak_gib(args.device):.2f} GiB" if args.device.type == "cuda" else ""
            who = f"minivit {kind}" if name == kind else f"{name} {kind}"
            what = f"{who}, batch {batch}, {str(amp or torch.float32)[6:]}{', compiled' if compiled else ''}"
            figures[what] = f"{found:,.1f} images/s{gib}"
            print(f"{what:70} {figures[what]}", flush=True)
    record(args, figures)


if __name__ == "__main__":
    main()
