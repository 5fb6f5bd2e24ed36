"""Describe what a model and a data set are, and where each fact comes from.

Of a model on the Hub, only the config is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import cli
from ..errors import first_few, printable
from ..settings import BASE_MODEL
from ..system import torch_start

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.preprocess import Preprocess
    from ..model import ViT

DESCRIPTION = (
    "Describe what a model and a data set are, and where each fact comes from. Of a model on "
    "the Hub, only the config is downloaded."
)
Row = tuple[str, str, str]  # a name, a fact, and where the fact comes from


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("describe", description=DESCRIPTION)
    parser.add_argument(
        "model",
        nargs="?",
        default=BASE_MODEL,
        metavar="MODEL",
        help="a Hub id, a folder, a file or demo, as --model of train.py",
    )
    parser.add_argument(
        "--revision", metavar="REV", help="Hub revision; default: the repository's main branch"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="a data set to describe as well, as --data of train.py"
    )
    return cli.run(describe, parser, argv)


def describe(args: argparse.Namespace) -> int:
    torch_start.import_torch()
    rows = describe_model(args.model, args.revision)
    if args.data is not None:
        rows += [("", "", ""), *describe_data(args.data)]
    for name, fact, source in rows:
        origin = f"  ({source})" if source else ""
        print(printable(f"{name:18} {fact}{origin}"))
    return 0


def describe_model(source: str, revision: str | None) -> list[Row]:
    import torch

    from ..checkpoints.configs import CheckpointSpec
    from ..checkpoints.weights import load_pretrained, read_configs
    from ..model import ViT

    configs = read_configs(source, revision)
    if configs is None:
        # A file of weights has no config: its tensors say everything.
        model = load_pretrained(source, revision=revision)
        spec = CheckpointSpec(model.config, model.preprocess, model.labels)
        commit = model.origin.commit
        config_source = preprocess_source = "tensors"
    else:
        spec, files = configs
        commit = files.commit
        config_source = "config.json"
        preprocess_source = files.preprocessor.name if files.preprocessor else config_source
        with torch.device("meta"):  # Only the shapes are needed.
            model = ViT(spec.sizes)

    c = spec.sizes
    technique = "Vision Transformer, pre-norm"
    if c.layer_scale:
        technique += ", LayerScale"
    if c.num_registers:
        technique += f", {c.num_registers} registers"
    blocks = f"{c.depth} of {c.num_heads} heads, {c.embed_dim} wide, MLP {c.mlp_dim}"
    h, w = c.img_size
    gh, gw = c.grid
    pixels = f"{h} x {w} pixels: {gh} x {gw} patches of {c.patch_size}"
    gh, gw = model.pos_grid
    tokens = f"{c.num_tokens}; positions learned on {gh} x {gw} patches"
    labels = "none: a backbone"
    if spec.labels:
        labels = f"{len(spec.labels)}: {first_few(spec.labels)}"
    return [
        ("model", source, f"commit {commit}" if commit else ""),
        ("technique", f"{technique}, arXiv:2010.11929", config_source),
        ("blocks", blocks, config_source),
        ("input", pixels, preprocess_source),
        ("tokens", tokens, config_source),
        *_describe_preprocess(spec.preprocess, preprocess_source),
        *_count_parameters(model),
        ("labels", labels, config_source),
    ]


def _describe_preprocess(preprocess: Preprocess, source: str) -> list[Row]:
    from PIL import Image

    if isinstance(preprocess.resize, tuple):
        h, w = preprocess.resize
        resizing = f"squashed to {h} x {w}"
    else:
        resizing = f"shortest edge to {preprocess.resize}"
    if preprocess.crop:
        h, w = preprocess.crop
        resizing += f", then the central {h} x {w}"
    resample = Image.Resampling(preprocess.resample).name.lower()
    mean = ", ".join(f"{value:.4g}" for value in preprocess.mean)
    std = ", ".join(f"{value:.4g}" for value in preprocess.std)
    return [
        ("resizing", f"{resizing}; {resample}", source),
        ("normalisation", f"mean {mean}; std {std}", source),
    ]


def _count_parameters(model: ViT) -> list[Row]:
    """Count all parameters, and those that train.py trains by default."""
    from ..model import freeze_except, trainable

    depth = len(model.blocks)
    blocks = [i for i in (10, 11) if i < depth] or [depth - 1]
    freeze_except(model, blocks)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in trainable(model).values())
    source = "counted from the sizes"
    return [
        ("parameters", f"{total:,}", source),
        ("trainable", f"{trained:,} with blocks {blocks[0]}-{blocks[-1]}, norm and head", source),
    ]


def describe_data(root: str) -> list[Row]:
    """Describe a data set on this machine. Raises UserError if there is none."""
    from ..data.datasets import split_data
    from ..data.listing import list_data
    from ..data.pets import SPLITS, read_listing
    from ..data.survey import quick_findings
    from ..training.overview import count_photos

    listing = list_data(root)
    data = split_data(listing, seed=0)
    splits = (data.train, data.val, data.test)
    rows = [("data", root, ""), ("photos", count_photos(data), "seed 0")]
    rows += [("", str(finding), "") for finding in quick_findings(listing)]
    if listing.folder.pets is not None:
        listed = [photo for split in SPLITS for photo in read_listing(listing.folder.pets, split)]
        species = Counter(photo.species for photo in listed)
        fact = f"{species['cat']:,} cats, {species['dog']:,} dogs"
        rows.append(("cats and dogs", fact, "annotations/trainval.txt and test.txt"))
        licence = ("licence", "CC BY-SA 4.0", "www.robots.ox.ac.uk/~vgg/data/pets")
    else:
        licence = ("licence", "not stated in class folders", "")
    rows += _describe_headers([path for split in splits for path in split.paths])
    rows.append(licence)
    rows.append(("", f"{'train':>7} {'val':>7} {'test':>7}", ""))
    counts = [Counter(split.labels) for split in splits]
    for label, name in enumerate(data.classes):
        rows.append((name, " ".join(f"{count[label]:7}" for count in counts), ""))
    return rows


def _describe_headers(paths: Sequence[Path]) -> list[Row]:
    """Describe the sizes and formats of photos, of which only the headers are read."""
    from PIL import Image

    from ..data.photos import FORMATS

    sizes: list[tuple[int, int]] = []
    formats: Counter[str | None] = Counter()
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sizes.append(image.size)
                formats[image.format] += 1
        except Exception:  # Broken files raise anything; the doctor says what is wrong.
            formats["unreadable"] += 1
    source = "the photos' headers"
    rows = []
    for name, values in zip(("width", "height"), zip(*sizes)):
        median = statistics.median(values)
        span = f"{min(values)} to {max(values)} pixels, median {median:.0f}"
        rows.append((name, span, source))
    counts = ", ".join(f"{n:,} {name}" for name, n in formats.most_common())
    return [*rows, ("formats", counts, source)]
