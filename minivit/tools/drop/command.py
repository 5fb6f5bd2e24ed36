"""Take the pet away and see: does the answer come from the pet or from the background?

This module imports neither torch nor NumPy before the job starts, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ... import cli
from ...errors import UserError, printable
from ...system import torch_start

if TYPE_CHECKING:
    import numpy as np

    from ...model import ViT

DESCRIPTION = "Take the pet away and see: does the answer come from the pet or from the background?"
SEED = 0  # of the patches that are left out, the backgrounds that are joined, and the resamplings


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("drop", description=DESCRIPTION)
    parser.add_measuring_flags("drop")
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
    return cli.run(drop, parser, argv)


def drop(args: argparse.Namespace) -> int:
    """Ask about every photo under every condition, then print, write and draw the results."""
    torch_start.start(args.device)
    from ...model import working_copy
    from ...system.device import peak_gib, pick_amp, pick_device
    from ..score import outputs, splits
    from ..score.models import load_models, model_names
    from . import figure, gallery, measure, report, statistics

    out = Path(args.out)
    outputs.check_folder(out, "drop", gallery=True)
    names = model_names(args)
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    data, split = splits.load_masked_split(args.data, "test", run=None)
    split = split.take(measure.order_of_photos(split.labels, args.photos, SEED))
    models = load_models(names)
    check_classifiers(models, names)
    model = models["model"]
    map_blocks = blocks_of_maps(args, models)

    copies = {key: working_copy(each, device, amp, train=False) for key, each in models.items()}
    answers = measure.ask(
        copies, split.paths, split.labels, map_blocks=map_blocks, workers=args.workers, seed=SEED
    )

    split = split.take(answers.photos)
    true = {key: class_indices(each, data.classes, split.labels) for key, each in models.items()}
    summaries = {}
    for key in models:
        summaries[key] = statistics.summarize(answers.predicted[key], true[key])
    sentence = statistics.one_sentence(summaries["model"], summaries.get("base"))
    print(*report.overview(names, answers, len(set(split.labels))), sep="\n")
    print(*report.tables(summaries), "", sentence, sep="\n")

    true_classes = true["model"]
    files = outputs.output_names("drop", gallery=true_classes is not None)
    settings = vars(args) | {"model": names["model"], "device": str(device), "amp": str(amp)}
    about = {
        "sentence": sentence,
        "photos": len(split),
        "left_out": answers.left_out,
        "seconds": answers.seconds,
        "peak_gib": peak_gib(device),
        "files": files,
        "settings": settings | {"seed": SEED},
    }
    with outputs.replace_earlier(out, "drop"):
        report.write_files(out, summaries, about)
        figure.draw_drop(out / "drop.png", summaries, sentence)
        if true_classes is not None:
            predicted = answers.predicted["model"]
            kinds = gallery.choose_photos(predicted, true_classes)
            true_names = [data.classes[label] for label in split.labels]
            names_by_condition = gallery.name_answers(predicted, model.labels)
            gallery.write_gallery(
                out,
                kinds,
                split.paths,
                true_names,
                names_by_condition,
                model.preprocess,
                model.config.grid,
            )
    print(report.timing(len(split), answers.seconds), file=sys.stderr)
    print(*(printable(out / name) for name in files), sep="\n")
    return 0


def check_classifiers(models: Mapping[str, ViT], names: Mapping[str, str]) -> None:
    """Raise UserError if a model gives no answers."""
    for key, model in models.items():
        if model.config.num_classes == 0:
            raise UserError(
                f"{names[key]}: expected a model with a classifier, found none, and so no answers; "
                "train.py --blocks none gives it one and leaves its blocks as they are"
            )


def blocks_of_maps(args: argparse.Namespace, models: Mapping[str, ViT]) -> list[int]:
    """Return the blocks whose maps are compared: none without --maps.

    Raises UserError if there is no such block, or if blocks are named without --maps.
    """
    if not args.maps:
        if args.blocks is not None:
            raise UserError(f"--blocks {args.blocks}: expected --maps too, which compares maps")
        return []
    depth = min(model.config.depth for model in models.values())
    blocks = cli.parse_blocks(args.blocks or str(depth - 1), depth)
    if not blocks:
        raise UserError("blocks 'none': expected at least one block whose maps to compare")
    return blocks


def class_indices(model: ViT, classes: Sequence[str], labels: Sequence[int]) -> np.ndarray | None:
    """Return the model's index (n,) of each photo's class, or None if it lacks one of them."""
    import numpy as np

    if not set(classes) <= set(model.labels):
        return None
    index = {name: i for i, name in enumerate(model.labels)}
    return np.array([index[classes[label]] for label in labels])
