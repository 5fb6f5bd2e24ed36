"""Measure how much of a model's attention falls on the pet in Oxford-IIIT Pet's photos.

This module imports neither torch nor NumPy before the job starts, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ... import cli
from ...errors import UserError, printable

if TYPE_CHECKING:
    from ...model import ViT

DESCRIPTION = (
    "Measure how much of a model's attention falls on the pet in Oxford-IIIT Pet's photos."
)
METHODS = ("attention", "rollout", "relevance")  # those of attention.py, which imports torch
MAX_GALLERY = 50


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("score", description=DESCRIPTION)
    parser.add_argument(
        "--model",
        metavar="ID|DIR|demo",
        help=f"as in train.py; without it, {cli.RUN_DIR} if it exists, else {cli.BASE_MODEL}",
    )
    parser.add_argument(
        "--compare",
        metavar="BASE",
        help="the model before fine-tuning, which is scored too, to report what changed",
    )
    parser.add_argument(
        "--data",
        default="data",
        metavar="DIR",
        help="the folder that holds oxford-iiit-pet with its annotations",
    )
    parser.add_argument(
        "--split",
        choices=("test", "trainval", "train", "val"),
        default="test",
        help="the photos to score; test has no head boxes",
    )
    parser.add_argument(
        "--blocks",
        default="all",
        metavar="RANGE",
        help="the blocks to score, counted from 0: 8-11, or 10,11, or all",
    )
    parser.add_argument(
        "--methods",
        type=method_list,
        default="attention",
        metavar="LIST",
        help=f"a comma-separated list of {', '.join(METHODS)}, or all, which takes longer",
    )
    parser.add_argument(
        "--gallery",
        type=cli.at_least(0),
        default=0,
        metavar="N",
        help="show up to N photos of each kind that is worth a look",
    )
    parser.add_device_flags()
    parser.add_workers("processes that decode photos")
    parser.add_argument(
        "--out",
        type=cli.folder,
        default="score",
        metavar="DIR",
        help="the folder for score.csv, score.json, score.png and the gallery",
    )
    return cli.run(score, parser, argv)


def method_list(text: str) -> tuple[str, ...]:
    """Parse --methods: "all", or a comma-separated list, to which attention is always added."""
    if text == "all":
        return METHODS
    requested = text.split(",")
    unknown = sorted(set(requested) - set(METHODS))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected all, or some of {','.join(METHODS)}; found {unknown[0]!r}"
        )
    return tuple(name for name in METHODS if name in requested or name == "attention")


def score(args: argparse.Namespace) -> int:
    """Score the maps of every photo in a split, then print, write and draw the results."""
    from ...model import working_copy
    from ...system.device import peak_gib, pick_amp, pick_device
    from ...system.files import locked
    from . import figure, gallery, measure, report, splits, statistics

    out = Path(args.out)
    outputs = report.OUTPUTS if args.gallery else report.OUTPUTS[:3]
    report.check_folder(out, outputs)
    names = {"model": cli.default_model(args.model)}
    if args.compare:
        names["base"] = args.compare
    print(f"model: {printable(names['model'])}", file=sys.stderr)
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    run = splits.run_that_split(args.data, args.split, names)
    classes, split = splits.load_split(args.data, args.split, run)
    models, blocks = load_models(names, args.blocks, args.methods)
    labels = models["model"].labels
    knows_classes = set(classes) <= set(labels)
    origin = splits.describe_split(args.split, run, names["model"], knows_classes)
    check_gallery(args.gallery, names, knows_classes)

    equal_blocks = 0
    if "base" in models:
        # Weights are compared before a lower precision makes more of them equal.
        equal_blocks = measure.count_equal_blocks(models["model"], models["base"])
    started = time.perf_counter()
    models = {key: working_copy(model, device, amp, train=False) for key, model in models.items()}
    measured = measure.measure(
        models,
        split.paths,
        blocks=blocks,
        methods=args.methods,
        workers=args.workers,
        equal_blocks=equal_blocks,
    )
    seconds = time.perf_counter() - started

    split = split.take(measured.photos)
    true_names = [classes[label] for label in split.labels]
    predicted_names = [labels[i] for i in measured.predicted] if knows_classes else None
    listing = "test" if args.split == "test" else "trainval"
    groups = statistics.group_photos(split.paths, true_names, predicted_names, listing)
    scores = statistics.summarize(measured.scores, measured.map_keys, groups)
    sentence = report.one_sentence(scores, blocks[-1], names)
    print(*report.overview(names, measured, groups, args.split, blocks), sep="\n")
    if origin:
        print(origin)
    print(*report.tables(scores, args.methods), "", sentence, sep="\n")

    settings = vars(args) | {"model": names["model"], "device": str(device), "amp": str(amp)}
    summary = {
        "sentence": sentence,
        "split": origin or f"the {args.split} split",
        "photos": len(split),
        "left_out": measured.left_out,
        "without_head": measured.without_head,
        "pet_area": float(measured.pet_area.mean()),
        "equal_blocks": measured.equal_blocks,
        "seconds": seconds,
        "peak_gib": peak_gib(device),
        "files": list(outputs),
        "settings": settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, wait=True):
        report.remove_earlier(out)
        report.write_scores(out, scores, summary)
        figure.draw_scores(out / "score.png", scores, names, sentence)
        if args.gallery:
            preprocess = models["model"].preprocess
            kinds = gallery.choose_photos(measured, groups.get("right"), args.gallery)
            captions = gallery.photo_captions(measured, split.paths, true_names, predicted_names)
            gallery.write_gallery(
                out, kinds, measured, split.paths, captions, preprocess, blocks[-1]
            )
    print(f"{len(split)} photos scored in {seconds:.1f} s", file=sys.stderr)
    print(*(printable(out / name) for name in outputs), sep="\n")
    return 0


def load_models(
    names: Mapping[str, str], blocks_text: str, methods: Sequence[str]
) -> tuple[dict[str, ViT], list[int]]:
    """Load the models, keyed like `names`, and parse the blocks to score.

    Raises UserError if there is no block, if a method does not suit a model, or if the models
    cannot be compared.
    """
    from ...checkpoints.weights import load_pretrained

    model = load_pretrained(names["model"])
    models = {"model": model}
    if "base" in names:
        # A run may have been trained at another input size than its base.
        models["base"] = load_pretrained(names["base"], img_size=model.config.img_size)
    blocks = cli.parse_blocks(blocks_text, model.config.depth)
    if not blocks:
        raise UserError("blocks 'none': expected at least one block to score")
    if "base" in models:
        check_comparable(model, models["base"], names)
    for key, each in models.items():
        if "relevance" in methods and each.config.num_classes == 0:
            raise UserError(
                f"{names[key]}: relevance needs a classifier, and this model has none; "
                "choose other --methods"
            )
    return models, blocks


def check_comparable(model: ViT, base: ViT, names: Mapping[str, str]) -> None:
    """Raise UserError unless only the heads and the weights of the two models differ.

    The grid that positions were trained on, and how they are resampled, may differ too: a run
    stores its positions resampled, and count_equal_blocks compares what comes out.
    """
    for field, size in vars(model.config).items():
        base_size = getattr(base.config, field)
        if field not in ("num_classes", "pos_grid", "pos_antialias") and base_size != size:
            raise UserError(
                f"{names['base']}: its {field} is {base_size}, not {size}; "
                f"expected the model that {names['model']} was fine-tuned from"
            )
    # Training keeps all of its base's preprocessing but for the rounding of margins.
    margins = model.preprocess.round_margins
    if model.preprocess != replace(base.preprocess, round_margins=margins):
        raise UserError(
            f"{names['base']}: its preprocessing differs from that of {names['model']}, "
            "so their maps cannot be compared; expected the model before fine-tuning"
        )


def check_gallery(count: int, names: Mapping[str, str], knows_classes: bool) -> None:
    """Raise UserError if the gallery cannot show `count` photos of any kind."""
    if count and not knows_classes and "base" not in names:
        raise UserError(
            f"{names['model']}: does not know these breeds, so no prediction is right or wrong; "
            "--gallery needs --compare"
        )
    if count > MAX_GALLERY:
        raise UserError(f"--gallery {count}: expected at most {MAX_GALLERY} photos of each kind")
