"""Review a run and its photos: mistakes, suspicious labels, how sure its accuracy is, and copies.

This module imports neither torch nor NumPy before the job starts, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ... import cli
from ...errors import UserError, printable
from ...settings import RUN_DIR, TrainSettings
from ...system import files, torch_start

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...data.datasets import Data
    from ...model import ViT
    from ...training.run_photos import Run
    from .labels import HeldOut
    from .report import Photos

DESCRIPTION = (
    "Review a run and its photos: which it gets wrong, which labels are hard to believe, how sure "
    "its accuracy is, and which photos are in training and test. No photo is changed or moved."
)
OUTPUTS = ("review.json", "review.csv", "review.html")
FOLDS = 5
MOST_FOLDS = 20  # More take memory for each, and hardly judge better.


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("review", description=DESCRIPTION)
    add = parser.add_argument
    add("run", nargs="?", default=RUN_DIR, metavar="RUN", help="the folder of a finished run")
    add(
        "--data",
        metavar="DIR",
        help="the photos that the run was trained on; default: the folder that it was given",
    )
    add(
        "--blocks",
        metavar="RANGE",
        help="judge labels by these blocks, retrained for each fold, which takes much longer; "
        "default: by a linear head on the model from before the run",
    )
    add("--folds", type=cli.at_least(2), default=FOLDS, metavar="N", help="folds of the photos")
    add(
        "--cache-gib",
        type=cli.positive,
        default=TrainSettings.cache_gib,
        metavar="X",
        help="host memory for the features that --blocks needs",
    )
    parser.add_device_flags()
    parser.add_workers("threads that read photos")
    add(
        "--out",
        type=cli.folder,
        default="review",
        metavar="DIR",
        help="the folder for review.html, review.csv and review.json",
    )
    return cli.run(review, parser, argv)


def review(args: argparse.Namespace) -> int:
    """Review the run, print a sentence for each part, and write the page and the tables."""
    torch_start.start(args.device)
    from ...checkpoints.weights import load_pretrained
    from ...model import working_copy
    from ...system.device import peak_gib, pick_amp, pick_device
    from ..doctor import group_copies
    from ..score.measure import count_equal_blocks
    from ..score.outputs import write_csv
    from . import page, report
    from .measure import measure

    started = time.perf_counter()
    if args.folds > MOST_FOLDS:
        raise UserError(f"--folds {args.folds}: expected at most {MOST_FOLDS}")
    out = Path(args.out)
    check_folder(out)
    run = find_reviewed_run(args.run)
    root = find_data(args, run)
    data = load_reviewed(root, run)
    model = load_pretrained(run.folder)
    check_classes(model, data, run)
    blocks = cli.parse_blocks(args.blocks or "none", model.config.depth)
    base = load_base(run, root, model, with_head=len(blocks) > 0)
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)

    all_photos = list_photos(data)
    low_model = working_copy(model, device, amp, train=False)
    low_base = working_copy(base, device, amp, train=False)
    if blocks:
        say_how_long(args, run, low_base, blocks, len(all_photos.paths), amp)
    cut = count_equal_blocks(model, base)
    measured = measure(low_model, low_base, cut, all_photos.paths, args.workers, amp)
    for reason in measured.unreadable.values():
        print(f"left out: {printable(reason)}", file=sys.stderr)
    photos = all_photos.take(measured.readable)
    if blocks:
        folds = judge_by_blocks(args, run, base, photos, blocks, device, amp)
    else:
        folds = judge_by_linear_head(base, measured.features, photos, args.folds)
    groups = group_copies(measured.md5s, measured.thumbnails)
    findings = report.find(str(run.folder), photos, measured, folds, groups)
    for part, sentence in report.describe(findings).items():
        print(f"{part}: {sentence}")

    table = report.rows(findings)
    table += [report.unreadable_row(all_photos, i) for i in measured.unreadable]
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out, wait=True):
        about = {
            **report.summary(findings),
            "base": base.origin.source,
            "data": root,
            "left_out": {str(all_photos.paths[i]): why for i, why in measured.unreadable.items()},
            "settings": vars(args) | {"device": str(device), "amp": str(amp)},
        }
        # The JSON file comes first, because by it a later review knows the others for its own.
        files.write_json(out / "review.json", about)
        # If this is interrupted, no page of an earlier review may stand beside the new tables.
        if (out / "review.html").exists():
            files.remove_file(out / "review.html")
        write_csv(out / "review.csv", table)
        page.write_page(out / "review.html", findings, low_model, args.workers)
        seconds = time.perf_counter() - started
        measures = {"seconds": seconds, "peak_gib": peak_gib(device)}
        files.write_json(out / "review.json", about | measures)
    print(f"{len(photos.paths)} photos reviewed in {seconds:.1f} s", file=sys.stderr)
    print(*(printable(out / name) for name in OUTPUTS), sep="\n")
    return 0


def check_folder(out: Path) -> None:
    """Raise UserError if the review would overwrite files that no review wrote."""
    try:
        about = files.read_json(out / OUTPUTS[0])
        is_review = "sentences" in about and "suspicious_labels" in about
    except (UserError, OSError):
        is_review = False
    files.refuse_to_overwrite(out, () if is_review else OUTPUTS)


def find_reviewed_run(name: str) -> Run:
    """Return the finished run in a folder. Raises UserError if there is none."""
    from ...training.run_folder import STATE
    from ...training.run_photos import find_run

    run = find_run(name)
    if run is None:
        raise UserError(
            f"{name}: expected the folder of a finished run, with its summary.json; "
            "train.py --out writes one"
        )
    if (run.folder / STATE).exists():
        raise UserError(f"{name}: this run is not finished; let train.py --resume finish it")
    return run


def find_data(args: argparse.Namespace, run: Run) -> str:
    """Return the folder of the run's photos. Raises UserError if it is no longer there."""
    if args.data:
        return args.data
    if not Path(run.data).expanduser().exists():
        raise UserError(
            f"{run.data}: expected the photos that {args.run} was trained on, found no such "
            "folder; say with --data where they are now"
        )
    return run.data


