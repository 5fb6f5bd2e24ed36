"""Fine-tune the last blocks of a Vision Transformer on Oxford-IIIT Pet, or on your own folders of photos."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import (
    __version__,  # torch comes in with the job, so that --help and a mistyped flag answer at once
    cli,  # torch comes in with the job, so that --help and a mistyped flag answer at once
)

if TYPE_CHECKING:
    import torch

    from . import ViT
    from .data.datasets import Data
    from .data.store import Pixels
    from .training.state import State

# What --resume keeps to.
MATHEMATICS = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "layer_decay",
    "label_smoothing",
    "cache_views",
    "seed",
)

DRAWN_APART = 64  # test photos: drawing figures takes as long as testing these


def make_parser() -> cli.Parser:
    parser = cli.Parser("train", description=__doc__)
    add = parser.add_argument
    add(
        "--model",
        default=cli.BASE_MODEL,
        metavar="ID|DIR|FILE|demo",
        help="a Hub id, a folder, a file, or what comes along",
    )
    add("--revision", metavar="REV", help="Hub revision; none: the default branch")
    add(
        "--img-size",
        type=cli.image_size,
        metavar="N|HxW",
        help="another input size than the checkpoint's, in pixels",
    )
    add(
        "--data",
        default="data",
        metavar="DIR",
        help="holds oxford-iiit-pet (downloaded there if absent) or class folders",
    )
    add(
        "--blocks",
        default="10-11",
        metavar="RANGE",
        help="blocks to train besides norm and head: 8-11, 10,11, all, none",
    )
    add("--epochs", type=cli.at_least(1), default=5, help="more for few photos")
    add("--batch-size", type=cli.at_least(1), default=64, help="photos per optimiser step")
    add(
        "--micro-batch",
        type=cli.at_least(1),
        help="photos per forward pass; none: the batch size, on a CPU 8, which is fastest there",
    )
    add("--lr", type=cli.positive, default=cli.LR, help="peak learning rate")
    add(
        "--weight-decay",
        type=cli.between(0, 1),
        default=cli.WEIGHT_DECAY,
        help="of matrices, as AdamW does it",
    )
    add(
        "--layer-decay",
        type=cli.between(0, 1),
        default=1.0,
        help="learning rate from one block to the one below it",
    )
    add(
        "--label-smoothing",
        type=cli.between(0, 1),
        default=0.0,
        help="share of the target spread over all classes",
    )
    views = "augment each photo in K ways only, one an epoch: later epochs skip the frozen blocks; 0: anew each epoch"
    add("--cache-views", type=cli.at_least(0), default=0, metavar="K", help=views)
    add(
        "--patience",
        type=cli.at_least(1),
        metavar="N",
        help="stop after N epochs without a better one; none: never",
    )
    parser.add_device_flags()
    add(
        "--memory-gib",
        type=cli.positive,
        metavar="X",
        help="never use more of a CUDA device's memory; none: all that is free",
    )
    add(
        "--cache-gib",
        type=cli.positive,
        default=4.0,
        metavar="X",
        help="memory for what frozen blocks make of photos",
    )
    add(
        "--store-gib",
        type=cli.positive,
        default=cli.STORE_GIB,
        metavar="X",
        help="disk for decoded photos, beside the data",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile: faster steps after a minute or two, so for long runs",
    )
    add(
        "--deterministic",
        action="store_true",
        help="the same bits each time on CUDA too, a little slower",
    )
    parser.add_workers("threads that decode photos")
    add(
        "--seed",
        type=cli.at_least(0),
        default=0,
        help="of the validation split, the data order and augmentation",
    )
    add("--skip-bad", action="store_true", help="go on without photos that cannot be read")
    add("--out", default=cli.RUN_DIR, metavar="DIR", help="where everything is written")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out; if there is none, begin it",
    )
    add(
        "--dry-run",
        action="store_true",
        help="say what would train, on which data, in how much memory; train nothing",
    )
    add(
        "--push-to-hub",
        metavar="REPO",
        help="upload the finished folder with its model card, as owner/name",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(train, make_parser(), argv)


def train(args: argparse.Namespace) -> int:
    """The whole job: data and model in, epochs with the state on disk after each, and what the best one achieves."""
    import torch

    from .checkpoints import hub, weights
    from .data import datasets as data
    from .data import store
    from .errors import UserError
    from .model import freeze_except, working_copy
    from .system import device
    from .system import distributed as parallel
    from .system import workers as processes
    from .tools import doctor
    from .training import features as frozen
    from .training import run_folder as runs
    from .training import step as loop
    from .training.overview import describe_training

    started, out, on = (
        time.perf_counter(),
        Path(args.out),
        device.pick_device(parallel.own_device(args.device)),
    )
    amp = device.pick_amp(args.amp, on)
    if args.out.encode(errors="ignore").decode() != args.out:
        raise UserError(f"{out}: expected a name in UTF-8, without which safetensors reads no file")
    if args.push_to_hub and int(os.environ.get("RANK", "0")) == 0:
        hub.prepare_push(args.push_to_hub)
    torch.manual_seed(args.seed)
    if args.deterministic:
        device.be_deterministic()
    if args.memory_gib:
        device.limit_memory(on, args.memory_gib)
    with contextlib.ExitStack() as held:
        with parallel.joined(on):
            first = (
                parallel.rank() == 0
            )  # of the processes under torchrun; the only one that writes
            if not args.dry_run and parallel.from_first(lambda: runs.claim(out, held, args.resume)):
                return 0
            photos = parallel.from_first(lambda: data.load_data(args.data, seed=args.seed))
            for finding in doctor.quick_check(args.data) if first else ():
                print(finding, file=sys.stderr)
            model = weights.load_pretrained(
                args.model, revision=args.revision, labels=photos.classes, img_size=args.img_size
            )
            cut = freeze_except(model, cli.parse_blocks(args.blocks, model.config.depth))
            print(describe_training(model, photos, on, amp), flush=True)
            steps = math.ceil(len(photos.train) / args.batch_size)
            if args.epochs * steps < cli.MIN_STEPS and first:
                enough = f"--epochs {math.ceil(cli.MIN_STEPS / steps)} --cache-views 4, of which most cost little"
                print(
                    f"{args.epochs * steps} steps teach little; for so few photos try {enough}",
                    file=sys.stderr,
                )
            net = working_copy(model, on, amp, train=True)
            micro_batch = device.pick_micro_batch(args.micro_batch, args.batch_size, on, amp)
            if args.dry_run or on.type == "cuda":
                how = {"batch_size": args.batch_size, "micro_batch": micro_batch, "amp": amp}
                micro_batch, gib = loop.rehearse(net, cut=cut, **how)
                if on.type != "cuda":  # whose photos and kept tokens lie in host memory
                    gib += frozen.held_gib(
                        net, photos, cut, cache_gib=args.cache_gib, store_gib=args.store_gib
                    )
                print(
                    f"up to {gib:.2f} GiB of memory, with {micro_batch} photos at a time\n",
                    flush=True,
                )
            if args.dry_run:
                return 0
            how = {"workers": args.workers, "cap_gib": args.store_gib, "skip_bad": args.skip_bad}
            photos, file = parallel.from_first(
                lambda: store.prepare(photos, model.preprocess, **how)
            )
            train, val, test = store.open_splits(photos, file, model.preprocess, args.workers)
            run = learn(
                args,
                model,
                net,
                train,
                val,
                cut=cut,
                amp=amp,
                micro_batch=micro_batch,
                started=started,
            )
        if run.stopped:
            if first:
                print(
                    f"\ninterrupted; all is saved in {out}: the same command with --resume goes on",
                    file=sys.stderr,
                )
            return 130
        if first:
            figures = 3 if len(photos.test) >= DRAWN_APART else 0  # one each
            with processes.working(figures, "minivit.figures.plots") as begin:
                finish(
                    args,
                    model,
                    run,
                    photos,
                    val,
                    test,
                    amp=amp,
                    micro_batch=micro_batch,
                    begin=begin,
                )
    return 0


def learn(
    args: argparse.Namespace,
    model: ViT,
    net: ViT,
    train: tuple[Pixels, torch.Tensor],
    val: tuple[Pixels, torch.Tensor],
    *,
    cut: int,
    amp: torch.dtype | None,
    micro_batch: int,
    started: float,
) -> State:
    """Train from the first epoch, or from where the run in --out stands; leave the state after each epoch on disk."""
    from .checkpoints import tensors, weights
    from .data import store
    from .system import distributed as parallel
    from .system import prefetch as ahead
    from .system.signals import stop_requests
    from .training import metrics, state
    from .training import run_folder as runs
    from .training import step as loop

    out, first = Path(args.out), parallel.rank() == 0
    blocks = [i for i, block in enumerate(model.blocks) if block.norm1.weight.requires_grad]
    settings = {f"--{name.replace('_', '-')}": vars(args)[name] for name in MATHEMATICS}
    settings |= {"precision": str(amp), "--blocks": blocks}
    settings["the checksum of the photos"] = store.checksum(
        *((pixels.paths, y.tolist()) for pixels, y in (train, val))
    )
    settings["the checksum of the base model"] = state.checksum(
        *(p for p in model.parameters() if not p.requires_grad)
    )
    run = state.begin(net, amp=amp, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    earlier = parallel.from_first(lambda: runs.begin(out, args.resume, settings))
    if earlier:
        run.load(*earlier)
    started -= run.spent
    how = {
        name: vars(args)[name]
        for name in ("epochs", "batch_size", "lr", "seed", "label_smoothing", "patience")
    }
    views = (
        args.cache_views if args.cache_views < args.epochs else 0
    )  # of more, none would come again
    how |= {"cache_views": views, "cache_gib": args.cache_gib, "compile": args.compile}
    with ahead.write_behind() as begin:
        if first:
            begin(weights.hash_frozen, model)
        for row in loop.fit(run, train, val, cut=cut, amp=amp, micro_batch=micro_batch, **how):
            tail = run.tail()
            if metrics.best_row(run.rows) is row:
                run.best = tail
            run.spent = time.perf_counter() - started
            if first:
                begin(tensors.save_tensors, out / runs.STATE, *run.snapshot(settings, tail))
                runs.report_epoch(run.rows, args.epochs, out)
    run.spent = time.perf_counter() - started
    if run.stopped and first:
        with stop_requests():  # torchrun repeats a signal
            run.save(out / runs.STATE, settings)
    return run


def finish(
    args: argparse.Namespace,
    model: ViT,
    run: State,
    photos: Data,
    val: tuple[Pixels, torch.Tensor],
    test: tuple[Pixels, torch.Tensor],
    *,
    amp: torch.dtype | None,
    micro_batch: int,
    begin: Callable[..., Callable[[], object]],
) -> None:
    """Test the best epoch, make sure that what is written is what was tested, and leave everything there is to look at."""
    import torch

    from .checkpoints import hub
    from .model import trainable, working_copy
    from .system import device, files
    from .training import metrics, state
    from .training import report as results
    from .training import run_folder as runs
    from .training import step as loop

    started, out, on = time.perf_counter(), Path(args.out), run.model.cls_token.device
    peak_gib, best = device.peak_gib(on), metrics.best_row(run.rows)
    batch = device.eval_batch(on, args.batch_size, micro_batch, amp)
    for net in (run.model, model):
        state.set_tail(net, run.best)
    tested = working_copy(run.model, on, amp, train=False)
    run.free()
    # bf16 and fp16: the loss of 30 photos changed by up to 1.7% with what else was in their batch.
    loss, bound = (
        loop.score(loop.predict_photos(tested, val[0], batch=batch), val[1])["loss"],
        0.05 if amp else 1e-3,
    )
    if abs(loss - best["val_loss"]) > bound * max(1, best["val_loss"]):
        raise RuntimeError(
            f"{out}: the best epoch's weights validate at a loss of {loss}, not {best['val_loss']}"
        )
    logits = loop.predict_photos(tested, test[0], batch=batch)
    scores = loop.score(logits, test[1])
    drawn = results.draw_figures(out, run.rows, photos, logits, begin)

    write_weights(model, out)
    summary = {f"test_{name}": value for name, value in scores.items()} | {
        "test_photos": len(test[1]),
        "best_epoch": best["epoch"],
        "verdict": metrics.verdict(run.rows),
        "trainable_parameters": sum(p.numel() for p in trainable(model).values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "seconds": run.spent + time.perf_counter() - started,
        "peak_gib": peak_gib,
        "base": model.origin.source,
        "base_commit": model.origin.commit,
        "device": torch.cuda.get_device_name(on) if on.type == "cuda" else on.type,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "precision": str(amp or torch.float32).removeprefix("torch."),
        "settings": vars(args),
        "classes": list(photos.classes),
        "versions": {
            "minivit": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    pets = any(photos.train.paths[0].parent.parent.glob("annotations/trainval.txt"))
    results.write_tables(
        out, photos, logits, summary, name=args.push_to_hub or out.resolve().name, pets=pets
    )
    for wait in drawn:
        wait()
    files.write_json(out / "summary.json", summary)
    (out / runs.STATE).unlink()
    if args.push_to_hub:
        print(f"pushed: {hub.push(out, args.push_to_hub, runs.RUN_FILES)}", file=sys.stderr)
    print(summary["verdict"], runs.result(summary, out), sep="\n")


def write_weights(model: ViT, out: Path) -> None:
    """Write what was trained and the whole model, and make sure that what is read back is what was written."""
    import torch

    from .checkpoints import weights

    weights.save_tail(model, out / "tail.safetensors")
    weights.save_pretrained(model, out)
    reread = weights.load_pretrained(out)
    ours, theirs = (
        dict(net.named_parameters()) | {"pos_embed": net.positions()} for net in (model, reread)
    )
    if changed := [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]:
        raise RuntimeError(
            f"{out}: read back, weights are not those that were tested: {', '.join(changed)}"
        )


def command() -> NoReturn:
    """Run as a script: train.py, and minivit-train where it is installed."""
    cli.start(main)
