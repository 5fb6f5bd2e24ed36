#!/usr/bin/env python3
"""Name what is in photos, and draw where each block of the Vision Transformer looks."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from minivit import cli  # torch comes in with the job, so that --help and a mistyped flag answer at once


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="infer.py", description=__doc__)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO|FOLDER", help="photos, or folders of photos")
    add(
        "--model", metavar="ID|DIR|FILE|demo", help=f"as in train.py; none: {cli.RUN_DIR} if it is there, else {cli.BASE_MODEL}"
    )
    add("--revision", metavar="REV", help="Hub revision; none: the default branch")
    add("--img-size", type=cli.image_size, metavar="N|HxW", help="another input size than the checkpoint's, in pixels")
    add("--layers", default="8-11", metavar="RANGE", help="blocks to draw, from 0: 8-11, 10,11, all")
    add("--top-k", type=cli.at_least(1), default=5, help="names to print for each photo")
    add("--out", default="attention", metavar="DIR", help="where the figures are written, as <photo's stem>.png")
    parser.add_device_flags()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(infer, make_parser(), argv)


def infer(args: argparse.Namespace) -> int:
    """Photo by photo: pixels, logits and attention, names, figure."""
    import torch

    from minivit import device, loop, optim, photos, plots, weights
    from minivit.attention import CLASS_TOKEN, query_maps

    paths = list(expand(args.photos))
    source = args.model or (cli.RUN_DIR if Path(cli.RUN_DIR, "config.json").exists() else cli.BASE_MODEL)
    print(f"model: {cli.printable(source)}", file=sys.stderr)
    on = device.pick_device(args.device)
    amp = device.pick_amp(args.amp, on)
    model = weights.load_pretrained(source, revision=args.revision, img_size=args.img_size).to(on)
    c = model.config
    layers = optim.parse_blocks(args.layers, c.depth)
    out, taken = Path(args.out), {os.path.realpath(path) for path in paths}
    out.mkdir(parents=True, exist_ok=True)

    unreadable = 0
    for path in paths:
        try:
            photo = photos.open_photo(path)
        except photos.PhotoError as error:
            print(cli.printable(error), file=sys.stderr)
            unreadable += 1
            continue
        images = model.preprocess(photo)[None].to(on)
        with torch.inference_mode(), loop.autocast(on, amp):
            logits, attn = model.forward_with_attention(images, layers, queries=[CLASS_TOKEN])
        maps = {block: query_maps(weights, c.grid, num_registers=c.num_registers)[0].mean(0) for block, weights in attn.items()}
        print(cli.printable(path))
        title = plots.shorten(path.name, 60)
        if model.labels:
            top = logits[0].float().softmax(0).topk(min(args.top_k, len(model.labels)))
            names = [(p, cli.printable(model.labels[i])) for p, i in zip(top.values.tolist(), top.indices.tolist())]
            title = f"{plots.shorten(names[0][1], 60)} {names[0][0]:.3f}"
            print("\n".join(f"{probability:.3f}  {name}" for probability, name in names))
        else:
            print(f"{cli.printable(source)} has no classifier: attention only", file=sys.stderr)
        figure = unused(out, path.stem, taken)
        plots.draw_attention(figure, photo, maps, model.preprocess, title)
        print(cli.printable(figure), flush=True)
    return 2 if unreadable else 0


def expand(arguments: Iterable[str]) -> Iterator[Path]:
    """Yield the photos that are meant: a folder stands for those right inside it, and must have some."""
    from minivit.errors import UserError
    from minivit.photos import SUFFIXES, list_photos

    for path in map(Path, arguments):
        try:
            found = list_photos(path)
        except OSError:  # not a folder; if it is no photo either, open_photo says why
            found = [path]
        if not found:
            raise UserError(f"{path}: no photos in this folder; expected files ending in {', '.join(SUFFIXES)}")
        yield from found


def unused(out: Path, stem: str, taken: set[str]) -> Path:
    """Return where to draw, over no photo and no other figure of this run: cat.png, cat-2.png, ..."""
    while len(os.fsencode(stem)) > 240:  # of the 255 bytes that a name can have
        stem = stem[:-1]
    names = (stem if i == 1 else f"{stem}-{i}" for i in itertools.count(1))
    figure = next(path for name in names if os.path.realpath(path := out / f"{name}.png") not in taken)
    taken.add(os.path.realpath(figure))
    return figure


if __name__ == "__main__":
    cli.start(main)