def load_reviewed(root: str, run: Run) -> Data:
    """List the photos, split as the run split them.

    Raises UserError if those are not the photos that the run was trained on.
    """
    from ...data.datasets import split_data
    from ...data.listing import list_data
    from ...data.survey import unread_photos
    from ...training.run_photos import photos_checksum, was_trained_on

    listing = list_data(root)
    data = split_data(listing, seed=run.seed, skip_bad=True)
    for finding in unread_photos(listing):
        print(finding, file=sys.stderr)
    if run.photos is None:
        is_same = was_trained_on(run, root)
    else:
        is_same = photos_checksum(data) == run.photos
    if not is_same:
        raise UserError(
            f"{root}: expected the photos that {run.folder} was trained on ({run.data}), found "
            "others, or some added, removed or moved since; train again, then review that run"
        )
    return data


def check_classes(model: ViT, data: Data, run: Run) -> None:
    """Raise UserError unless the classes are the run's, in the same order."""
    if model.labels != data.classes:
        raise UserError(
            f"{run.folder}: its classes are not those of the photos; train again on these photos"
        )


def load_base(run: Run, root: str, model: ViT, *, with_head: bool) -> ViT:
    """Load the model from before the run, or from before the first of several on these photos.

    `with_head` gives it a head for the classes of `model`, which only training needs.
    """
    from ...checkpoints.weights import load_pretrained
    from ...training.run_photos import find_run, was_trained_on

    first = run
    parent = find_run(first.base)
    while parent is not None and was_trained_on(parent, root):
        first = parent
        parent = find_run(first.base)
    summary = files.read_json(first.folder / "summary.json")
    try:
        base = load_pretrained(
            first.base,
            revision=summary.get("base_commit"),
            labels=model.labels if with_head else None,
            img_size=model.config.img_size,
        )
    except UserError as error:
        raise UserError(
            f"the model that {first.folder} was trained from: {error}; if that is a path, call "
            "review from where train.py was called"
        ) from error
    check_sizes(base, model, first)
    return base


