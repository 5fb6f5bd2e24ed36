"""Describe: what a model and a data set are, and where each fact comes from. Of a model on the Hub it reads only the config."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import cli

if TYPE_CHECKING:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("describe", description=__doc__)
    parser.add_argument(
        "model", nargs="?", default=cli.BASE_MODEL, metavar="MODEL", help="as --model of train.py"
    )
    parser.add_argument("--revision", metavar="REV", help="Hub revision; none: the default branch")
    parser.add_argument("--data", metavar="DIR", help="a data set to describe too, as in train.py")
    return cli.run(describe, parser, argv)


def describe(args: argparse.Namespace) -> int:
    rows = describe_model(args.model, args.revision)
    if args.data:
        rows += [("", "", ""), *describe_data(args.data)]
    for name, fact, source in rows:
        print(cli.printable(f"{name:18} {fact}{f'  ({source})' if source else ''}"))
    return 0


def describe_model(source: str, revision: str | None) -> list[tuple[str, str, str]]:
    """Return rows (what, fact, where it comes from) of a model."""
    import torch
    from PIL import Image

    from ..checkpoints import weights
    from ..model import ViT, freeze_except, trainable

    said = weights.read_configs(source, revision)
    if said is None:  # a file that says nothing but by its tensors
        model = weights.load_pretrained(source, revision=revision)
        c, p, labels, commit = model.config, model.preprocess, model.labels, model.origin.commit
        where = by = "tensors"
    else:
        (c, p, labels, by, commit), where = said, "config.json"
        with torch.device("meta"):
            model = ViT(c)
    trained = [i for i in (10, 11) if i < c.depth] or [c.depth - 1]
    freeze_except(model, trained)
    total, count = (
        sum(p.numel() for p in some) for some in (model.parameters(), trainable(model).values())
    )
    extras = ", LayerScale" * c.layer_scale + f", {c.num_registers} registers" * bool(
        c.num_registers
    )
    how = (
        f"squashed to {p.resize[0]} x {p.resize[1]}"
        if isinstance(p.resize, tuple)
        else f"shortest edge to {p.resize}"
    )
    how += f", then the central {p.crop[0]} x {p.crop[1]}" if p.crop else ""
    named = (
        f"{len(labels)}: {', '.join(labels[:3])}{', ...' * (len(labels) > 3)}"
        if labels
        else "none: a backbone"
    )
    return [
        ("model", source, f"commit {commit}" if commit else ""),
        ("technique", f"Vision Transformer, pre-norm{extras}, arXiv:2010.11929", where),
        ("blocks", f"{c.depth} of {c.num_heads} heads, {c.embed_dim} wide, MLP {c.mlp_dim}", where),
        (
            "input",
            f"{c.img_size[0]} x {c.img_size[1]} pixels: {c.grid[0]} x {c.grid[1]} patches of {c.patch_size}",
            by,
        ),
        (
            "tokens",
            f"{c.num_tokens}; positions learned on {model.pos_grid[0]} x {model.pos_grid[1]} patches",
            where,
        ),
        ("resizing", f"{how}; {Image.Resampling(p.resample).name.lower()}", by),
        (
            "normalisation",
            f"mean {', '.join(f'{m:.4g}' for m in p.mean)}; std {', '.join(f'{s:.4g}' for s in p.std)}",
            by,
        ),
        ("parameters", f"{total:,}", "counted from the sizes"),
        (
            "trainable",
            f"{count:,} with blocks {trained[0]}-{trained[-1]}, norm and head",
            "counted from the sizes",
        ),
        ("labels", named, where),
    ]


def describe_data(root: str) -> list[tuple[str, str, str]]:
    """Return rows (what, fact, where it comes from) of a data set that is here. Raises UserError if it is not."""
    from PIL import Image

    from ..data.datasets import load_data
    from ..data.pets import SPLITS, read_listing
    from ..errors import UserError
    from ..training.overview import count_photos

    folder = Path(root).expanduser()
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(
            f"{root}: no data here to describe; train.py downloads Oxford-IIIT Pet into such a folder"
        )
    data = load_data(folder, seed=0)
    sizes, splits = [], (data.train, data.val, data.test)
    formats: Counter[str | None] = Counter()
    for path in itertools.chain.from_iterable(split.paths for split in splits):
        try:
            with Image.open(path) as image:  # only its header
                sizes.append(image.size)
                formats[image.format] += 1
        except Exception:  # whatever decoders of broken files raise; the doctor says what
            formats["unreadable"] += 1
    rows = [("data", root, ""), ("photos", count_photos(data), "seed 0")]
    licence = ("not stated in class folders", "")
    if (pets := data.root / "oxford-iiit-pet").is_dir():
        kinds = Counter(kind for split in SPLITS for *_, kind in read_listing(pets, split))
        licence = ("CC BY-SA 4.0", "www.robots.ox.ac.uk/~vgg/data/pets")
        rows.append(
            (
                "cats and dogs",
                f"{kinds['cat']:,} cats, {kinds['dog']:,} dogs",
                "annotations/trainval.txt and test.txt",
            )
        )
    for name, values in zip(("width", "height"), zip(*sizes)):
        span = f"{min(values)} to {max(values)} pixels, median {statistics.median(values):.0f}"
        rows.append((name, span, "the photos' headers"))
    rows.append(
        (
            "formats",
            ", ".join(f"{n:,} {name}" for name, n in formats.most_common()),
            "the photos' headers",
        )
    )
    rows += [("licence", *licence), ("", f"{'train':>7} {'val':>7} {'test':>7}", "")]
    counts = [Counter(split.labels) for split in splits]
    return rows + [
        (name, " ".join(f"{n[label]:7}" for n in counts), "")
        for label, name in enumerate(data.classes)
    ]
