"""Take the pet away and see: does the answer come from the pet or from the background?

This module imports neither torch nor NumPy before the job starts, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ... import cli
from ...errors import UserError, printable

if TYPE_CHECKING:
    from ...model import ViT

DESCRIPTION = "Take the pet away and see: does the answer come from the pet or from the background?"
SEED = 0  # of the patches that are left out, the backgrounds that are joined, and the resamplings


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("drop", description=DESCRIPTION)
    parser.add_argument(
        "--model",
        metavar="ID|DIR|demo",
        help=f"as in train.py; without it, {cli.RUN_DIR} if it exists, else {cli.BASE_MODEL}",
    )
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="the model before fine-tuning, which is asked too",
    )
    parser.add_argument(
        "--data",
        default="data",
        metavar="DIR",
        help="the folder of Oxford-IIIT Pet with its annotations, or class folders with masks/",
    )
    parser.add_argument(
        "--photos",
        type=cli.at_least(1),
        metavar="N",
        help="take N photos of the test split, spread over the classes; default: all",
    )
    parser.add_argument(
        "--maps",
        action="store_true",
        help="also leave patches out in the order of each map: which map is most faithful?",
    )
    parser.add_argument(
        "--blocks",
        metavar="RANGE",
        help="the blocks whose maps --maps compares, counted from 0; default: the last one",
    )
    parser.add_device_flags()
    parser.add_workers("processes that decode photos")
    parser.add_argument(
        "--out",
        default="drop",
        metavar="DIR",
        help="the folder for drop.csv, drop.json, drop.png and the gallery",
    )
    return cli.run(drop, parser, argv)


def drop(args: argparse.Namespace) -> int:
    """Ask about every photo under every condition, then print, write and draw the results."""
    from ...data.datasets import load_data
    from ...model import working_copy
    from ...system.device import peak_gib, pick_amp, pick_device
    from . import figure, gallery, measure, report, statistics

    names = {"model": cli.default_model(args.model)}
    if args.compare:
        names["base"] = args.compare
    print(f"model: {printable(names['model'])}", file=sys.stderr)
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    data = load_data(args.data, seed=0)
    order = measure.order_of_photos(data.test.labels, args.photos, SEED)
    split = data.test.take(order)
    models = load_models(names)
    model = models["model"]
    depth = model.config.depth
    map_blocks = []
    if args.maps:
        map_blocks = cli.parse_blocks(args.blocks or str(depth - 1), depth)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    started = time.perf_counter()
    copies = {key: working_copy(each, device, amp, train=False) for key, each in models.items()}
    answers = measure.ask(
        copies, split.paths, split.labels, map_blocks=map_blocks, workers=args.workers, seed=SEED
    )
    seconds = time.perf_counter() - started

    split = split.take(answers.photos)
    summaries = {}
    for key, each in models.items():
        true = class_indices(each, data.classes, split.labels)
        summaries[key] = statistics.summarize(answers.predicted[key], true)
    sentence = statistics.one_sentence(summaries["model"])
    print(*report.overview(names, answers, len(set(split.labels))), sep="\n")
    print(*report.tables(summaries), "", sentence, sep="\n")

    settings = vars(args) | {"model": names["model"], "device": str(device), "amp": str(amp)}
    about = {
        "sentence": sentence,
        "photos": len(split),
        "left_out": answers.left_out,
        "seconds": seconds,
        "peak_gib": peak_gib(device),
        "settings": settings,
    }
    written = [*report.write_files(out, summaries, about)]
    figure.draw_drop(out / "drop.png", summaries, sentence)
    written.append(out / "drop.png")
    true = class_indices(model, data.classes, split.labels)
    if true is not None:
        predicted = answers.predicted["model"]
        kinds = gallery.choose_photos(predicted, true)
        shown = {}
        for key in gallery.CONDITIONS:
            shown[key] = [
                "no answer" if i == measure.NO_ANSWER else model.labels[i] for i in predicted[key]
            ]
        written += gallery.write_gallery(
            out,
            kinds,
            split.paths,
            [data.classes[label] for label in split.labels],
            shown,
            model.preprocess,
            model.config.grid,
        )
    print(f"{len(split)} photos asked about in {seconds:.1f} s", file=sys.stderr)
    print(*map(printable, written), sep="\n")
    return 0


def load_models(names: Mapping[str, str]) -> dict[str, ViT]:
    """Load the models, keyed like `names`; all must have the first one's patches."""
    from ...checkpoints.weights import load_pretrained

    models = {key: load_pretrained(name) for key, name in names.items()}
    model = models["model"]
    for key, each in models.items():
        if each.config.num_classes == 0:
            raise UserError(
                f"{names[key]}: expected a model with a classifier, found none, and so no answers; "
                "train.py --blocks none gives it one and leaves its blocks as they are"
            )
        if each.preprocess != model.preprocess or each.config.grid != model.config.grid:
            raise UserError(
                f"{names[key]}: its preprocessing or its patches differ from those of "
                f"{names['model']}; expected the model that it was fine-tuned from"
            )
    return models


def class_indices(model: ViT, classes: Sequence[str], labels: Sequence[int]):
    """Return the model's index (n,) of each photo's class, or None if it lacks one of them."""
    import numpy as np

    if not set(classes) <= set(model.labels):
        return None
    index = {name: i for i, name in enumerate(model.labels)}
    return np.array([index[classes[label]] for label in labels])
