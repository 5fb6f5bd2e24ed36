"""Measure how much of a model's attention falls on the pet.

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
from ...system import torch_start

if TYPE_CHECKING:
    from ...model import ViT

DESCRIPTION = "Measure how much of a model's attention falls on the pet."
METHODS = ("attention", "rollout", "relevance")  # those of attention.py, which imports torch
MAX_GALLERY = 50


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("score", description=DESCRIPTION)
    parser.add_measuring_flags("score")
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
    torch_start.start(args.device)
    from ...model import working_copy
    from ...system.device import peak_gib, pick_amp, pick_device
    from . import figure, gallery, measure, outputs, report, splits, statistics
    from .models import load_models, model_names

    out = Path(args.out)
    has_gallery = args.gallery > 0
    outputs.check_folder(out, "score", gallery=has_gallery)
    names = model_names(args)
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)
    run = splits.run_that_split(args.data, args.split, names)
    data, split = splits.load_masked_split(args.data, args.split, run)
    models = load_models(names)
    blocks = cli.parse_blocks(args.blocks, models["model"].config.depth)
    check_models(models, names, blocks, args.methods)
    labels = models["model"].labels
    knows_classes = set(data.classes) <= set(labels)
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
    true_names = [data.classes[label] for label in split.labels]
    predicted_names = [labels[i] for i in measured.predicted] if knows_classes else None
    groups = statistics.group_photos(true_names, predicted_names)
    if data.is_pets:
        listing = "test" if args.split == "test" else "trainval"
        groups |= statistics.cats_and_dogs(split.paths, listing)
    scores = statistics.summarize(measured.scores, measured.map_keys, groups)
    sentence = report.one_sentence(scores, blocks[-1], names)
    print(*report.overview(names, measured, groups, args.split, blocks), sep="\n")
    if origin:
        print(origin)
    print(*report.tables(scores, args.methods), "", sentence, sep="\n")

    settings = vars(args) | {"model": names["model"], "device": str(device), "amp": str(amp)}
    files = outputs.output_names("score", gallery=has_gallery)
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
        "files": files,
        "settings": settings,
    }
    with outputs.replace_earlier(out, "score"):
        report.write_scores(out, scores, summary)
        figure.draw_scores(out / "score.png", scores, names, sentence)
        if has_gallery:
            preprocess = models["model"].preprocess
            kinds = gallery.choose_photos(measured, groups.get("right"), args.gallery)
            captions = gallery.photo_captions(measured, split.paths, true_names, predicted_names)
            gallery.write_gallery(
                out, kinds, measured, split.paths, captions, preprocess, blocks[-1]
            )
    print(f"{len(split)} photos scored in {seconds:.1f} s", file=sys.stderr)
    print(*(printable(out / name) for name in files), sep="\n")
    return 0


def check_models(
    models: Mapping[str, ViT],
    names: Mapping[str, str],
    blocks: Sequence[int],
    methods: Sequence[str],
) -> None:
    """Raise UserError if there is no block, or if a method or the base does not suit a model."""
    if not blocks:
        raise UserError("blocks 'none': expected at least one block to score")
    if "base" in models:
        check_comparable(models["model"], models["base"], names)
    for key, model in models.items():
        if "relevance" in methods and model.config.num_classes == 0:
            raise UserError(
                f"{names[key]}: relevance needs a classifier, and this model has none; "
                "choose other --methods"
            )


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


def check_gallery(count: int, names: Mapping[str, str], knows_classes: bool) -> None:
    """Raise UserError if the gallery cannot show `count` photos of any kind."""
    if count and not knows_classes and "base" not in names:
        raise UserError(
            f"{names['model']}: does not know these classes, so no prediction is right or wrong; "
            "--gallery needs --compare"
        )
    if count > MAX_GALLERY:
        raise UserError(f"--gallery {count}: expected at most {MAX_GALLERY} photos of each kind")
