"""How many photos, how many blocks? Test accuracy over a grid of both.

The features of the frozen blocks are computed only once for the whole study.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ... import cli
from ...errors import UserError, printable
from ...settings import BASE_MODEL, MIN_STEPS, TrainSettings, list_changes
from ...system import files, torch_start
from .summary import Table, advice, format_table, read_rows, summarize, write_rows

if TYPE_CHECKING:
    import torch

    from ...data.datasets import Data
    from ...model import ViT
    from .features import StudyFeatures
    from .grid import Cell

DESCRIPTION = "How many photos, how many blocks? Test accuracy over a grid of both."
# A study is continued only with the same values of these flags.
FIXED_FLAGS = ("model", "revision", "epochs", "batch_size", "lr", "views")
# The version of what the columns of study.csv mean. Raise it with every change of that.
VERSION = 2
OUTPUTS = ("study.json", "study.csv", "study.png")
ROW_FORMAT = (
    "{shots:>4} photos per class, blocks {blocks}, seed {seed}: training {train_accuracy:.3f}, "
    "validation {val_accuracy:.3f}, test {test_accuracy:.3f} · {seconds:.0f} s"
)


def make_parser() -> cli.Parser:
    parser = cli.Parser("study", description=DESCRIPTION)
    add = parser.add_argument
    add("--model", default=BASE_MODEL, metavar="ID|DIR|FILE|demo", help="as in train.py")
    add("--revision", metavar="REV", help="Hub revision; default: the repository's main branch")
    add("--data", default="data", metavar="DIR", help="as in train.py")
    add(
        "--shots",
        nargs="+",
        default=["5", "10", "20", "50", "all"],
        type=shots,
        metavar="N",
        help="numbers of training photos per class, or all",
    )
    add(
        "--blocks",
        nargs="+",
        default=["none", "11", "10-11", "8-11", "all"],
        metavar="RANGE",
        help="choices of blocks to train, as in train.py; all takes longest",
    )
    add(
        "--seeds",
        type=cli.at_least(1),
        default=3,
        help="number of runs per cell, each with other photos in another order",
    )
    add(
        "--epochs",
        type=cli.at_least(1),
        help=f"default: as many as {MIN_STEPS} steps take, and at least 5",
    )
    add("--batch-size", type=cli.at_least(1), default=16, help="photos per optimizer step")
    add("--lr", type=cli.positive, default=TrainSettings.lr, help="peak learning rate")
    add(
        "--views",
        type=cli.at_least(1),
        default=4,
        metavar="K",
        help="augmented views of each photo to keep",
    )
    add(
        "--cache-gib",
        type=cli.positive,
        default=8.0,
        metavar="X",
        help="memory limit for the features of the frozen blocks",
    )
    add(
        "--store-gib",
        type=cli.positive,
        default=TrainSettings.store_gib,
        metavar="X",
        help="disk limit for decoded photos, which are stored next to the data",
    )
    parser.add_device_flags()
    parser.add_workers("number of threads that decode photos")
    add(
        "--out",
        type=cli.folder,
        default="study",
        metavar="DIR",
        help="folder for study.csv and study.png; an interrupted study is continued there",
    )
    add("--dry-run", action="store_true", help="only say how long the study takes")
    return parser


def shots(text: str) -> str:
    """Parse an argument: a number of photos per class, or all."""
    return text if text == "all" else str(cli.at_least(1)(text))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(study, make_parser(), argv)


def study(args: argparse.Namespace) -> int:
    """Run the cells of the grid that are missing in --out, and report on all cells."""
    torch_start.start(args.device)
    from ...checkpoints.weights import load_pretrained
    from ...data import store
    from ...data.datasets import split_data
    from ...data.listing import list_data
    from ...data.survey import unread_photos
    from ...model import freeze_except, working_copy
    from ...system import device as devices
    from . import grid
    from .features import StudyFeatures

    started = time.perf_counter()
    out = Path(args.out)
    if not args.dry_run:
        check_folder(out)
    device = devices.pick_device(args.device)
    amp = devices.pick_amp(args.amp, device)
    listing = list_data(args.data, download=not args.dry_run)
    splits = [split_data(listing, seed=seed) for seed in range(args.seeds)]
    for finding in unread_photos(listing):
        print(finding, file=sys.stderr)
    first = splits[0]
    check_photos_are_new(args.model, args.data)
    model = load_pretrained(args.model, revision=args.revision, labels=first.classes)
    cuts = {}
    for text in args.blocks:
        blocks = cli.parse_blocks(text, model.config.depth)
        name = grid.spell_blocks(blocks, model.config.depth)
        cuts[name] = freeze_except(model, blocks)
    settings = TrainSettings(batch_size=args.batch_size, lr=args.lr, cache_views=args.views)
    cells = grid.plan(splits, cuts, args.shots, args.epochs, settings)
    low_model = working_copy(model, device, amp, train=False)
    train_paths = sorted({path for each in splits for path in each.train.paths})
    check_memory(low_model, len(first.paths()), len(train_paths), args.views, args.cache_gib)
    seconds = grid.estimate_seconds(low_model, cells, splits, args.views)
    print(f"{len(cells)} runs, about {seconds / 60:.0f} minutes on {device}")
    print(
        f"each validates on {len(first.val)} photos and on the training photos that it leaves; "
        f"{len(first.test)} photos are the test",
        flush=True,
    )
    if args.dry_run:
        return 0

    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out):
        fixed = {name: getattr(args, name) for name in FIXED_FLAGS}
        rows = read_earlier_rows(out, fixed | fingerprint(model, first, amp))
        done = {(row["shots"], row["blocks"], row["seed"]) for row in rows}
        missing = [cell for cell in cells if cell.key() not in done]
        if missing:
            readable, file = store.prepare(
                first, model.preprocess, workers=args.workers, cap_gib=args.store_gib
            )
            pixels = store.open_pixels(readable, file, model.preprocess, args.workers)
            batch = devices.eval_batch(device, 1, 1, amp)
            features = StudyFeatures(low_model, pixels, train_paths, args.views, batch=batch)
            if not run_cells(missing, model, splits, features, amp, out, rows):
                message = f"interrupted; what is done is in {out}: the same command goes on"
                print(f"\n{message}", file=sys.stderr)
                return 130
        counts = {row["shots"] for row in rows}
        num_val = {count: grid.count_unseen(splits, count) for count in counts}
        report(out, summarize(rows, num_val))
    print(f"{len(rows)} runs in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(printable(out / "study.csv"))
    print(printable(out / "study.png"))
    return 0


def check_memory(
    model: ViT, num_photos: int, num_train: int, num_views: int, cache_gib: float
) -> None:
    """Raise UserError if the features take more memory than --cache-gib allows."""
    from ...training.features import features_gib

    gib = features_gib(model, num_photos + num_views * num_train, cut=0)
    if gib > cache_gib:
        raise UserError(
            f"the features of all photos take {gib:.1f} GiB, more than --cache-gib "
            f"{cache_gib:g}; allow more, or keep fewer than {num_views} --views"
        )


def check_folder(out: Path) -> None:
    """Raise UserError if the study would overwrite files that no study wrote.

    A study writes study.json before all others.
    """
    try:
        is_study = set(FIXED_FLAGS) <= files.read_json(out / OUTPUTS[0]).keys()
    except (UserError, OSError):
        is_study = False
    if not is_study:
        files.refuse_to_overwrite(out, OUTPUTS)


def check_photos_are_new(model: str, root: str) -> None:
    """Raise UserError if a run behind the model was trained on photos in `root`."""
    from ...training.run_photos import runs_behind, was_trained_on

    for run in runs_behind(model):
        if was_trained_on(run, root):
            raise UserError(
                f"{run.folder}: was trained on these photos, so that few of them are new to it; "
                f"expected the model from before, as {run.base}"
            )


def fingerprint(model: ViT, data: Data, amp: torch.dtype | None) -> dict[str, object]:
    """Return what the result depends on besides the flags: model, precision and split photos."""
    from ...checkpoints.tensors import content_hash
    from ...data import store
    from ...training.fingerprint import MATHEMATICS

    splits = (data.train, data.val, data.test)
    return {
        "the checksum of the weights": content_hash(dict(model.named_parameters()))[:16],
        "the model": str(model.config),
        "its preprocessing": str(model.preprocess),
        "precision": str(amp),
        "the version of training": MATHEMATICS,
        "the version of the study": VERSION,
        "the checksum of the photos": store.checksum(*((s.paths, s.labels) for s in splits)),
    }


def read_earlier_rows(out: Path, settings: dict[str, object]) -> list[dict[str, str]]:
    """Return the rows of an interrupted study in the folder; there are none in a new folder.

    Raises UserError if the study there has other settings, and names those.
    """
    file = out / OUTPUTS[0]
    if file.exists():
        changes = list_changes(files.read_json(file), settings)
        if changes:
            raise UserError(f"{out}: holds another study: {'; '.join(changes)}; give another --out")
    rows = read_rows(out / "study.csv")
    files.write_json(file, settings)
    return rows


def run_cells(
    cells: Sequence[Cell],
    model: ViT,
    splits: Sequence[Data],
    features: StudyFeatures,
    amp: torch.dtype | None,
    out: Path,
    rows: list[dict[str, str]],
) -> bool:
    """Run cells, and add each one's row to `rows` and to study.csv.

    Returns whether all of them were run, which a signal prevents.
    """
    from .grid import run_cell

    # Features can only move on to a later cut.
    for cell in sorted(cells, key=lambda cell: cell.cut):
        features.advance(cell.cut)
        row = run_cell(cell, model, splits[cell.settings.seed], features, amp)
        if row is None:
            return False
        rows.append({name: str(value) for name, value in row.items()})
        write_rows(out / "study.csv", rows)
        print(ROW_FORMAT.format(**row), flush=True)
    return True


def report(out: Path, table: Table) -> None:
    """Draw the figure, and print the tables and the advice."""
    from .figure import draw_study

    headline, reasons = advice(table)
    draw_study(out / "study.png", table, headline)
    for split in ("validation", "test"):
        print("", *format_table(table, split), sep="\n")
    print(f"\n{headline} {reasons}")
