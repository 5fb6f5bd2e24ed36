#!/usr/bin/env python3
"""Name what is in photos, and draw where each block of the Vision Transformer looks."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from minivit import cli  # torch comes in with the job, so that --help and a mistyped flag answer at once


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="infer.py", description=__doc__)
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO|FOLDER", help="photos, or folders of photos")
    add("--model", metavar="ID|DIR", help=f"Hub id or local folder; none: {cli.RUN_DIR} if it is there, else {cli.BASE_MODEL}")
    add("--revision", metavar="REV", help="Hub revision; none: the default branch")
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
    print(f"model: {source}", file=sys.stderr)
    on = device.pick_device(args.device)
    amp = device.pick_amp(args.amp, on)
    model = weights.load_pretrained(source, revision=args.revision).to(on)
    layers = optim.parse_blocks(args.layers, model.config.depth)
    out, taken = Path(args.out), set()
    out.mkdir(parents=True, exist_ok=True)

    unreadable = 0
    for path in paths:
        try:
            photo = photos.open_photo(path)
        except photos.PhotoError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        images = model.preprocess(photo)[None].to(on)
        with torch.inference_mode(), loop.autocast(on, amp):
            logits, attn = model.forward_with_attention(images, layers, queries=[CLASS_TOKEN])
        maps = {block: query_maps(weights, model.config.grid)[0].mean(0) for block, weights in attn.items()}
        print(path)
        title = path.name
        if model.labels:
            top = logits[0].float().softmax(0).topk(min(args.top_k, len(model.labels)))
            names = [(p, model.labels[i]) for p, i in zip(top.values.tolist(), top.indices.tolist())]
            title = f"{names[0][1]} {names[0][0]:.3f}"
            print("\n".join(f"{probability:.3f}  {name}" for probability, name in names))
        else:
            print(f"{source} has no classifier: attention only", file=sys.stderr)
        figure = out / f"{unused(path.stem, taken)}.png"
        plots.draw_attention(figure, photo, maps, model.preprocess, title)
        print(figure, flush=True)
    return 2 if unreadable else 0


def expand(arguments: Iterable[str]) -> Iterator[Path]:
    """Yield the photos that are meant: a folder stands for those right inside it, and must have some."""
    from minivit.errors import UserError
    from minivit.photos import SUFFIXES, list_photos

    for path in map(Path, arguments):
        found = list_photos(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no photos in this folder; expected files ending in {', '.join(SUFFIXES)}")
        yield from found


def unused(stem: str, taken: set[str]) -> str:
    """Return a figure's stem that no other photo of this run has: cat, cat-2, ..."""
    name = next(n for i in itertools.count(1) if (n := stem if i == 1 else f"{stem}-{i}") not in taken)
    taken.add(name)
    return name


if __name__ == "__main__":
    sys.exit(main())
