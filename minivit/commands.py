"""The command lines of train.py and infer.py: their flags, and what runs once these are read.

The jobs themselves are minivit/train.py and minivit/infer.py. They are imported only after the
flags are read, because importing torch takes a second.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from . import cli
from .settings import (
    BASE_MODEL,
    MAX_BATCH,
    MIN_BATCH,
    MIN_EPOCHS,
    MIN_STEPS,
    RUN_DIR,
    InferSettings,
    TrainSettings,
)
from .system import torch_start
from .system.cores import cores
from .training.calibration import LEAST_PHOTOS

TRAIN_DESCRIPTION = (
    "Fine-tune the last blocks of a Vision Transformer on Oxford-IIIT Pet, "
    "or on your own folders of photos."
)
INFER_DESCRIPTION = (
    "Name what is in photos, and draw where each block of the Vision Transformer looks."
)


def train(argv: Sequence[str] | None = None) -> int:
    """Run train.py with these arguments and return its exit code."""
    return cli.run(_train, train_parser(), argv)


def _train(args: argparse.Namespace) -> int:
    from .training.ahead import decode_ahead

    settings = TrainSettings(**vars(args))
    torch_start.begin_cuda(settings.device)
    with decode_ahead(settings) as wait_for_photos:
        torch_start.import_torch()  # This takes more than a second.
        from .train import train

        return train(settings, wait_for_photos)


def train_parser() -> cli.Parser:
    parser = cli.Parser("train", description=TRAIN_DESCRIPTION)
    add = parser.add_argument
    add(
        "--model",
        metavar="ID|DIR|FILE|demo",
        help="a Hub id, a folder, a file, or the checkpoint that comes with minivit",
    )
    add("--revision", metavar="REV", help="Hub revision; default: the repository's main branch")
    add(
        "--img-size",
        type=cli.image_size,
        metavar="N|HxW",
        help="another input size in pixels; default: the checkpoint's",
    )
    add(
        "--data",
        metavar="DIR",
        help="a folder that holds class folders, train/ with val/ and test/, or Oxford-IIIT Pet, "
        "which is downloaded into the default folder if it is absent or empty",
    )
    add(
        "--download",
        action="store_true",
        help="download Oxford-IIIT Pet (774 MiB) into another folder, if it is absent or empty",
    )
    add(
        "--blocks",
        metavar="RANGE",
        help="blocks to train besides the final norm and the head: 8-11, 10,11, all; none fits the "
        "head alone",
    )
    add(
        "--epochs",
        type=cli.at_least(1),
        metavar="N",
        help=f"default: {MIN_EPOCHS}, and for few photos as many as {MIN_STEPS} steps take",
    )
    add(
        "--batch-size",
        type=cli.at_least(1),
        metavar="N",
        help=f"photos per optimizer step; default: {MAX_BATCH}, for few photos down to {MIN_BATCH}",
    )
    add(
        "--micro-batch",
        type=cli.at_least(1),
        help="photos per forward pass; default: the whole batch, on a CPU 8, the fastest there",
    )
    add("--lr", type=cli.positive, help="peak learning rate of the blocks and the final norm")
    add("--head-lr", type=cli.positive, help="peak learning rate of the head")
    add("--weight-decay", type=cli.between(0, 1), help="AdamW's decay of weight matrices")
    add(
        "--layer-decay",
        type=cli.between(0, 1),
        help="factor on the learning rate from each block to the block below it",
    )
    add(
        "--label-smoothing",
        type=cli.between(0, 1),
        help="share of the target that is spread over all classes",
    )
    add(
        "--class-weights",
        choices=("none", "balanced"),
        help="balanced: in the loss, photos of a class count inversely to the number of its "
        "photos, so that all classes count the same",
    )
    add(
        "--cache-views",
        type=cli.views,
        metavar="auto|K",
        help="augment each photo in K ways only and reuse their features, so that later epochs "
        "skip the frozen blocks; 0 augments anew in each epoch; auto chooses for the device",
    )
    add(
        "--patience",
        type=cli.at_least(1),
        metavar="N",
        help="stop after N epochs without a better one; default: never",
    )
    add(
        "--keep",
        choices=("auto", "best", "last", "average"),
        help="the weights to keep: the last epoch's unless an earlier one, or the head alone, is "
        "clearly better on the validation photos; those of the best epoch or of the last; or the "
        "mean of the last half of the epochs",
    )
    add(
        "--calibrate",
        choices=("auto", "on", "off"),
        help="fit a temperature to the validation photos, so that probabilities are as often right "
        f"as they say; auto: if there are at least {LEAST_PHOTOS} of them",
    )
    parser.add_device_flags()
    add(
        "--memory-gib",
        type=cli.positive,
        metavar="X",
        help="never use more of a CUDA device's memory; default: all that is free",
    )
    add(
        "--cache-gib",
        type=cli.positive,
        metavar="X",
        help="memory for features of the frozen blocks: a GPU's if it has room, else the host's",
    )
    add(
        "--store-gib",
        type=cli.positive,
        metavar="X",
        help="disk space for decoded photos, beside the data",
    )
    add(
        "--compile",
        action="store_true",
        help="use torch.compile: faster steps after a minute or two, so for long runs",
    )
    add(
        "--deterministic",
        action="store_true",
        help="compute the same bits each time on CUDA too, a little slower",
    )
    parser.add_workers("processes that decode photos")
    add(
        "--seed",
        type=cli.at_least(0),
        help="seed of the validation split, the order of photos and the augmentation",
    )
    add("--skip-bad", action="store_true", help="go on without photos that cannot be read")
    add("--out", type=cli.folder, metavar="DIR", help="folder that everything is written into")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out, or begin it if there is none",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print what would train, on which data and in how much memory, and train nothing",
    )
    add(
        "--push-to-hub",
        metavar="REPO",
        help="upload the finished run with its model card, as owner/name; a new repository is "
        "private, and predictions.png stays here",
    )
    add(
        "--public",
        action="store_true",
        help="with --push-to-hub: make a new repository public",
    )
    defaults = asdict(TrainSettings())
    parser.set_defaults(**defaults | {"workers": cores()})
    return parser


def infer(argv: Sequence[str] | None = None) -> int:
    """Run infer.py with these arguments and return its exit code."""
    return cli.run(_infer, infer_parser(), argv)


def _infer(args: argparse.Namespace) -> int:
    from .data.jobs import list_jobs, start_workers

    settings = InferSettings(**vars(args) | {"photos": tuple(args.photos)})
    jobs, num_unread = list_jobs(settings)
    torch_start.begin_cuda(settings.device)
    with start_workers(jobs, settings) as pool:
        torch_start.import_torch()  # The workers start meanwhile.
        from .infer import infer
        from .system.distributed import wait_for_all_ranks

        num_unreadable = infer(settings, jobs, pool)
    wait_for_all_ranks()
    return 2 if num_unread or num_unreadable else 0


def infer_parser() -> cli.Parser:
    parser = cli.Parser("infer", description=INFER_DESCRIPTION)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO|FOLDER", help="photos, or folders of photos")
    add(
        "--model",
        metavar="ID|DIR|FILE|demo",
        help=f"as in train.py; default: {RUN_DIR} if it is there, else {BASE_MODEL}",
    )
    add("--revision", metavar="REV", help="Hub revision; default: the repository's main branch")
    add(
        "--compare",
        metavar="ID|DIR|demo",
        help="another model, drawn above with the difference below: before and after",
    )
    add(
        "--img-size",
        type=cli.image_size,
        metavar="N|HxW",
        help="another input size in pixels; default: the checkpoint's",
    )
    add(
        "--layers",
        "--blocks",
        metavar="RANGE",
        help="blocks to draw, counted from 0: 8-11, 10,11, all",
    )
    add(
        "--method",
        choices=("attention", "rollout", "relevance"),
        help="what to draw of a block: its attention, the attention followed through all blocks "
        "up to it, or what speaks for a class up to it",
    )
    add(
        "--target",
        metavar="NAME",
        help="the class for relevance; default: each photo's first prediction",
    )
    add(
        "--against",
        metavar="NAME",
        help="with --target: draw what speaks for the target rather than for this class",
    )
    add(
        "--heads",
        action="store_true",
        help="draw a panel for each head and a row for each block, not the mean of the heads",
    )
    add(
        "--query",
        type=cli.pixel,
        metavar="X,Y",
        help="draw where the patch at this pixel looks; default: the class token",
    )
    add(
        "--scale",
        choices=("own", "row"),
        help="colours span each map's own range, or one range along each row",
    )
    add("--top-k", type=cli.at_least(1), help="names to print for each photo")
    add(
        "--out",
        type=cli.folder,
        metavar="DIR",
        help="folder for the figures, named <photo's stem>.png",
    )
    add(
        "--html",
        action="store_true",
        help="also write <stem>.html, to point at any patch in any block and head",
    )
    add(
        "--npz",
        action="store_true",
        help="also write <stem>.npz, the rows of attention as arrays; with --html, all rows",
    )
    add(
        "--no-figures",
        action="store_true",
        help="print names only, which is much faster for many photos",
    )
    add("--json", action="store_true", help="print one JSON object a photo")
    parser.add_workers("processes that decode and draw")
    parser.add_device_flags()
    defaults = asdict(InferSettings(photos=()))
    del defaults["photos"]
    parser.set_defaults(**defaults | {"workers": cores()})
    return parser


def train_script() -> None:
    """Run as a program: train.py, or minivit-train where minivit is installed."""
    cli.start(train)


def infer_script() -> None:
    """Run as a program: infer.py, or minivit-infer where minivit is installed."""
    cli.start(infer)