def check_sizes(base: ViT, model: ViT, run: Run) -> None:
    """Raise UserError if the base cannot be what the run was trained from."""
    shapes = {name: tensor.shape for name, tensor in base.named_parameters()}
    for name, tensor in model.named_parameters():
        may_differ = name == "pos_embed" or name.startswith("head.")
        if not may_differ and shapes.get(name) != tensor.shape:
            raise UserError(
                f"{run.base}: is not the model that {run.folder} was trained from, as {name} "
                "differs in shape; put that model there again"
            )


def list_photos(data: Data) -> Photos:
    """Return all photos in the order of their paths.

    Photos of one series, whose names follow each other, then fall into one fold.
    """
    import torch

    from .report import Photos

    listed: list[tuple[Path, str, int]] = []
    for name in ("train", "val", "test"):
        split = getattr(data, name)
        listed += [(path, name, label) for path, label in zip(split.paths, split.labels)]
    listed.sort(key=lambda photo: str(photo[0]))
    paths, splits, labels = zip(*listed)
    return Photos(data.classes, paths, splits, torch.tensor(labels))


def judge_by_linear_head(base: ViT, features: Tensor, photos: Photos, folds: int) -> HeldOut:
    """Judge each photo by a linear head on the base's features, fitted without its fold."""
    from ...training.linear_head import fit_linear_head
    from .labels import HeldOut

    head = fit_linear_head(features, photos.labels, len(photos.classes), folds)
    source = f"a linear head on {printable(base.origin.source)}"
    return HeldOut(head.fold_of, head.held_out_logits.softmax(1), source)


def say_how_long(
    args: argparse.Namespace,
    run: Run,
    base: ViT,
    blocks: Sequence[int],
    num_photos: int,
    amp: torch.dtype | None,
) -> None:
    """Say on stderr how long it takes to retrain blocks for each fold."""
    from ...training.rehearsal import minutes
    from .blocks import estimate_seconds

    epochs = settings_of(run).epochs
    seconds = estimate_seconds(base, min(blocks), num_photos, args.folds, epochs, amp)
    device = base.cls_token.device
    print(
        f"blocks {args.blocks} are retrained for {args.folds} folds in {epochs} epochs each, "
        f"which takes about {minutes(seconds)} on {device}",
        file=sys.stderr,
        flush=True,
    )


def judge_by_blocks(
    args: argparse.Namespace,
    run: Run,
    base: ViT,
    photos: Photos,
    blocks: Sequence[int],
    device: torch.device,
    amp: torch.dtype | None,
) -> HeldOut:
    """Judge each photo by blocks of the base that were trained, as the run's, without its fold."""
    from ...training.linear_head import assign_folds
    from .blocks import held_out_logits, keep_features
    from .labels import HeldOut

    fold_of = assign_folds(photos.labels, base.config.num_classes, args.folds)
    features = keep_features(
        base,
        min(blocks),
        photos.paths,
        device=device,
        amp=amp,
        workers=args.workers,
        cache_gib=args.cache_gib,
    )
    settings = settings_of(run)
    logits = held_out_logits(base, blocks, features, photos.labels, fold_of, settings, amp)
    source = f"{printable(base.origin.source)} with retrained blocks {args.blocks}"
    return HeldOut(fold_of, logits.softmax(1), source)


def settings_of(run: Run) -> TrainSettings:
    """Return the settings of a run, as far as this version knows them."""
    stored = files.read_json(run.folder / "summary.json")["settings"]
    known = {field.name for field in fields(TrainSettings)}
    return TrainSettings(**{name: value for name, value in stored.items() if name in known})
